"""The benchmarks run where there is no GPU, too."""

import gc
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_runs import result, write_run
from small_runs import ROOT, benchmark_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from dpsgd.config import load_config
from dpsgd.models.wide_resnet import WideResNet


def test_every_operator_is_timed_and_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = benchmark_of("kernels")
    saved = tmp_path / "kernels.json"
    arguments = ["kernels", "--device", "cpu", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()

    rows = json.loads(saved.read_text())["rows"]
    assert [row["operator"] for row in rows] == list(benchmark.CASES)
    shown = capsys.readouterr().out
    for row in rows:
        assert row["operator"] in shown
        assert row["milliseconds"] > 0
        # Float32 sums of some hundred terms, and normals of float32 angles. To squared
        # norms a bound on rounding is added, 100 times 1.2e-7.
        is_bounded = row["operator"].startswith("norms")
        assert row["error"] < (2e-5 if is_bounded else 5e-6), row["operator"]


def test_what_is_saved_names_hardware_and_versions() -> None:
    facts = benchmark_of("machine").facts("scipy")

    assert {"commit", "python", "device", "cores", "load"} <= {*facts}
    assert facts["processor"]
    assert {"dpsgd", "torch", "scipy"} <= {*facts["versions"]}
    for path in (ROOT / "benchmarks").glob("*.py"):
        saves = '"--save"' in path.read_text()
        assert saves == ("machine.facts(" in path.read_text()), path.name


def test_curves_are_drawn_beside_their_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "cifar10_wrn16-4_eps1_h100"
    metrics = tmp_path / f"{name}.jsonl"
    shutil.copy(ROOT / "benchmarks" / "results" / metrics.name, metrics)
    monkeypatch.setattr(sys, "argv", ["curves", str(metrics)])
    benchmark_of("curves").main()

    for quantity in ("accuracy", "loss", "epsilon"):
        drawn = f"{name}_{quantity}.svg"
        assert (tmp_path / drawn).read_text().startswith("<svg ")
        assert (ROOT / "benchmarks" / "results" / drawn).is_file()
    assert not (tmp_path / f"{name}_classes.svg").exists()


def test_classes_of_a_run_directory_are_drawn_with_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", report=result())
    monkeypatch.setattr(sys, "argv", ["curves", str(run)])
    benchmark_of("curves").main()

    assert {path.name for path in run.glob("*.svg")} == {
        f"metrics_{name}.svg" for name in ("accuracy", "loss", "epsilon", "classes")
    }
    assert "owl" not in (run / "metrics_classes.svg").read_text()  # has no examples
    assert "dog" in (run / "metrics_classes.svg").read_text()


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


@pytest.mark.parametrize("augmentation", ["scaled_crop_flip", "resized_crop_flip"])
def test_both_loaders_make_as_many_views_of_the_same_images(
    tmp_path: Path, augmentation: str
) -> None:
    loading = benchmark_of("loading")
    images = tmp_path / "images"
    size = loading.write_folder(images, loading.photographs(None, 5))
    for store in ("store", "test"):
        loading.prepare(
            loading.open_source(str(images)),
            tmp_path / store,
            resizing=loading.Resizing(),
        )

    assert 20_000 < size < 200_000  # like a photograph of these sides
    assert loading.our_pass(tmp_path, augmentation, 2, 0)() == 5
    theirs = loading.ViewsOfFolder(images, augmentation, 2)
    assert len(theirs) == 5
    assert theirs[0][0].shape == (2, 3, loading.VIEW, loading.VIEW)


def test_passes_are_timed_alone_and_fed_from_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeding = benchmark_of("feeding")
    small = feeding.Work(
        model={"depth": 10, "width": 1},
        examples=1,
        views=4,
        giga_macs=0.1,
    )
    monkeypatch.setitem(feeding.WORK, "small", small)
    images = tmp_path / "images"
    feeding.write_folder(images, feeding.photographs(None, 5))
    for store in ("store", "test"):
        feeding.prepare(
            feeding.open_source(str(images)),
            tmp_path / store,
            resizing=feeding.Resizing(),
        )

    cpu = torch.device("cpu")
    row = feeding.measure(
        tmp_path, "small", batches=2, workers=0, warm_up=0, device=cpu
    )
    assert row["examples"] == 2 * row["microbatch_size"] == 2 * small.examples_on(cpu)
    for name in ("loads", "passes", "both"):
        images_per_second = row[f"{name}_images_per_second"]
        assert row[f"{name}_views_per_second"] == pytest.approx(4 * images_per_second)
    both, passes = (row[f"{name}_views_per_second"] for name in ("both", "passes"))
    assert row["busy_share"] == pytest.approx(both / passes)


def test_the_large_networks_of_the_benchmark_have_the_work_that_is_told() -> None:
    throughput = benchmark_of("throughput_paths")

    for name, work in throughput.WORK.items():
        with torch.device("meta"):
            model = throughput.build_model(
                throughput.ModelConfig(**work.model),
                image_shape=(3, work.side, work.side),
                num_classes=work.classes,
            )
            image = torch.empty(1, 3, work.side, work.side)
        with FlopCounterMode(display=False) as counter:
            model(image)
        giga_macs = counter.get_total_flops() / 2e9
        assert giga_macs == pytest.approx(work.giga_macs, rel=2e-3), name  # 3 digits
    assert not set(throughput.SMALL) & {"nf-resnet-50 K=4", "nfnet-f3 K=4"}


def small_work(throughput: Any) -> Any:
    """Two examples of eight views of a WRN-10-1."""
    model = {"depth": 10, "width": 1}
    return throughput.Work(model=model, examples=2, views=8, giga_macs=0.1, side=8)


def networks() -> int:
    """Counts the Wide-ResNets that are there."""
    return sum(type(one) is WideResNet for one in gc.get_objects())


@pytest.mark.parametrize(
    "path", ["non-private, torch.compile", "vmap(grad), torch.compile"]
)
def test_a_compiled_path_is_one_graph_of_which_nothing_is_left(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput = benchmark_of("throughput")
    graphs, cpu = CompileCounterWithBackend("eager"), torch.device("cpu")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    throughput.start_afresh(cpu)
    before = networks()
    with throughput.PATHS[path].operators():
        run = throughput.prepared(small_work(throughput), path, cpu)
        run()
        run()  # warns if it had to go on eagerly
    assert graphs.frame_count == 1
    assert networks() == before + 1

    del run
    throughput.start_afresh(cpu)
    assert networks() == before


def test_the_ordinary_network_is_ours_and_stays_channels_last() -> None:
    throughput = benchmark_of("throughput_paths")
    name, cpu = "non-private, eager", torch.device("cpu")
    grads = []
    for operators in (throughput.ordinary_operators, throughput.plain_operators):
        torch.manual_seed(0)
        with operators():
            grads.append(throughput.prepared(small_work(throughput), name, cpu)())
    # Float32 sums in another order, of gradients up to 1.
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    geometry = throughput.ConvGeometry(3, 2, 1, 1)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    weight, gain = torch.randn(6, 3, 3, 4), torch.ones(6)
    y = throughput.channels_last_conv2d(x, weight, gain, geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_rows_are_saved_before_a_later_path_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput = benchmark_of("throughput")
    saved = tmp_path / "throughput.json"
    first, second = throughput.SMALL[:2]

    def measure(name: str, paths: list[str], device: torch.device) -> list[Any]:
        if name == second:
            raise RuntimeError("no memory left")
        return [throughput.row_of(name, path, device, 0.1) for path in paths]

    monkeypatch.setattr(throughput, "measure_in_turn", measure)
    arguments = ["throughput", "--device", "cpu", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--work", first, second])
    with pytest.raises(RuntimeError, match="no memory left"):
        throughput.main()

    rows = json.loads(saved.read_text())["rows"]
    assert len(rows) > 1
    assert {row["work"] for row in rows} == {first}


def test_saved_rows_of_one_machine_are_drawn_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    throughput = benchmark_of("throughput")
    paths = list(throughput.PATHS)

    def save(name: str, work: str, path: str, device: str) -> str:
        row = throughput.row_of(work, path, torch.device("cpu"), 0.1)
        facts = {"device": device, "versions": {"torch": "2.11.0"}}
        (tmp_path / name).write_text(json.dumps({**facts, "rows": [row]}))
        return str(tmp_path / name)

    second = save("a", throughput.SMALL[1], paths[0], "one")
    first = throughput.SMALL[0]
    others = [save(str(at), first, paths[at], "one") for at in (1, 0)]
    drawn = tmp_path / "drawn.svg"
    arguments = ["throughput", "--plot", str(drawn), "--from", second, *others]
    monkeypatch.setattr(sys, "argv", arguments)
    throughput.main()

    _, rows = throughput.read([Path(one) for one in (second, *others)])
    assert [(row["work"], row["path"]) for row in rows] == [
        (throughput.SMALL[0], paths[0]),
        (throughput.SMALL[0], paths[1]),
        (throughput.SMALL[1], paths[0]),
    ]
    assert throughput.SMALL[1] in drawn.read_text()
    assert throughput.SMALL[1] in capsys.readouterr().out

    other = save("d", throughput.SMALL[0], paths[0], "two")
    with pytest.raises(SystemExit, match="devices or versions differ"):
        throughput.read([Path(second), Path(other)])


def test_a_profile_says_what_a_pass_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = benchmark_of("pass_profile")
    monkeypatch.setitem(passes.WORK, "wrn16-4 K=16", small_work(passes))
    saved = tmp_path / "profile.json"
    monkeypatch.setattr(sys, "argv", ["p", "--device", "cpu", "--save", str(saved)])
    passes.main()

    found = json.loads(saved.read_text())
    names = [row["name"] for row in found["kernels"]]
    assert any("convolution" in name for name in names)
    times = [row["milliseconds"] for row in found["kernels"]]
    assert times == sorted(times, reverse=True)
    whole = sum(times) + found["between_kernels"]
    assert whole == pytest.approx(found["milliseconds"])
    # Of the stem, and of two in each of three blocks, forward and backward.
    convolutions = [row for row in found["kernels"] if "conv" in row["name"]]
    assert sum(row["launches"] for row in convolutions) >= 2 * 7
    assert "between kernels" in capsys.readouterr().out
