"""Canaries through real runs: what the auditor reads is what was released."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import audit_of, small_config, start

from dpsgd.audit import audited_config
from dpsgd.data import DataSplits, ImageDataset, load_datasets
from dpsgd.errors import ConfigError
from dpsgd.privacy import AuditResult
from dpsgd.run import Run

SMALL = {
    "model.name": "convnet",
    "model.depth": 1,
    "model.groups": 4,
    "privacy.expected_batch_size": 200,
    "privacy.clipping_norm": 0.5,
    "privacy.noise_multiplier": 0.0,
    "train.num_steps": 6,
}
EVERY_STEP_MATTERS = {
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.1,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 2,
    "optimizer.learning_rate": 0.1,
    "data.augmentation": "crop_flip",
    "data.crop_padding": 1,
    "data.augmentation_multiplicity": 2,
}


def audited(
    folder: Path, changes: dict[str, Any], *, gradients: int = 100, images: int = 0
) -> tuple[AuditResult, Run]:
    config = audited_config(small_config({**SMALL, **changes}), gradients)
    engine = {"runtime.engine": config.runtime.engine}
    run, state, _ = start(folder, {**SMALL, **changes, **engine})
    return audit_of(run, state, gradients=gradients, images=images), run


def times_drawn(run: Run, num_canaries: int, is_in: Any) -> Any:
    """How often each canary was drawn: the last rows are those that are in."""
    num_rows = len(load_datasets(run.config.data).train) + int(is_in.sum())
    sampler = dataclasses.replace(run.sampler, num_rows=num_rows)
    rows = [sampler.draw(step) for step in range(run.mechanism.num_steps)]
    counts = np.zeros(num_canaries)
    counts[is_in] = np.bincount(np.concatenate(rows), minlength=num_rows)[
        -int(is_in.sum()) :
    ]
    return counts


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("changes", [{}, EVERY_STEP_MATTERS], ids=["plain", "all"])
def test_without_noise_the_score_is_how_often_the_canary_was_drawn(
    tmp_path: Path, changes: dict[str, Any], rescale: bool
) -> None:
    """Sampling, clipping, divisor, rate, momentum and decay are undone exactly."""
    changes = {**changes, "privacy.rescale_to_unit_norm": rescale}
    result, run = audited(tmp_path, changes)
    found = result.canaries["gradients"]
    expected = times_drawn(run, 100, found.is_in)

    assert expected.max() >= 2
    # Weights of size 1 are float32, and the divisor of their steps is 200.
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=5e-3)


def test_noise_of_the_scores_is_that_of_the_steps(tmp_path: Path) -> None:
    changes = {"privacy.noise_multiplier": 3.0}
    result, run = audited(tmp_path, changes, gradients=600)
    found = result.canaries["gradients"]
    noise = found.scores - times_drawn(run, 600, found.is_in)
    share = noise.std() / (3.0 * np.sqrt(6))

    # The standard deviation of 600 draws is known to 2.9 %.
    assert abs(share - 1) < 4 * 0.029
    assert abs(noise[found.is_in].mean() - noise[~found.is_in].mean()) < 4 * 0.6


def test_a_run_without_noise_is_seen_through(tmp_path: Path) -> None:
    result, _ = audited(tmp_path, {"privacy.expected_batch_size": 1_437}, images=40)
    found = result.canaries["gradients"]

    assert result.epsilon == np.inf
    assert not result.is_refuted  # nothing was claimed
    assert found.guesses.num_correct > 0.9 * found.guesses.num_guesses
    assert found.epsilon_lower_bound > 2.0


def test_image_canaries_that_are_in_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load_datasets(small_config().data)
    few = ImageDataset(
        images=splits.train.images[:60],
        labels=splits.train.labels[:60],
        class_names=splits.train.class_names,
    )
    data = DataSplits(train=few, test=splits.test)
    monkeypatch.setattr("dpsgd.assembly.load_datasets", lambda _: data)
    monkeypatch.setattr("small_runs.load_datasets", lambda _: data)
    changes = {
        "data.num_examples": 60,
        "privacy.delta": 1e-3,
        "privacy.expected_batch_size": 60,
        "train.num_steps": 40,
        "optimizer.learning_rate": 1.0,
    }
    result, _ = audited(tmp_path, changes, gradients=0, images=200)
    found = result.canaries["images"]
    falls = [found.scores[kept].mean() for kept in (found.is_in, ~found.is_in)]

    assert [*result.canaries] == ["images"]
    # Four standard deviations of the difference of two means of 100 scores.
    assert falls[0] > falls[1] + 4 * found.scores.std() * np.sqrt(4 / 200)


def test_only_gradient_canaries_choose_the_engine() -> None:
    config = small_config()

    assert audited_config(config, 0) is config
    assert audited_config(config, 1).runtime.engine == "vmap"


def test_an_audit_writes_no_weights(tmp_path: Path) -> None:
    audited(tmp_path / "run", {"runtime.checkpoint_every": 1}, images=10)

    assert not (tmp_path / "run").exists()


def test_a_seed_repeats_an_audit(tmp_path: Path) -> None:
    changes = {"privacy.noise_multiplier": 2.0, "train.num_steps": 1}
    one, two, other = (
        audited(tmp_path, {**changes, "train.seed": seed})[0].canaries["gradients"]
        for seed in (1, 1, 2)
    )

    assert np.array_equal(one.is_in, two.is_in)
    assert np.array_equal(one.scores, two.scores)
    assert not np.array_equal(one.is_in, other.is_in)


def test_an_audit_of_users_is_refused(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path)
    privacy = dataclasses.replace(
        run.config.privacy, unit="user", max_examples_per_user=2
    )
    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, privacy=privacy)
    )
    with pytest.raises(ConfigError, match=r"privacy\.unit=user: .* whole users"):
        audit_of(run, state)


@pytest.mark.parametrize(
    ("changes", "numbers", "told"),
    [
        ({"optimizer.name": "adamw"}, (1, 1), r"optimizer\.name=adamw: .* only SGD"),
        ({}, (0, 0), r"canaries=0 and 0: must be"),
        ({}, (5, -1), r"canaries=5 and -1: must be at least 0"),
        ({}, (1, 361), r"--image-canaries=361: .*test set, which has 360"),
    ],
)
def test_an_audit_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], numbers: tuple[int, int], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        audited(tmp_path, changes, gradients=numbers[0], images=numbers[1])
