"""The benchmarks of kernels run where there is no GPU, too."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from small_runs import ROOT


def test_every_operator_is_timed_and_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("benchmarks_of_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    saved = tmp_path / "kernels.json"
    arguments = [str(path), "--device", "cpu", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()

    rows = json.loads(saved.read_text())["rows"]
    assert [row["operator"] for row in rows] == list(benchmark.CASES)
    shown = capsys.readouterr().out
    for row in rows:
        assert row["operator"] in shown
        assert row["milliseconds"] > 0
        # Float32 sums of some hundred terms, and normals of float32 angles.
        assert row["error"] < 5e-6
