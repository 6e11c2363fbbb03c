import json

import pytest
from small_runs import remembering, write_config

from dpsgd.cli.privacy import main

FULL = "compare --sample-rate 1 --noise-multiplier 2 --num-steps 4 --delta 1e-5"
METHODS = ["prv", "pld", "rdp", "estimate", "gdp", "dp-accounting"]


def test_a_table_has_a_row_for_every_account(capsys):
    assert main(FULL.split()) == 0
    printed = capsys.readouterr().out
    assert all(method in printed for method in METHODS)
    assert "4.377179" in printed  # rounded up: it is promised
    assert "upper bound" in printed
    assert "Only an upper bound may be promised" in printed


def test_json_tells_the_run_and_every_account(capsys):
    assert main([*FULL.split(), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [*report] == [
        "sample_rate",
        "noise_multiplier",
        "num_steps",
        "delta",
        "accounts",
    ]
    assert [account["method"] for account in report["accounts"]] == METHODS
    for account in report["accounts"]:
        keys = ["method", "epsilon_lower", "epsilon", "kind", "seconds"]
        assert [*account] == keys
    # The analytic Gaussian mechanism; Renyi orders leave 8 %.
    epsilons = {a["method"]: a["epsilon"] for a in report["accounts"]}
    assert epsilons.pop("rdp") == pytest.approx(4.7284, abs=1e-4)
    assert [*epsilons.values()] == pytest.approx([4.377178] * 5, abs=1e-6)


def test_infinity_is_a_string_in_json(capsys):
    line = FULL.replace("--noise-multiplier 2", "--noise-multiplier 0")
    assert main([*line.split(), "--json"]) == 0
    accounts = json.loads(capsys.readouterr().out)["accounts"]
    assert {account["epsilon"] for account in accounts} == {"inf"}


def test_the_run_may_be_a_configuration_file_with_changes(capsys, tmp_path):
    config = write_config(tmp_path)
    with remembering():
        line = ["compare", config, "--set", "privacy.noise_multiplier=30", "--json"]
        assert main(line) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sample_rate"] == 16 / 1437
    assert report["noise_multiplier"] == 30.0
    assert report["num_steps"] == 4
    assert report["delta"] == 1e-4
    assert all(a["epsilon"] is not None for a in report["accounts"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (FULL.replace("--delta 1e-5", ""), "delta=null: is needed; give --delta, or"),
        (FULL.replace("--num-steps 4", ""), "num_steps=null: is needed; give --num-s"),
        (FULL.replace("--sample-rate 1", ""), "sample_rate=null: is needed; "),
        (FULL.replace("1e-5", "2"), "delta=2.0: must be in (0, 1); "),
        (FULL + " --set a.b=1", "set=a.b=1: changes a configuration file; "),
        (FULL + " nothing.yaml", "noise_multiplier=2: is given twice: "),
        ("compare nothing.yaml", "nothing.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, line, message):
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
