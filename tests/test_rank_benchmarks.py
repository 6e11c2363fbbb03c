"""Benchmarks of several ranks run where there is no GPU, and say what differs."""

import json
import sys
from pathlib import Path

import pytest
from small_runs import benchmark_of, write_config

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
