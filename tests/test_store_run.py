"""Whole runs on stores: packed, trained on, gone on with, and refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_images import make_store
from PIL import Image
from small_runs import dpsgd_eval, dpsgd_train, read_lines, start, write_config

from dpsgd.cli import audit, prepare
from dpsgd.errors import CheckpointError, ConfigError
from dpsgd.train import train

SHADES = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def coloured(root: Path, count: int, seed: int) -> Path:
    """Writes noisy images of several sizes, whose colour is their class."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        name = sorted(SHADES)[index % 3]
        size = (14 + index % 4, 12 + index % 3)
        pixels = np.array(SHADES[name]) + rng.normal(0, 40, (*size, 3))
        path = root / name / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return root


def changes(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "data.source": "store",
        "data.train": str(folder / "train"),
        "data.test": str(folder / "test"),
        "data.num_examples": 60,
        "data.image_size": 8,
        "data.augmentation": "resized_crop_flip",
        "data.augmentation_multiplicity": 2,
        "privacy.delta": 1e-3,
        "runtime.decode_workers": 0,
        **{name.replace("__", "."): value for name, value in more.items()},
    }


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    make_store(tmp_path / "train", 60)
    make_store(tmp_path / "test", 9, seed=1)
    return tmp_path


def test_a_folder_of_images_is_packed_and_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 240), ("test", 60)):
        images = coloured(tmp_path / f"{name}-images", count, seed=count)
        assert prepare.main([str(images), str(tmp_path / name)]) == 0
    config = write_config(
        tmp_path,
        changes(
            tmp_path,
            data__num_examples=240,
            model__name="convnet",
            model__depth=2,
            privacy__expected_batch_size=60,
            train__num_steps=25,
            eval__every=25,
            runtime__decode_workers=2,
            report__unprotected_metrics=True,
        ),
    )
    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0
    *steps, evaluation = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["unprotected"]["train_loss"] for line in steps]

    assert len(losses) == 25
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert evaluation["test_accuracy"] > 0.8  # a third by chance
    capsys.readouterr()
    assert dpsgd_eval(tmp_path / "run", "--weights", "last", "--json") == 0
    assert f'"accuracy": {evaluation["test_accuracy"]}' in capsys.readouterr().out


def test_the_update_does_not_depend_on_microbatch_or_workers(stores: Path) -> None:
    params = []
    for number, (size, workers) in enumerate([(4, 0), (16, 2)]):
        run, state, _ = start(
            stores / str(number),
            changes(
                stores,
                runtime__microbatch_size=size,
                runtime__decode_workers=workers,
                model__compute_dtype="float64",
            ),
        )
        train(run, state)
        params.append(state.params)

    for name, leaf in params[0].items():
        # Sums of other order in float32, over four steps.
        torch.testing.assert_close(params[1][name], leaf, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_bit_for_bit_with_a_store_that_moved(stores: Path) -> None:
    whole, expected, _ = start(stores / "whole", changes(stores))
    train(whole, expected)
    begun, state, _ = start(stores / "broken", changes(stores))
    train(begun, state, stop_requested=lambda: state.step == 2)
    (stores / "elsewhere").mkdir()
    for name in ("train", "test"):
        shutil.move(stores / name, stores / "elsewhere" / name)
    moved = changes(stores / "elsewhere", runtime__decode_workers=2)
    rest, state, _ = start(stores / "broken", moved, resume=True)
    assert state.step == 2
    train(rest, state)

    assert rest.streams == whole.streams  # the same noise, which repeats no sum
    for name, leaf in expected.params.items():
        assert torch.equal(state.params[name], leaf)


def test_going_on_with_other_data_is_refused(stores: Path) -> None:
    begun, state, _ = start(stores / "run", changes(stores))
    train(begun, state, stop_requested=lambda: state.step == 2)
    make_store(stores / "other", 60, seed=5)

    other = changes(stores, data__train=str(stores / "other"))
    with pytest.raises(CheckpointError, match=r"^data\.train=\.\.\.: holds other exam"):
        start(stores / "run", other, resume=True)
    larger = changes(stores, data__image_size=9)
    with pytest.raises(CheckpointError, match=r"^data\.image_size=9: the checkpoint h"):
        start(stores / "run", larger, resume=True)


def test_another_decoder_gets_another_noise(
    stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, state, _ = start(stores / "run", changes(stores))
    train(begun, state, stop_requested=lambda: state.step == 2)
    same, _, _ = start(stores / "run", changes(stores), resume=True)
    monkeypatch.setattr("dpsgd.data.store.dataset.decoder_version", lambda: "another")
    other, _, _ = start(stores / "run", changes(stores), resume=True)

    # Other pixels and the old noise would release the difference of two sums.
    assert same.streams == begun.streams
    assert other.streams.noise_nonce
    assert other.streams.noise_key(2) != begun.streams.noise_key(2)


def test_faults_of_a_store_are_told_without_a_traceback(
    stores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(stores, changes(stores))
    run = stores / "run"
    assert dpsgd_train(config, "--run-dir", run, "--set", "model.num_classes=4") == 2
    told = capsys.readouterr().err
    assert told.startswith("model.num_classes=4: the data set declares 3 classes; set")
    assert audit.main([config, "--run-dir", str(run)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("data.source=store: the images must be held in memory for")
    assert not run.exists()
    shard = stores / "train" / "shard-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert dpsgd_train(config, "--run-dir", run) == 2
    told = capsys.readouterr().err
    assert "has a wrong checksum: the image is damaged; copy the store again" in told
    assert "Traceback" not in told


def test_other_classes_than_those_of_the_named_set_are_refused(stores: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.name=imagenet: has 1000 classes"):
        start(stores / "checkpoints", changes(stores, data__name="imagenet"))
