"""Where users are the unit of privacy: what one user can move, and what is said."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from small_runs import (
    dpsgd_eval,
    dpsgd_train,
    remembering,
    small_config,
    write_config,
    write_parquet,
)
from small_runs import start as start_run
from torch.func import functional_call

import dpsgd.train
from dpsgd.assembly import plan_of
from dpsgd.data import DataSplits, ImageDataset, load_datasets
from dpsgd.models import (
    build_model,
    per_example_loss,
    per_user_loss,
    trainable_params,
)
from dpsgd.run import Run, TrainState
from dpsgd.train import train, train_step
from dpsgd.trees import Params

# Float32 rounding of sums of some ten gradients of norm 1.
ROUNDING = 1e-5
SETTINGS: dict[str, Any] = {
    "data.source": "parquet",
    "data.user_column": "owner",
    "data.num_users": 40,
    "data.augmentation": "crop",
    "data.crop_padding": 1,
    "data.augmentation_multiplicity": 2,
    "model.name": "convnet",
    "model.depth": 2,
    "model.groups": 4,
    "privacy.unit": "user",
    "privacy.max_examples_per_user": 3,
    "privacy.delta": 1e-3,
    "privacy.clipping_norm": 0.5,
    "privacy.rescale_to_unit_norm": False,
    "train.num_steps": 8,
    "eval.every": 100,
    "runtime.microbatch_size": 4,
}


def start(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    num_users: int = 20,
    changes: dict[str, Any] | None = None,
) -> tuple[Run, TrainState]:
    """Starts a run on digits: 20 users of 1 to 5 examples, a 21st of 40 odd ones."""
    digits = load_datasets(small_config().data)
    owners = torch.arange(20).repeat_interleave(torch.arange(20) % 5 + 1)
    images, labels = digits.train.images[: len(owners)], digits.train.labels
    labels = labels[: len(owners)]
    if num_users > 20:
        odd = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
        odd[:, :, ::2, ::2] = 255
        images, labels = torch.cat([images, odd]), torch.cat([labels, labels[:40]])
        owners = torch.cat([owners, torch.full((40,), 20)])
    held = ImageDataset(
        images=images,
        labels=labels,
        class_names=digits.train.class_names,
        users=owners,
    )
    data = DataSplits(train=held, test=digits.test)
    monkeypatch.setattr("dpsgd.assembly.load_datasets", lambda _: data)
    run, state, _ = start_run(folder, {**SETTINGS, **(changes or {})})
    return run, state


def record_sums(monkeypatch: pytest.MonkeyPatch) -> list[Params]:
    """Makes every step leave its clipped sum."""
    sums: list[Params] = []
    release = dpsgd.train.noisy_descent_

    def recorded(clipped_sum: Params, *arguments: Any, **named: Any) -> None:
        sums.append({name: leaf.clone() for name, leaf in clipped_sum.items()})
        release(clipped_sum, *arguments, **named)

    monkeypatch.setattr(dpsgd.train, "noisy_descent_", recorded)
    return sums


def distance(first: Params, second: Params) -> float:
    return float(torch.cat([(first[n] - second[n]).flatten() for n in first]).norm())


def test_a_user_with_all_its_examples_moves_the_sum_by_at_most_the_clipping_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = start(monkeypatch, tmp_path / "a")
    other, other_state = start(monkeypatch, tmp_path / "b", num_users=21)
    sums = record_sums(monkeypatch)
    moved = []
    for step in range(8):
        for name, leaf in other_state.params.items():
            leaf.copy_(state.params[name])
        train_step(run, state)
        train_step(other, other_state)
        moved.append((20 in other.sampler.draw(step), distance(*sums[-2:])))

    assert other.mechanism == run.mechanism
    assert run.sampler.num_rows == 20
    assert run.mechanism.sample_rate == 16 / 40
    assert {drawn for drawn, _ in moved} == {False, True}
    for drawn, length in moved:
        # Forty examples of one user: a bound on each alone would allow 40 times 0.5.
        low, high = (0.49, 0.5 * (1 + ROUNDING)) if drawn else (0.0, 0.0)
        assert low <= length <= high


def test_the_sum_is_that_of_a_loop_over_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = start(monkeypatch, tmp_path)
    sums = record_sums(monkeypatch)
    params = {name: leaf.clone() for name, leaf in state.params.items()}
    batches = list(run.load_views(run.sampler.draw(0), 0))
    train_step(run, state)
    network = build_model(run.config.model, image_shape=(1, 8, 8), num_classes=10)

    expected = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    for views, labels, present, mask in batches:
        for user in mask.nonzero().flatten():
            leaves = {name: leaf.requires_grad_() for name, leaf in params.items()}
            losses = [
                F.cross_entropy(
                    functional_call(network, leaves, (views[user, one],)),
                    labels[user, one].expand(2),
                )
                for one in present[user].nonzero().flatten()
            ]
            loss = torch.stack(losses).mean()
            grads = torch.autograd.grad(loss, list(leaves.values()))
            norm = torch.cat([grad.flatten() for grad in grads]).norm()
            for total, grad in zip(expected.values(), grads, strict=True):
                total += min(1.0, 0.5 / float(norm)) * grad
    assert distance(sums[0], expected) < ROUNDING * len(batches) * 4


def test_loss_of_a_user_is_the_mean_over_its_examples(tiny_network: Any) -> None:
    model = tiny_network()
    params, loss_fn = trainable_params(model), per_user_loss(model)
    rng = torch.Generator().manual_seed(0)
    views = torch.randn(4, 2, 3, 8, 8, generator=rng)
    labels, present = (
        torch.tensor([0, 2, 1, 0]),
        torch.tensor([True, True, False, True]),
    )
    each = torch.stack(
        [
            per_example_loss(model)(params, views[one], labels[one])
            for one in present.nonzero().flatten()
        ]
    )

    assert each.std() > 1e-3
    loss = loss_fn(params, views, labels, present)
    torch.testing.assert_close(loss, each.mean())
    views[2] = torch.nan  # padding counts for nothing, whatever it holds
    torch.testing.assert_close(loss_fn(params, views, labels, present), loss)
    assert loss_fn(params, views, labels, torch.zeros(4, dtype=torch.bool)) == 0


def test_a_users_gradient_that_is_not_finite_is_left_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = start(monkeypatch, tmp_path)
    (*batch, mask), *_ = run.load_views(np.arange(4), 0)
    whole = run.grad_fn(state.params, *batch, mask=mask & (torch.arange(4) != 1))
    batch[0][1, 0, 0, 0, 0, 0] = torch.nan
    grads = run.grad_fn(state.params, *batch, mask=mask)

    assert int(grads.num_nonfinite) == 1
    for name, leaf in whole.clipped_sum.items():
        torch.testing.assert_close(grads.clipped_sum[name], leaf, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("microbatch_size", [1, 3, 16])
def test_the_microbatch_size_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, microbatch_size: int
) -> None:
    run, reference = start(monkeypatch, tmp_path / "a")
    changes = {"runtime.microbatch_size": microbatch_size}
    other, state = start(monkeypatch, tmp_path / "b", changes=changes)
    for _ in range(2):
        train_step(run, reference)
        train_step(other, state)

    # Two steps of learning rate 0.5, over some 10,000 parameters together.
    assert distance(state.params, reference.params) < 10 * ROUNDING


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A config of a run on files of 30 examples of 12 users."""
    owners = [f"person {row % 12 if row < 24 else 0}" for row in range(30)]
    changes = {
        **SETTINGS,
        "data.train": write_parquet(tmp_path / "train.parquet", owner=owners),
        "data.test": write_parquet(tmp_path / "test.parquet", owner=["nobody"] * 6),
        "data.num_users": 14,
        "privacy.expected_batch_size": 6,
        "privacy.delta": 0.01,
        "train.num_steps": 2,
    }
    return write_config(tmp_path, changes)


