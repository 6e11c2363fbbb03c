"""That the accounts agree: with dp-accounting now, and in the committed table."""

import json
import random

import pytest
from small_runs import ROOT, benchmark_of

from dpsgd.privacy import (
    Phase,
    PLDAccountant,
    PRVAccountant,
    RDPAccountant,
    estimate_epsilon,
)
from dpsgd.privacy.gdp import gdp_epsilon

RESULTS = ROOT / "benchmarks" / "results"

accountants = benchmark_of("accountants")
TABLE = json.loads((RESULTS / "accountants.json").read_text())["rows"]
CALIBRATED = json.loads((RESULTS / "accounting_cpu.json").read_text())


@pytest.mark.parametrize(
    ("phases", "delta"),
    [
        ([Phase(4096 / 50_000, 3.0, 2468)], 1e-5),
        ([Phase(0.5, 10.0, 100)], 1e-8),
        ([Phase(0.01, 0.5, 100)], 1e-6),
        ([Phase(1e-3, 0.7, 10)], 1e-8),
        ([Phase(1.0, 3.0, 20)], 1e-8),
        ([Phase(0.2, 5.0, 50), Phase(0.1, 2.0, 30), Phase(1.0, 20.0, 4)], 1e-5),
    ],
)
def test_ours_agree_with_dp_accounting_in_both_directions(phases, delta):
    row = accountants.ours(phases, delta)
    row["peer"] = accountants.theirs(phases, delta)
    assert accountants.trusted(row)
    assert accountants.faults(row) == []


def test_the_committed_table_has_the_settings_of_its_script():
    found = [(accountants.phases_of(row), row["delta"]) for row in TABLE]
    assert found == accountants.settings()
    assert len(found) >= 60


@pytest.mark.parametrize("row", TABLE, ids=lambda row: accountants.name_of(row))
def test_every_row_of_the_committed_table_holds(row):
    assert accountants.faults(row) == []


def test_the_committed_table_is_monotone_in_rate_steps_noise_and_delta():
    assert accountants.disorder(TABLE) == []


def test_the_documentation_quotes_the_committed_table():
    text = (ROOT / "docs" / "accounting.md").read_text()
    assert "\n".join(accountants.overview(TABLE)) in text


def test_the_checks_of_the_table_find_what_is_wrong():
    row = json.loads(json.dumps(TABLE[0]))
    row["prv"]["upper"] = 0.9 * row["estimate"]
    assert any(
        "no bound is below the estimate" in fault for fault in accountants.faults(row)
    )
    # Beside a bound there is room for what its lattice leaves, beside a contour none.
    row["prv"]["upper"] = (1 - 1e-5) * row["estimate"]
    assert len(accountants.faults(row)) == 1
    assert accountants.faults({**row, "settled": False}) == []
    row["prv"]["upper"] = 1.1 * row["peer"]["rdp"]
    assert any("looser than Renyi's" in fault for fault in accountants.faults(row))
    more = {**TABLE[0], "delta": TABLE[0]["delta"] / 2}
    less = {**more, "estimate": more["estimate"] * 0.9}
    assert accountants.disorder([TABLE[0], more]) == []
    assert len(accountants.disorder([TABLE[0], less])) == 1


# Another processor rounds another way, and FFTs of a million nodes with it.
SAME = {"rel": 1e-6, "abs": 1e-12}


@pytest.mark.parametrize("row", random.Random(7).sample(TABLE, 5))
def test_rows_drawn_at_random_come_out_the_same_again(row):
    phases, delta = accountants.phases_of(row), row["delta"]
    pld = PLDAccountant().epsilon(phases, delta).upper
    assert pld == pytest.approx(row["pld"]["upper"], **SAME)
    assert estimate_epsilon(phases, delta) == pytest.approx(row["estimate"], **SAME)
    rdp = RDPAccountant().epsilon(phases, delta).upper
    assert rdp == pytest.approx(row["rdp"], **SAME)
    assert gdp_epsilon(phases, delta) == pytest.approx(row["gdp"], **SAME)


def test_the_quickest_certificate_of_the_table_comes_out_the_same_again():
    subsampled = [row for row in TABLE if row["prv"]["seconds"] > 0.5]
    row = min(subsampled, key=lambda row: row["prv"]["seconds"])
    bound = PRVAccountant().epsilon(accountants.phases_of(row), row["delta"])
    assert bound.lower == pytest.approx(row["prv"]["lower"], **SAME)
    assert bound.upper == pytest.approx(row["prv"]["upper"], **SAME)


def test_every_published_setting_was_calibrated_tightly_and_within_the_target():
    for row in CALIBRATED["rows"]:
        assert 0 <= row["over_exact"] < 3e-3, row["setting"]
        assert row["epsilon"] <= row["target_epsilon"], row["setting"]
        assert row["seconds"] < 10, row["setting"]
        assert row["estimate_seconds"] < 0.2, row["setting"]
        assert row["certificates"] <= 2, row["setting"]
