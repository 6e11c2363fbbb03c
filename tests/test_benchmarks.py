"""The benchmarks run where there is no GPU, too."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from made_up_runs import result, write_run
from small_runs import ROOT, benchmark_of


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
