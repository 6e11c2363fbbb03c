"""The comparison of what is fine-tuned: its runs, their order, and their medians."""

import json
import math
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from small_runs import ROOT, benchmark_of

from dpsgd.config import load_config


@pytest.mark.parametrize("network", ["wrn16-4", "wrn28-10"])
def test_every_run_of_the_comparison_is_a_valid_one(network: str) -> None:
    finetune = benchmark_of("finetune")
    kinds = {"wrn16-4": 3, "wrn28-10": 2}[network]  # the latter not from scratch
    arguments = Namespace(
        **{
            "network": network,
            "folder": Path("runs"),
            "kinds": finetune.KINDS,
            "seeds": [0, 1],
        },
        **{"epsilons": [1, 8], "set": [], "set_public": [], "set_private": []},
    )
    first, *others = finetune.jobs(arguments)

    configs = {
        job.name: load_config(ROOT / "configs" / f"{job.config}.yaml", job.overrides)
        for job in (first, *others)
    }
    assert not configs[first.name].privacy.enabled
    assert len(others) == 2 * 2 * kinds == len(configs) - 1
    for job in others:
        config = configs[job.name]
        assert config.privacy.target_epsilon == job.epsilon
        assert config.train.seed == job.seed
        assert (config.model.init_from is None) == (job.kind == "scratch")
        if job.kind != "scratch":
            assert config.model.init_from == str(Path("runs") / first.name)
            assert config.finetune.train == job.kind
        assert (config.runtime.feature_cache is None) == (job.kind != "classifier")
        if job.kind != "scratch":
            assert job.after[0] == first.name
    classifiers = [job for job in others if job.kind == "classifier"]
    assert classifiers[0].after == (first.name,)
    for job in classifiers[1:]:  # they find the features
        assert job.after == (first.name, classifiers[0].name)


@pytest.mark.parametrize("epsilon", [1, 2, 4, 8])
def test_the_header_of_a_fine_tuning_says_how_the_classifier_is_run(
    epsilon: int,
) -> None:
    name = f"cifar10_wrn16-4_finetune_eps{epsilon}.yaml"
    header = (ROOT / "configs" / name).read_text().partition("\ndata:")[0]

    for setting in benchmark_of("finetune").CLASSIFIER:
        assert f"--set {setting}" in header


def made_up_job(name: str, folder: Path, *after: str, seconds: float = 0.3) -> Any:
    """A job and the process that stands for it: it ends in a report after a while."""
    report = folder / name / "report.json"
    code = f"import time; time.sleep({seconds}); open({str(report)!r}, 'x')"
    job = benchmark_of("finetune").Job(name, "", [], after=after)
    report.parent.mkdir(parents=True)
    return job, [sys.executable, "-c", code]


def test_runs_wait_for_others_and_no_more_run_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = benchmark_of("finetune")
    made_up = [
        made_up_job("first", tmp_path),
        *(made_up_job(name, tmp_path, "first") for name in "abc"),
        made_up_job("last", tmp_path, "first", "a"),
    ]
    commands = {job.name: command for job, command in made_up}
    started: list[tuple[str, subprocess.Popen[bytes]]] = []
    most = 0

    def start(job: Any, folder: Path, *, has_log: bool) -> "subprocess.Popen[bytes]":
        nonlocal most
        assert has_log
        assert all(finetune.is_finished(name, folder) for name in job.after)
        process = subprocess.Popen(commands[job.name])
        started.append((job.name, process))
        most = max(most, sum(one.poll() is None for _, one in started))
        return process

    monkeypatch.setattr(finetune, "start", start)
    jobs = [job for job, _ in made_up]
    assert finetune.run_all(jobs, tmp_path, parallel=2, deadline=math.inf)
    assert [name for name, _ in started] == ["first", "a", "b", "c", "last"]
    assert most == 2
    assert finetune.run_all(jobs, tmp_path, parallel=2, deadline=math.inf)
    assert len(started) == len(jobs)  # what is finished is not run again


@pytest.mark.parametrize("reason", ["deadline", "failure"])
def test_what_runs_is_stopped_at_the_deadline_and_when_another_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    finetune = benchmark_of("finetune")
    long = [made_up_job(name, tmp_path, seconds=60) for name in "ab"]
    commands = {job.name: command for job, command in long}
    if reason == "failure":
        commands["b"] = [sys.executable, "-c", "import sys; sys.exit(2)"]
    started = []

    def start(job: Any, *_: Any, **__: Any) -> "subprocess.Popen[bytes]":
        started.append(subprocess.Popen(commands[job.name]))
        return started[-1]

    monkeypatch.setattr(finetune, "start", start)
    jobs = [job for job, _ in long]
    if reason == "deadline":
        deadline = time.monotonic() + 0.5
        assert not finetune.run_all(jobs, tmp_path, parallel=2, deadline=deadline)
    else:
        with pytest.raises(SystemExit, match="b: bin/dpsgd-train ended with code 2"):
            finetune.run_all(jobs, tmp_path, parallel=2, deadline=math.inf)
    assert started[0].returncode == -signal.SIGTERM


def test_medians_are_shown_and_drawn_from_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, drawn = tmp_path / "saved.json", tmp_path / "drawn.svg"
    rows = [
        {"kind": kind, "target_epsilon": epsilon, "test_accuracy": base + spread}
        for kind, base in (("classifier", 0.7), ("all", 0.8))
        for epsilon in (1, 8)
        for spread in (0.0, 0.05, 0.01)
    ]
    first = {"kind": "pre-training", "target_epsilon": None, "test_accuracy": 0.5}
    saved.write_text(json.dumps({"rows": [first, *rows]}))
    arguments = ["finetune", "--from", str(saved), "--plot", str(drawn)]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark_of("finetune").main()

    shown = capsys.readouterr().out
    assert shown.count("71.00 (70.00, 75.00)") == 2
    assert shown.count("81.00 (80.00, 85.00)") == 2
    text = drawn.read_text()
    assert text.startswith("<svg ")
    for label in ("all layers", "classifier alone", "from scratch", "De et al."):
        assert label in text
