"""Training on cached features is training on views, only sooner."""

import dataclasses
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    audit_of,
    dpsgd_train,
    remembering,
    small_config,
    start,
    write_config,
)

from dpsgd.assembly import plan_of
from dpsgd.checkpoint import read_tensors, write_tensors
from dpsgd.config import Config
from dpsgd.data import ImageDataset, ViewLoader, load_datasets
from dpsgd.errors import CheckpointError, ConfigError
from dpsgd.features import FeatureCache
from dpsgd.models import build_model, freeze, initialize
from dpsgd.rng import RandomStreams
from dpsgd.train import train

Load = Callable[[Config], torch.Tensor]

# float32 rounding of convolutions in batches of another size, grown over four steps
ROUNDING = 1e-5
VIEWS = {
    "data.augmentation": "crop_flip",
    "data.crop_padding": 1,
    "data.augmentation_multiplicity": 3,
    "data.fixed_views": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from."""
    folder = tmp_path_factory.mktemp("source")
    changes = {"train.seed": 1, "train.num_steps": 1}
    assert dpsgd_train(write_config(folder, changes), "--run-dir", folder / "run") == 0
    return folder / "run"


def changes(source: Path, cache: Path | None = None, **more: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in more.items()}
    kept = {} if cache is None else {"runtime.feature_cache": str(cache)}
    begun = {"model.init_from": str(source), "finetune.train": "classifier"}
    return {**begun, **kept, **named}


@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("views", [{}, VIEWS], ids=["one view", "three views"])
@pytest.mark.parametrize("privacy", [True, False])
def test_training_on_the_cache_is_training_without_it(
    source: Path, tmp_path: Path, views: dict[str, Any], privacy: bool, engine: str
) -> None:
    off = {
        "privacy.enabled": False,
        "privacy.noise_multiplier": None,
        "privacy.delta": None,
    }
    common = {**views, **({} if privacy else off), "train.label_smoothing": 0.1}
    common["runtime.engine"] = engine
    cache = tmp_path / "features" / "cache.safetensors"
    plain, expected, _ = start(tmp_path / "plain", {**changes(source), **common})
    train(plain, expected)
    for number in ("made", "read"):
        run, state, plan = start(
            tmp_path / number, {**changes(source, cache), **common}
        )
        train(run, state)

        assert state.step == 4
        assert state.params.keys() == expected.params.keys()
        for name, leaf in expected.params.items():
            torch.testing.assert_close(state.params[name], leaf, rtol=0, atol=ROUNDING)
        assert run.evaluate(state.params).loss == pytest.approx(
            plain.evaluate(expected.params).loss, rel=1e-4
        )
        rows = dict(plan.rows(small_config({**changes(source, cache), **common})))
        assert rows["features"] == f"kept in {cache}"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600  # as private as the data


@pytest.mark.parametrize("mixed", [0, 1])
def test_views_are_fixed_by_image_and_number_alone(
    source: Path, tmp_path: Path, mixed: int
) -> None:
    config = small_config({**VIEWS, "data.mixed_views": mixed})
    dataset = load_datasets(config.data).train

    def loader(seed: int, rows: slice) -> ViewLoader:
        return ViewLoader(
            ImageDataset(images=dataset.images[rows], labels=dataset.labels[rows]),
            config=config.data,
            streams=RandomStreams.from_seed(seed),
            microbatch_size=4,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def views(
        seed: int, step: int, *drawn: int, held: slice = slice(50)
    ) -> torch.Tensor:
        (batch,) = loader(seed, held)(np.array(drawn), step)
        return batch[0][: len(drawn)]

    first = views(0, 0, 3, 7, 20)
    assert first.shape == (3, 3, 1, 8, 8)
    assert not torch.equal(first[0, 0], first[0, 1])
    assert torch.equal(views(1, 9, 7, 20), first[1:])  # other run, step and draw
    assert torch.equal(views(0, 0, 3, 7, held=slice(40)), first[:2])
    # One example less moves the others up; their views stay theirs.
    assert torch.equal(views(0, 0, 2, 6, 19, held=slice(1, 50)), first)


@pytest.mark.parametrize(
    ("change", "value", "others"),
    [
        ("data.mean", [0.4], "views"),
        ("data.augmentation_multiplicity", 2, "views"),
        ("data.mixed_views", 1, "views"),
        ("model.compute_dtype", "float64", "network"),
        ("model.init_weights", "last", "weights"),
    ],
)
def test_a_cache_of_other_views_or_weights_is_refused(
    source: Path, tmp_path: Path, change: str, value: Any, others: str
) -> None:
    cache = tmp_path / "cache.safetensors"
    begun = {**changes(source, cache, model__init_weights="ema"), **VIEWS}
    start(tmp_path / "first", begun)
    before = cache.read_bytes()

    rule = rf"^runtime.feature_cache={cache}: holds features of other {others}; name"
    with pytest.raises(CheckpointError, match=rule):
        start(tmp_path / "second", {**begun, change: value})
    assert cache.read_bytes() == before


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Load, Config]:
    """A cache, what loads it for given settings, and the settings it is of."""
    path = tmp_path_factory.mktemp("cached") / "cache.safetensors"
    config = small_config(VIEWS)
    model = build_model(config.model, image_shape=(1, 8, 8), num_classes=10)
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    freeze(model, "classifier")
    splits = load_datasets(config.data)
    dataset = splits.train.placed(torch.device("cpu"), num_workers=0)

    def load(config: Config) -> torch.Tensor:
        return FeatureCache(path).load(model, dataset, config)

    load(config)
    return path, load, config


def with_setting(config: Config, section: str, name: str, value: Any) -> Config:
    own = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: own})


@pytest.mark.parametrize(
    ("section", "words", "free"),
    [
        (
            "data",
            "views",
            {
                *("source", "name", "root", "train", "test"),
                *("image_column", "label_column", "user_column", "group_column"),
                *("num_examples", "num_users", "eval_image_size", "fixed_views"),
            },
        ),
        ("model", "network", {"init_from", "init_weights", "num_classes"}),
    ],
)
def test_every_setting_is_compared_but_for_those_that_change_no_feature(
    cached: tuple[Path, Load, Config], section: str, words: str, free: set[str]
) -> None:
    _, load, config = cached
    for field in dataclasses.fields(getattr(config, section)):
        other = with_setting(config, section, field.name, "another")
        if field.name in free:
            assert load(other).shape[:2] == (1437, 3)
            continue
        with pytest.raises(CheckpointError, match=f"features of other {words};"):
            load(other)


@pytest.mark.parametrize(
    ("section", "words", "setting", "other"),
    [
        ("data", "views", "mixed_views", 1),
        ("model", "network", "stride_padding", "same"),
    ],
)
def test_a_cache_that_is_older_than_a_setting_had_its_default(
    cached: tuple[Path, Load, Config],
    section: str,
    words: str,
    setting: str,
    other: Any,
) -> None:
    path, load, config = cached
    tensors, facts = read_tensors(path)
    del facts[words][setting]
    write_tensors(path, tensors, facts)

    assert torch.equal(load(config), tensors["features"])
    with pytest.raises(CheckpointError, match=f"features of other {words};"):
        load(with_setting(config, section, setting, other))


def test_a_cache_of_other_data_is_refused_without_showing_a_fingerprint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache.safetensors"
    start(tmp_path / "first", changes(source, cache))
    splits = load_datasets(small_config().data)
    kept = torch.arange(len(splits.train)) != 5
    fewer = dataclasses.replace(
        splits.train, images=splits.train.images[kept], labels=splits.train.labels[kept]
    )
    splits = dataclasses.replace(splits, train=fewer)
    monkeypatch.setattr("dpsgd.assembly.load_datasets", lambda _: splits)

    with pytest.raises(CheckpointError, match="features of other data; ") as caught:
        start(tmp_path / "second", changes(source, cache))
    assert fewer.fingerprint() not in str(caught.value)


@pytest.mark.parametrize("content", ["cut", "text", "foreign"])
def test_a_file_that_is_no_cache_is_refused_and_kept(
    source: Path, tmp_path: Path, content: str
) -> None:
    cache = tmp_path / "cache.safetensors"
    if content == "text":
        cache.write_text("my notes")
    elif content == "foreign":
        cache.write_bytes((source / "model.safetensors").read_bytes())
    else:
        start(tmp_path / "first", changes(source, cache))
        cache.write_bytes(cache.read_bytes()[:1000])
    before = cache.read_bytes()

    rule = r"feature_cache=.*: holds no features, or is damaged; delete it"
    with pytest.raises(CheckpointError, match=rule):
        start(tmp_path / "second", changes(source, cache))
    assert cache.read_bytes() == before


@pytest.mark.parametrize("method", [None, "exists", "mkdir", "touch"])
def test_a_place_that_takes_no_file_is_told_before_features_are_computed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str | None
) -> None:
    notes = tmp_path / "notes"
    notes.write_text("mine")
    cache = (notes if method is None else tmp_path / "new") / "cache.safetensors"
    own = getattr(Path, method) if method else None

    def locked(path: Path, *arguments: Any, **options: Any) -> Any:
        if cache.name in path.name or path == cache.parent:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return own(path, *arguments, **options)

    monkeypatch.setattr("dpsgd.features._computed", None)
    if method:
        monkeypatch.setattr(Path, method, locked)
    rule = rf"feature_cache={cache}: cannot be written \(.+\); give access to it"
    with pytest.raises(CheckpointError, match=rule):
        start(tmp_path / "run", changes(source, cache))
    assert notes.read_text() == "mine"


def test_a_cache_needs_a_frozen_network_and_fixed_views(tmp_path: Path) -> None:
    cache = {"runtime.feature_cache": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match="only the features of a frozen network"):
        small_config(cache)
    begun = {**cache, "model.init_from": "run", "finetune.train": "classifier"}
    with pytest.raises(ConfigError, match="augmentation=flip makes new views"):
        small_config({**begun, "data.augmentation": "flip"})
    assert small_config({**begun, **VIEWS}).data.fixed_views
    with pytest.raises(ConfigError, match="the examples of users are not kept"):
        small_config({**begun, "privacy.unit": "user", "data.source": "parquet"})


def test_a_run_on_the_cache_goes_on_bit_for_bit(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.safetensors"
    whole, expected, _ = start(tmp_path / "whole", changes(source, cache))
    train(whole, expected)
    run, state, _ = start(tmp_path / "parts", changes(source, cache))
    train(run, state, stop_requested=lambda: state.step == 2)
    resumed, restored, _ = start(
        tmp_path / "parts", changes(source, cache), resume=True
    )
    train(resumed, restored)

    assert resumed.streams == run.streams
    for name, leaf in expected.params.items():
        assert torch.equal(leaf, restored.params[name])


@pytest.mark.parametrize("then", ["other features", "no features"])
def test_noise_has_a_new_key_where_features_are_not_the_same_bits(
    source: Path, tmp_path: Path, then: str
) -> None:
    cache = tmp_path / "cache.safetensors"
    run, state, _ = start(tmp_path, changes(source, cache))
    train(run, state, stop_requested=lambda: state.step == 2)
    cache.unlink()
    kept = cache if then == "other features" else None
    resumed, restored, _ = start(tmp_path, changes(source, kept), resume=True)

    assert restored.step == 2
    assert resumed.streams.noise_key(2) != run.streams.noise_key(2)
    assert resumed.streams.key == run.streams.key


def test_the_cache_is_of_the_networks_own_features(
    source: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache.safetensors"
    run, state, _ = start(tmp_path, changes(source, cache))
    features = load_file(cache)["features"]
    labels = load_datasets(run.config.data).train.labels

    assert features.shape == (1437, 1, 64)
    draw = np.array([5, 100])
    ((drawn, drawn_labels, mask),) = run.load_views(draw, 3)
    assert torch.equal(drawn[mask], features[draw])
    assert torch.equal(drawn_labels[mask], labels[draw])
    plain, _, _ = start(tmp_path / "plain", changes(source))
    ((views, _, _),) = plain.load_views(draw, 3)
    loss_fn = plain.grad_fn.loss_fn
    for index in range(2):
        torch.testing.assert_close(
            loss_fn(state.params, views[index], labels[draw[index]]),
            run.grad_fn.loss_fn(state.params, drawn[index], labels[draw[index]]),
        )


def test_microbatches_of_features_are_as_large_as_memory_allows(source: Path) -> None:
    more = {"privacy__expected_batch_size": 1000, "data__num_examples": 1437}
    with remembering():
        cached = plan_of(small_config(changes(source, Path("cache"), **more)))
        plain = plan_of(small_config(changes(source, **more)))

    assert cached.microbatch_size == 512  # the power of two below the batch
    assert plain.microbatch_size == 256


def test_gradients_of_features_are_counted_where_they_are_stored(source: Path) -> None:
    def memory_of(**more: str) -> int:
        settings = {f"runtime.{name}": value for name, value in more.items()}
        cached = changes(source, Path("cache"))
        with remembering():
            return plan_of(small_config({**cached, **settings})).memory.per_example

    stored = memory_of(engine="vmap")
    assert (
        stored
        == memory_of(execution="compile")
        > memory_of()
        == memory_of(engine="ghost")
    )


def test_a_command_trains_on_the_cache(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.safetensors"
    config = write_config(tmp_path, changes(source, cache))
    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["private"] is True
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert f"feature_cache: {cache}" in written


def test_a_run_on_the_cache_is_not_audited(source: Path, tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, changes(source, tmp_path / "cache.safetensors"))

    with pytest.raises(ConfigError, match="canaries have no features in it; remove it"):
        audit_of(run, state)
