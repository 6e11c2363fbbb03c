"""Benchmarks of several ranks run where there is no GPU, and say what differs."""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import ROOT, benchmark_of, write_config

from dpsgd.config import load_config
from dpsgd.parallel import Ranks

SMALL = {
    "model.name": "convnet",
    "model.depth": 2,
    "model.groups": 4,
    "privacy.accountant": "rdp",
}


@pytest.mark.distributed
def test_ranks_are_measured_beside_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "scaling.json"
    arguments = ["--ranks", "1", "2", "--modes", "fsdp", "--steps", "2"]
    config = write_config(tmp_path, SMALL)
    command = ["scaling", config, *arguments, "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark_of("scaling").main()

    found = json.loads(saved.read_text())
    assert found["config"] == config
    rows = found["rows"]
    assert [(row["parallel"], row["ranks"]) for row in rows] == [
        ("none", 1),
        ("fsdp", 1),
        ("fsdp", 2),
    ]
    alone, *others = rows
    assert alone["efficiency"] == 1
    for row in others:
        speed = row["views_per_second"] / alone["views_per_second"]
        assert row["efficiency"] == pytest.approx(speed / row["ranks"])
        # Scalars are whole on every rank; half of an odd number of rows is rounded up.
        state = alone["state_mib"] / row["ranks"]
        assert row["state_mib"] == pytest.approx(state, rel=0.05)
    shown = capsys.readouterr().out
    for row in rows:
        # Some steps of float32 sums in another order.
        assert row["difference_to_one"] < 1e-5
        assert 0 <= row["communication_share"] < 1
        assert row["peak_mib"] > 100  # torch alone takes more
        assert f"{row['views_per_second']:,.0f}" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranks", "1", "0"], "--ranks=0: must be at least 1; raise it"),
        (["--steps", "0"], "--steps=0: must be at least 1; raise it"),
        (["--ranks", "2", "4"], "--ranks=4: this machine has 2 CUDA devices; take at"),
        (["--modes", "pipeline"], "invalid choice: 'pipeline'"),
        (["--set", "train.seed=null"], "train.seed=null: every run would draw its own"),
        (["--set", "runtime.parallel=ddp"], "runtime.parallel=ddp: every mode is run"),
        (["--set", "model.dpeth=2"], "model.dpeth=2: unknown key; did you mean"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_on_ranks_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    config = write_config(tmp_path, {**SMALL, "runtime.device": "auto"})
    monkeypatch.setattr(sys, "argv", ["scaling", config, *arguments])

    with pytest.raises(SystemExit) as ended:
        benchmark_of("scaling").main()
    assert told in f"{ended.value} {capsys.readouterr().err}"  # or argparse says it


def test_ranks_that_fail_end_the_measurement() -> None:
    launch = benchmark_of("scaling").launch
    command = "import os; raise SystemExit(int(os.environ['RANK']) * 3)"

    with pytest.raises(SystemExit, match=r"exit codes \[0, 3\]"):
        launch([sys.executable, "-c", command], 2)


@pytest.mark.distributed
@pytest.mark.parametrize("network", ["wide_resnet", "nf_resnet"])
def test_ranks_are_found_equal_to_one_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    network: str,
) -> None:
    saved = tmp_path / "equality.json"
    arguments = ["--ranks", "2", "--steps", "2", "--networks", network]
    arguments += ["--device", "cpu", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", ["equality", *arguments])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # until the end

    assert benchmark_of("equality").main() == 0
    rows = json.loads(saved.read_text())["rows"]
    assert [(row["parallel"], row["ranks"]) for row in rows] == [
        ("none", 1),
        ("ddp", 2),
        ("fsdp", 2),
    ]
    assert rows[0]["first_step"] == 0 < rows[0]["params"]  # one last bit
    held = [row["held_at_most"] / row["parameters"] for row in rows]
    assert held == pytest.approx([1, 1, 0.5], rel=0.01)
    assert "equal" in capsys.readouterr().out


def facts_with(**changes: Any) -> Callable[[Path], None]:
    """What changes the facts that a rank has left in a folder."""

    def change(folder: Path) -> None:
        path = folder / "0.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def leaves_with(state: str, kind: str, factor: float) -> Callable[[Path], None]:
    """What stretches the tensors of a kind that a rank has left in a folder."""

    def change(folder: Path) -> None:
        leaves = load_file(folder / state)
        for name, leaf in leaves.items():
            leaf *= factor if name.startswith(kind) else 1
        save_file(leaves, folder / state)

    return change


def test_what_is_unequal_is_told(tmp_path: Path) -> None:
    equality = benchmark_of("equality")
    arguments = Namespace(folder=tmp_path, device="cpu", steps=1)
    equality.write_images(tmp_path)
    config = equality.settings("wide_resnet", "none", arguments)
    alone, folder = tmp_path / "alone", tmp_path / "changed"
    equality.play(config, Ranks(), alone, 1)
    changes = {
        "same_draws": facts_with(draws=[[1, 2]]),
        "same_noise": facts_with(noise="other"),
        "first_step": leaves_with("first", "momenta", 1 + 1e-5),
        "params": leaves_with("last", "params", 1.1),
        "ema": leaves_with("last", "ema", 1.1),
    }
    shutil.copytree(alone, folder)
    untouched = equality.compared(folder, alone, size=1, config=config)
    assert equality.is_equal(untouched)

    for what, change in changes.items():
        shutil.rmtree(folder)
        shutil.copytree(alone, folder)
        change(folder)
        row = equality.compared(folder, alone, size=1, config=config)
        assert row[what] != untouched[what]
        assert not equality.is_equal(row)
    assert not row["restored_by_one"]  # what was stretched is not what was saved


IMAGENET = ROOT / "configs" / "imagenet_nf-resnet-50_eps8.yaml"


def write_scaling(folder: Path, *, settings: list[str], modes: list[str]) -> Path:
    """Writes what scaling.py would save: 100 views/s, and 0.5 s a step that stay."""
    rows = [{"parallel": "none", "ranks": 1, "views_per_second": 100.0}]
    views = 800
    for mode in modes:
        for ranks in (1, 2, 8):
            seconds = views / (100 * ranks) + 0.5
            row = {"seconds_per_step": seconds, "views_per_second": views / seconds}
            rows.append({"parallel": mode, "ranks": ranks, **row})
    path = folder / "scaling.json"
    facts = {"config": str(IMAGENET), "set": settings, "rows": rows}
    path.write_text(json.dumps(facts))
    return path


def test_the_cost_of_a_run_follows_from_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cost = benchmark_of("run_cost")
    config = load_config(IMAGENET)
    smaller = ["privacy.expected_batch_size=200", "train.seed=0"]
    path = write_scaling(tmp_path, settings=smaller, modes=["ddp", "fsdp"])
    speed, rest = run_cost.read_measured(path, config, "ddp")
    assert (speed, rest) == pytest.approx((100, 0.5))

    row = run_cost.cost(config, 256, speed=speed, rest=rest)
    seconds = 16_384 * 4 / 256 / 100 + 0.5
    assert row["seconds_per_step"] == pytest.approx(seconds)
    assert row["efficiency"] == pytest.approx(2.56 / seconds)
    assert row["days"] == pytest.approx(71_589 * seconds / 86_400)
    assert row["gpu_hours"] == pytest.approx(256 * 24 * row["days"])

    plot = tmp_path / "cost.svg"
    command = ["run_cost", str(IMAGENET), str(path), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", command)
    run_cost.main()
    shown = capsys.readouterr().out
    assert "4,691,656,704 views" in shown
    assert f"{row['gpu_hours']:,.0f}" in shown
    assert all(f">{word}<" in plot.read_text() for word in ("ddp", "fsdp", "256"))


@pytest.mark.parametrize(
    ("settings", "modes", "arguments", "told"),
    [
        ([], ["fsdp"], [], "has no row of ddp on several ranks"),
        ([], [], [], "has no row of ddp on several ranks"),
        (["model.depth=101"], ["ddp"], [], "measured another network"),
        (["data.augmentation_multiplicity=1"], ["ddp"], [], "or number of views"),
        ([], ["ddp"], ["--ranks", "0"], "--ranks=0: must be at least 1"),
    ],
    ids=str,
)
def test_a_cost_that_nothing_measured_supports_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    modes: list[str],
    arguments: list[str],
    told: str,
) -> None:
    path = write_scaling(tmp_path, settings=settings, modes=modes)
    command = ["run_cost", str(IMAGENET), str(path), *arguments]
    monkeypatch.setattr(sys, "argv", command)

    with pytest.raises(SystemExit):
        benchmark_of("run_cost").main()
    assert told in capsys.readouterr().err


def test_a_cost_without_a_measurement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"

    with pytest.raises(ValueError, match=r"missing\.json: is nothing that benchmarks/"):
        benchmark_of("run_cost").read_measured(path, load_config(IMAGENET), "ddp")
