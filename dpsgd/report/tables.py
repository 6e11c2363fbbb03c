"""What a run says in the terminal, as rich tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from dpsgd.privacy import rounded_up

__all__ = ["facts_table", "guarantee_in_words", "result_table"]


def facts_table(rows: Sequence[tuple[str, str]], *, title: str) -> Table:
    """Returns a table of names and values, as a plan or a result has them.

    Args:
        rows: (name, value) in words.
        title: Heading.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def result_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns a table with a column for each kind of weights.

    It has no title, which would be cut where the terminal ends, and a guarantee must
    never be: print that before, as a line.

    Args:
        results: Measures by kind of weights: accuracies in [0, 1], loss in nats.
    """
    table = Table()
    table.add_column("test set", style="bold")
    for weights in results:
        table.add_column(weights, justify="right")
    measures = next(iter(results.values()))
    for measure in measures:
        values = [_shown(measure, result[measure]) for result in results.values()]
        table.add_row(measure, *values)
    return table


def guarantee_in_words(facts: Mapping[str, Any]) -> str:
    """Returns the guarantee that a report or released weights state.

    Args:
        facts: `epsilon`, an upper bound or None for no guarantee; `delta`; `unit`;
            `seeded`, False where it is missing.

    >>> guarantee_in_words({"epsilon": 7.99991, "delta": 1e-5, "unit": "user"})
    '(8.0000, 1e-05)-DP per user'
    """
    if facts["epsilon"] is None:
        return "NO privacy guarantee"
    epsilon = rounded_up(facts["epsilon"])
    guarantee = f"({epsilon}, {facts['delta']:g})-DP per {facts['unit']}"
    if facts.get("seeded"):
        guarantee += ", but seeded: NOT to be released as private"
    return guarantee


def _shown(measure: str, value: float) -> str:
    """Returns a loss as a number, an accuracy in per cent."""
    return f"{value:.4f}" if measure == "loss" else f"{value:.2%}"
