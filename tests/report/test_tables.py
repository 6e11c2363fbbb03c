import io

from rich.console import Console
from rich.table import Table

from dpsgd.privacy import rounded_up
from dpsgd.report import facts_table, guarantee_in_words, result_table


def shown(table: Table) -> list[list[str]]:
    stream = io.StringIO()
    Console(file=stream, width=100, markup=False).print(table)
    rows = [line.strip("│┃ ") for line in stream.getvalue().splitlines()]
    return [[cell.strip() for cell in row.replace("┃", "│").split("│")] for row in rows]


def test_plan_rows_are_shown_as_they_are() -> None:
    rows = shown(facts_table([("steps", "10"), ("path", "a[b]c")], title="Plan"))

    assert ["Plan"] in rows
    assert ["steps", "10"] in rows
    assert ["path", "a[b]c"] in rows


def test_results_are_accuracies_in_per_cent_and_a_loss() -> None:
    measures = {"top-1": 0.98765, "loss": 0.98765}
    table = result_table({"last": measures, "ema": {"top-1": 1, "loss": 0}})
    rows = shown(table)

    assert ["test set", "last", "ema"] in rows
    assert ["top-1", "98.77%", "100.00%"] in rows
    assert ["loss", "0.9877", "0.0000"] in rows


def test_a_guarantee_names_its_unit_and_its_absence() -> None:
    facts = {"epsilon": 2.00001, "delta": 1e-5, "unit": "example"}

    assert guarantee_in_words(facts) == "(2.0001, 1e-05)-DP per example"
    assert guarantee_in_words({**facts, "epsilon": None}) == "NO privacy guarantee"
    assert guarantee_in_words({**facts, "seeded": True}).endswith(
        "-DP per example, but seeded: NOT to be released as private"
    )


def test_bounds_are_rounded_up_and_never_down() -> None:
    assert rounded_up(0.00001) == "0.0001"
    assert rounded_up(2.9999) == "2.9999"
    assert rounded_up(0.2001, 3) == "0.201"
    assert rounded_up(float("inf")) == "inf"
