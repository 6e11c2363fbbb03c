import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpsgd.cli.privacy import main

BIN = Path(__file__).resolve().parents[2] / "bin" / "dpsgd-privacy"
KEYS = [
    "epsilon_lower",
    "epsilon_estimate",
    "epsilon_upper",
    "noise_multiplier",
    "num_steps",
    "sample_rate",
    "delta",
    "accountant",
]
ONE_STEP = "epsilon --sample-rate 0.01 --noise-multiplier 1 --num-steps 1 --delta 1e-5"


def run_json(capsys, line):
    assert main([*line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_epsilon_is_printed_as_json_with_exactly_the_documented_keys(capsys):
    report = run_json(capsys, ONE_STEP)
    assert list(report) == KEYS
    # Closed form of a single step: 0.199450.
    assert report["epsilon_lower"] <= 0.199450 <= report["epsilon_upper"] < 0.1998
    assert report["epsilon_estimate"] == pytest.approx(0.199450, abs=1e-6)
    assert report["accountant"] == "prv"


def test_the_rate_may_be_given_by_two_sizes(capsys):
    line = ONE_STEP.replace(
        "--sample-rate 0.01", "--expected-batch-size 600 --num-examples 60000"
    )
    assert run_json(capsys, line) == run_json(capsys, ONE_STEP)


def test_calibrated_noise_keeps_the_target(capsys):
    report = run_json(
        capsys,
        "calibrate --target-epsilon 4.377178096 --sample-rate 1 --num-steps 9 "
        "--delta 1e-5",
    )
    # Nine full batches of noise 3 are one of noise 1, whose epsilon is 4.377178.
    assert 3.0 <= report["noise_multiplier"] <= 3.0 * (1 + 5e-6)
    assert 4.377 < report["epsilon_upper"] <= 4.377178096
    assert report["num_steps"] == 9


def test_calibrated_steps_keep_the_target(capsys):
    report = run_json(
        capsys,
        "calibrate --target-epsilon 1 --sample-rate 1 --noise-multiplier 20 "
        "--delta 1e-5",
    )
    assert report["epsilon_upper"] <= 1.0
    assert report["num_steps"] > 10


def test_a_target_below_one_step_says_so_and_takes_none(capsys):
    line = "calibrate --target-epsilon .1 --sample-rate .1 --noise-multiplier .3"
    assert main([*line.split(), "--delta", "1e-5", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["num_steps"] == 0
    assert printed.err.startswith("target_epsilon=0.1: is less than a single step")


def test_infinity_is_a_string_in_json(capsys):
    report = run_json(
        capsys, ONE_STEP.replace("--noise-multiplier 1", "--noise-multiplier 0")
    )
    assert report["epsilon_upper"] == "inf"


def test_a_table_is_printed_without_json(capsys):
    assert main(ONE_STEP.split()) == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in KEYS)
    assert "0.19945" in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ONE_STEP.replace("0.01", "1.5"), "sample_rate=1.5: must be in (0, 1]; "),
        (ONE_STEP.replace("0.01", "0"), "sample_rate=0.0: must be in (0, 1]; "),
        (ONE_STEP.replace("0.01", "nan"), "sample_rate=nan: must be in (0, 1]; "),
        (ONE_STEP.replace("0.01", "x"), "sample_rate=x: must be a number; "),
        (ONE_STEP.replace("1e-5", "1"), "delta=1.0: must be in (0, 1); "),
        (ONE_STEP.replace("1e-5", "1e-20"), "delta=1e-20: must be at least 1e-14"),
        (ONE_STEP.replace("r 1", "r -1"), "noise_multiplier=-1.0: must be at least 0"),
        (ONE_STEP.replace("s 1", "s 1.5"), "num_steps=1.5: must be a whole number; "),
        (ONE_STEP.replace("s 1", "s -1"), "num_steps=-1: must be a whole number"),
        (
            ONE_STEP + " --accountant dp",
            "accountant=dp: is not known; did you mean",
        ),
        (ONE_STEP + " --num-examples 5", "sample_rate=0.01: is given twice"),
        (ONE_STEP.replace("--sample-rate 0.01", ""), "sample_rate=null: is needed; "),
        (
            ONE_STEP.replace(
                "--sample-rate 0.01", "--expected-batch-size 5 --num-examples 0"
            ),
            "num_examples=0: must be at least 1; ",
        ),
        (
            "calibrate --target-epsilon 0 --sample-rate .1 --num-steps 5 --delta 1e-5",
            "target_epsilon=0.0: must be above 0 and finite; ",
        ),
        ("", "dpsgd-privacy: the following arguments are required: command; "),
        ("epsilon --bogus", "dpsgd-privacy epsilon: the following arguments"),
        (ONE_STEP + " --bogus", "dpsgd-privacy: unrecognized arguments: --bogus; "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, line, message):
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_the_script_runs_from_any_directory(tmp_path):
    assert os.access(BIN, os.X_OK)
    done = subprocess.run(
        [sys.executable, BIN, *ONE_STEP.split(), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(json.loads(done.stdout)) == KEYS
