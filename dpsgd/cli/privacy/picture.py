"""The picture of a plan: noise on the averaged gradient against compute."""

from collections.abc import Sequence
from io import BytesIO
from itertools import groupby

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dpsgd.privacy.planner import Budget, PlannedRun

__all__ = ["draw"]


def draw(budget: Budget, runs: Sequence[PlannedRun]) -> bytes:
    """Returns a PNG: a line for each batch size, the noise multiplier at each run.

    Args:
        budget: What all runs spend.
        runs: Sorted by batch size, then by steps.
    """
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = [
        list(group) for _, group in groupby(runs, key=lambda r: r.expected_batch_size)
    ]
    colors = colormaps["viridis"]
    for index, line in enumerate(lines):
        axes.loglog(
            [run.epochs for run in line],
            [run.noise_per_coordinate for run in line],
            marker="o",
            markersize=4,
            color=colors(0.9 * index / max(1, len(lines) - 1)),
            label=f"{line[0].expected_batch_size:,g}",
        )
    for run in runs:
        axes.annotate(
            f"{run.noise_multiplier:.3g}",
            (run.epochs, run.noise_per_coordinate),
            xytext=(-5, 4),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color="0.35",
        )
    axes.set_xlabel("compute: epochs (examples processed / training set)")
    axes.set_ylabel("noise a coordinate of the averaged gradient")
    axes.set_title(
        f"Noise that ({budget.target_epsilon:g}, {budget.delta:g})-DP asks for, "
        f"{budget.num_examples:,} examples\n(at each point: noise multiplier)",
        fontsize=11,
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda epochs, _: f"{epochs:g}"))
    axes.margins(x=0.12)
    axes.grid(which="both", linewidth=0.3, alpha=0.5)
    axes.legend(title="expected batch")
    content = BytesIO()
    figure.savefig(content, dpi=150, format="png")
    return content.getvalue()
