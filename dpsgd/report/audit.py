"""What an audit says: a table for the terminal, a picture for a report."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from dpsgd.privacy import AuditResult, CanaryResult, rounded_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["audit_table", "save_audit_plot"]

_IN, _OUT, _CLAIM = "#0072b2", "#d55e00", "#333333"  # told apart by all eyes
_BINS = 25
_SEEN_BY = {"gradients": "white box", "images": "black box"}
_SCORES = {
    "gradients": "released along the canary's gradient",
    "images": "fall of the canary's loss",
}


def audit_table(result: AuditResult) -> Table:
    """Returns lower bounds by kind of canary, under the claim.

    Args:
        result: What was found.
    """
    claim = "nothing is claimed"
    if np.isfinite(result.epsilon):
        claim = f"claimed: ({rounded_up(result.epsilon)}, {result.delta:g})-DP"
    table = Table(title=f"Audit, {claim}", title_justify="left")
    table.add_column("canaries", style="bold")
    for name in ("in", "out", "guessed right", "epsilon >=", "if Gaussian"):
        table.add_column(name, justify="right")
    for kind, found in result.canaries.items():
        num_in = int(found.is_in.sum())
        table.add_row(
            f"{kind} ({_SEEN_BY[kind]})",
            f"{num_in:,}",
            f"{len(found.is_in) - num_in:,}",
            f"{found.guesses.num_correct:,} of {found.guesses.num_guesses:,}",
            f"{found.epsilon_lower_bound:.4f}",
            f"{found.epsilon_if_gaussian:.4f}",
        )
    return table


def save_audit_plot(path: Path, result: AuditResult) -> None:
    """Draws the scores of every kind, and the bounds beside the claim, as a PNG.

    Args:
        path: Where it is written.
        result: What was found.
    """
    # Imported here: a command that draws nothing need not wait a second for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_panels = len(result.canaries) + 1
    figure = Figure(figsize=(4 * num_panels, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    *histograms, bars = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes, (kind, found) in zip(histograms, result.canaries.items(), strict=True):
        axes.set_title(f"{kind} ({_SEEN_BY[kind]})")
        _draw_scores(axes, found)
        axes.set_xlabel(_SCORES[kind])
    _draw_bounds(bars, result)
    figure.savefig(path, dpi=100)


def _draw_scores(axes: "Axes", found: CanaryResult) -> None:
    """Draws the scores of those in and those out over each other."""
    edges = np.histogram_bin_edges(found.scores, _BINS).tolist()
    for name, kept, colour in (("out", ~found.is_in, _OUT), ("in", found.is_in, _IN)):
        axes.hist(found.scores[kept], edges, color=colour, alpha=0.55, label=name)
    axes.set_ylabel("canaries")
    axes.legend(frameon=False)


def _draw_bounds(axes: "Axes", result: AuditResult) -> None:
    """Draws lower bounds as bars, and the claim as the line they stay below."""
    bars = {}
    for kind, found in result.canaries.items():
        bars[kind] = found.epsilon_lower_bound
        bars[f"{kind},\nif Gaussian"] = found.epsilon_if_gaussian
    drawn = axes.barh([*bars][::-1], [*bars.values()][::-1], color=_IN)
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    largest = max(bars.values())
    if np.isfinite(result.epsilon):
        axes.axvline(result.epsilon, color=_CLAIM, linestyle="--", label="claim")
        axes.legend(frameon=False)
        largest = max(largest, result.epsilon)
    axes.set(title="lower bounds", xlabel="epsilon", xlim=(0, 1.1 * largest))
