import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, command

import dpsgd


@pytest.mark.slow
def test_the_shipped_digits_are_learned_privately(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("dpsgd-train", ROOT / "configs" / "digits.yaml", "--run-dir", run)

    assert done.returncode == 0, done.stderr
    report = json.loads((run / "report.json").read_text())
    assert 7.99 < report["epsilon"] <= 8.0
    assert report["delta"] == 1e-4
    assert not report["seeded"]
    # Unseeded: 0.961 to 0.978 in five runs.
    assert report["test_accuracy_ema"] >= 0.92


@pytest.mark.slow
def test_the_custom_loop_learns_within_its_budget() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "custom_loop.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )

    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"test accuracy (\S+), \((\S+), 0\.0001\)-DP\n", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 0.6  # unseeded; 0.1 by chance
    assert 7.9 < float(found[2]) <= 8.0


def test_the_package_offers_all_that_it_names() -> None:
    for name in dpsgd.__all__:
        assert getattr(dpsgd, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute `Opacus`"):
        dpsgd.Opacus  # noqa: B018


def test_importing_the_package_and_its_privacy_room_is_cheap() -> None:
    code = (
        "import sys, dpsgd; print(sorted({'torch', 'numpy'} & sys.modules.keys()));"
        "from dpsgd import DPSGDMechanism;"
        "print(sorted({'torch', 'sklearn', 'pyarrow'} & sys.modules.keys()));"
        "from dpsgd import *;"
        "print(sorted({'sklearn', 'pyarrow', 'torchvision'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n" * 3
