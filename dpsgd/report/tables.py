"""What a run says in the terminal, as rich tables."""

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

__all__ = ["per_class_table", "plan_table", "result_table"]


def plan_table(rows: Sequence[tuple[str, str]], *, title: str) -> Table:
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


def result_table(results: Mapping[str, Mapping[str, float]], *, title: str) -> Table:
    """Returns a table with a column for each kind of weights.

    Args:
        results: Measures by kind of weights: accuracies in [0, 1], loss in nats.
        title: Heading.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("test set", style="bold")
    for weights in results:
        table.add_column(weights, justify="right")
    measures = next(iter(results.values()))
    for measure in measures:
        values = [_shown(measure, result[measure]) for result in results.values()]
        table.add_row(measure, *values)
    return table


def per_class_table(per_class_accuracy: Mapping[str, float | None]) -> Table:
    """Returns a table of class accuracies, with their largest gap.

    Args:
        per_class_accuracy: Accuracy in [0, 1] by class; None or NaN where there was
            no example.
    """
    table = Table(title="Accuracy by class", title_justify="left")
    table.add_column("class", style="bold")
    table.add_column("top-1", justify="right")
    known = {
        name: accuracy
        for name, accuracy in per_class_accuracy.items()
        if accuracy is not None and not math.isnan(accuracy)
    }
    for name in per_class_accuracy:
        table.add_row(name, f"{known[name]:.2%}" if name in known else "no examples")
    if known:
        best, worst = (
            max(known, key=known.__getitem__),
            min(known, key=known.__getitem__),
        )
        table.add_section()
        gap = known[best] - known[worst]
        between = f" ({best} - {worst})" if gap else ""
        table.add_row(f"largest gap{between}", f"{gap:.2%}")
    return table


def _shown(measure: str, value: float) -> str:
    """Returns a loss as a number, an accuracy in per cent."""
    return f"{value:.4f}" if measure == "loss" else f"{value:.2%}"