def test_plan_result_report_and_weights_name_the_unit(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert dpsgd_train(config, "--run-dir", run) == 0

    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "users │ 14 (public, declared)",
        "expected batch │ 6 users",
        "examples a user │ at most 3",
        "neighbours │ add-or-remove-one user",
        "4 users, up to",
        "note: 12 users are held, 14 are declared",
        ", 0.01)-DP per user",
    ):
        assert text in shown
    report = json.loads((run / "report.json").read_text())
    assert report["unit"] == "user"
    assert report["sample_rate"] == 6 / 14
    with safe_open(run / "model.safetensors", framework="pt") as weights:
        assert json.loads(weights.metadata()["dpsgd"])["unit"] == "user"
    assert dpsgd_eval(run) == 0


def told(capsys: pytest.CaptureFixture[str], config: str, *changes: str) -> str:
    capsys.readouterr()
    overrides = [word for change in changes for word in ("--set", change)]
    assert dpsgd_train(config, "--plan", *overrides) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_faults_are_told_in_terms_of_users(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = told(capsys, config, "privacy.delta=0.08")
    assert line == (
        "privacy.delta=0.08: must be below 1/num_users (7.1e-02); lower delta"
    )
    line = told(capsys, config, "privacy.expected_batch_size=15")
    assert "must be at most 14 users; lower it" in line
    assert "candidates: label, owner" in told(capsys, config, "data.user_column=who")
    write_parquet(tmp_path / "train.parquet", owner=["a", None, "b"])
    assert "row 1: has no user" in told(capsys, config)


def test_memory_is_planned_for_all_examples_of_a_user(config: str) -> None:
    def memory_of(changes: dict[str, Any]) -> int:
        sections = {**SETTINGS, "privacy.noise_multiplier": 1.0, **changes}
        with remembering():
            return plan_of(small_config({**sections, **files})).memory.per_example

    folder = Path(config).parent
    files = {
        "data.train": str(folder / "train.parquet"),
        "data.test": str(folder / "test.parquet"),
    }
    one, three = (memory_of({"privacy.max_examples_per_user": most}) for most in (1, 3))
    six_views = memory_of(
        {"privacy.max_examples_per_user": 1, "data.augmentation_multiplicity": 6}
    )
    assert three == six_views > one


def test_a_run_of_users_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, straight = start(monkeypatch, tmp_path / "a")
    train(run, straight)
    run, state = start(monkeypatch, tmp_path / "b")
    train(run, state, stop_requested=lambda: state.step == 2)
    run, state, _ = start_run(tmp_path / "b", SETTINGS, resume=True)
    train(run, state)

    assert state.step == 8
    assert distance(state.params, straight.params) == 0


def test_data_that_lost_its_users_cannot_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load_datasets(small_config().data)
    bare = dataclasses.replace(digits.train, users=None)
    data = DataSplits(train=bare, test=digits.test)
    monkeypatch.setattr("dpsgd.assembly.load_datasets", lambda _: data)
    with pytest.raises(ValueError, match=r"data\.user_column=null: the data set does"):
        start_run(tmp_path, SETTINGS)
