import json
from pathlib import Path

import pytest

from dpsgd.cli.privacy import main

PLAN = (
    "plan --target-epsilon 8 --delta 1e-5 --num-examples 50000 "
    "--batch-sizes 16384 4096 --num-steps 200 100"
)
FAST = PLAN + " --accountant rdp"


def test_json_tells_the_budget_and_a_run_for_each_size_and_length(capsys):
    assert main([*FAST.split(), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    runs = report.pop("runs")
    assert report == {
        "target_epsilon": 8.0,
        "delta": 1e-5,
        "num_examples": 50_000,
        "clipping_norm": 1.0,
        "accountant": "rdp",
    }
    chosen = [(run["expected_batch_size"], run["num_steps"]) for run in runs]
    assert chosen == [(4096, 100), (4096, 200), (16384, 100), (16384, 200)]
    assert all(7.9 < run["epsilon"] <= 8 for run in runs)
    for run in runs:
        share = run["noise_multiplier"] / run["expected_batch_size"]
        assert run["noise_per_coordinate"] == pytest.approx(share)


def test_a_table_says_what_certifies_it(capsys):
    assert main(PLAN.split()) == 0
    printed = capsys.readouterr().out
    assert "every row is certified by pld" in " ".join(printed.split())
    assert "4,096" in printed
    assert printed.count("8.0000") == 4


def test_without_steps_five_numbers_of_epochs_are_planned(capsys):
    line = FAST.replace("16384 ", "").replace("--num-steps 200 100", "--json")
    assert main(line.split()) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    epochs = [run["epochs"] for run in runs]
    # To the nearest step, of which an epoch has 12.2.
    assert epochs == pytest.approx([10, 30, 100, 300, 1000], abs=0.05)


def test_epochs_may_be_chosen(capsys):
    line = FAST.replace("--num-steps 200 100", "--epochs 3 --json")
    assert main(line.split()) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["num_steps"] for run in runs] == [37, 9]


def test_a_picture_is_drawn_once_and_nothing_is_overwritten(capsys, tmp_path):
    path = tmp_path / "plan.png"
    assert main([*FAST.split(), "--plot", str(path)]) == 0
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000  # lines, labels and numbers; a blank one is 5 kB
    assert main([*FAST.split(), "--plot", str(path)]) == 2
    assert "plan.png: exists already; take another name" in capsys.readouterr().err
    assert path.read_bytes() == picture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("16384 4096", "60000"),
            "batch_sizes=60000.0: the sample rate would pass",
        ),
        (("16384 4096", "0"), "batch_sizes=0.0: must be above 0 and finite; "),
        (("16384 4096", "x"), "batch_sizes=x: must be a number; "),
        (("200 100", "0"), "num_steps=0: must be at least 1; "),
        (("200 100", "1.5"), "num_steps=1.5: must be a whole number; "),
        (("--num-steps 200 100", "--epochs -1"), "epochs=-1.0: must be above 0 and"),
        (("50000", "0"), "num_examples=0: must be at least 1; "),
        (("1e-5", "1e-4"), "delta=0.0001: must be below 1/num_examples (2.0e-05); "),
        (("n 8", "n 0"), "target_epsilon=0.0: must be above 0 and finite; "),
        (("rdp", "gdp"), "accountant=gdp: is not known; "),
        (("200 100", "9 --clipping-norm 0"), "clipping_norm=0.0: must be above 0 and"),
        (("200 100", "9 --plot a.pdf"), "plot=a.pdf: must end in .png; rename it"),
        (("200 100", "9 --plot no/a.png"), "plot=no/a.png: has no folder; create"),
        (("200 100", "9 --epochs 9"), "dpsgd-privacy plan: argument --epochs: not all"),
        (
            ("--batch-sizes 16384 4096", ""),
            "dpsgd-privacy plan: the following arg",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, change, message):
    assert main(FAST.replace(*change).split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_a_picture_that_cannot_be_written_leaves_nothing(capsys, tmp_path, monkeypatch):
    path = tmp_path / "plan.png"
    real = Path.open

    def full(self, mode):
        real(self, mode).close()
        return real(Path("/dev/full"), "wb", buffering=0)

    monkeypatch.setattr(Path, "open", full)
    assert main([*FAST.split(), "--plot", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"plot={path}: cannot be written (No space left on device);")
    assert list(tmp_path.iterdir()) == []
