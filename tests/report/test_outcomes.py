import math

import pytest
from scipy import stats
from test_tables import shown

from dpsgd.report import compare, comparison_table

COUNTS = {"cat": 40, "[dog]": 10, "owl": 0}
ACCURACY = {"cat": 0.9, "[dog]": 0.3, "owl": math.nan}
TWIN = {"cat": 0.95, "[dog]": 0.8, "owl": math.nan}


def test_outcomes_add_up_to_all_examples() -> None:
    compared = compare("class", ACCURACY, num_examples=COUNTS, twin_accuracy=TWIN)
    cat, dog, owl = compared.groups

    assert (cat.num_right, cat.twin_right, dog.num_right, dog.twin_right) == (
        36,
        38,
        3,
        8,
    )
    assert compared.overall.num_examples == 50
    assert compared.overall.accuracy == 39 / 50
    assert compared.overall.twin_accuracy == 46 / 50
    assert compared.overall.change == pytest.approx(-7 / 50)
    assert owl.accuracy is owl.change is owl.interval(owl.accuracy) is None


@pytest.mark.parametrize(("right", "count"), [(36, 40), (0, 10), (10, 10), (1, 3)])
def test_intervals_are_the_wilson_intervals_of_scipy(right: int, count: int) -> None:
    compared = compare("class", {"a": right / count}, num_examples={"a": count})
    (outcome,) = compared.groups
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")

    assert outcome.interval(outcome.accuracy) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_the_largest_gaps_name_both_ends_and_leave_out_what_has_no_examples() -> None:
    gaps = compare("class", ACCURACY, num_examples=COUNTS, twin_accuracy=TWIN).gaps

    assert list(gaps) == ["accuracy", "twin_accuracy", "change"]
    assert str(gaps["accuracy"]) == "60.0 (cat - [dog])"
    assert str(gaps["twin_accuracy"]) == "15.0 (cat - [dog])"
    assert str(gaps["change"]) == "45.0 (cat - [dog])"  # -5 less -50
    alone = compare("class", ACCURACY, num_examples=COUNTS).gaps
    assert list(alone) == ["accuracy"]
    assert alone["accuracy"] == gaps["accuracy"]


def test_a_table_shows_counts_accuracies_intervals_and_gaps() -> None:
    compared = compare("age", ACCURACY, num_examples=COUNTS, twin_accuracy=TWIN)
    rows = shown(comparison_table(compared))

    assert ["Accuracy by age, %"] in rows
    assert ["age", "count", "accuracy", "twin", "change"] in rows
    assert ["cat", "40", "90.0 (76.9-96.0)", "95.0 (83.5-98.6)", "-5.0"] in rows
    assert ["[dog]", "10", "30.0 (10.8-60.3)", "80.0 (49.0-94.3)", "-50.0"] in rows
    assert ["owl", "0", "no examples", "no examples"] in rows
    assert ["all", "50", "78.0 (64.8-87.2)", "92.0 (81.2-96.8)", "-14.0"] in rows
    gaps = ["60.0 (cat - [dog])", "15.0 (cat - [dog])", "45.0 (cat - [dog])"]
    assert ["largest gap", "", *gaps] in rows
    assert "one in twenty misses by chance" in " ".join(map(str, rows))


def test_without_a_twin_there_are_no_columns_for_it() -> None:
    rows = shown(comparison_table(compare("class", ACCURACY, num_examples=COUNTS)))

    assert ["class", "count", "accuracy"] in rows
    assert ["largest gap", "", "60.0 (cat - [dog])"] in rows


def test_equal_groups_have_no_gap_between_two_of_them() -> None:
    rows = shown(
        comparison_table(
            compare("class", {"a": 1, "b": 1}, num_examples={"a": 2, "b": 3})
        )
    )

    assert ["largest gap", "", "0.0"] in rows


def test_json_has_the_same_figures() -> None:
    compared = compare("age", ACCURACY, num_examples=COUNTS, twin_accuracy=TWIN)
    facts = compared.to_dict()

    assert facts["kind"] == "age"
    assert facts["confidence"] == 0.95
    dog = facts["groups"][1]
    assert dog["name"] == "[dog]"
    assert (dog["accuracy"], dog["twin_accuracy"], dog["num_examples"]) == (
        0.3,
        0.8,
        10,
    )
    assert dog["change"] == pytest.approx(-0.5)
    assert dog["interval"] == pytest.approx((0.108, 0.603), abs=1e-3)
    assert facts["all"]["num_examples"] == 50
    assert facts["largest_gaps"]["accuracy"] == {
        "size": pytest.approx(0.6),
        "highest": "cat",
        "lowest": "[dog]",
    }
    assert "change" not in compare("a", ACCURACY, num_examples=COUNTS).overall.to_dict()
