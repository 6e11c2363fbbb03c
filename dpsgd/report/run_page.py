"""The report of one run: what it guarantees, what it reached, what it cost."""

import itertools
import math

from dpsgd.report.figures import (
    accuracy_figure,
    epsilon_figure,
    loss_figure,
    outcomes_figure,
    throughput_figure,
)
from dpsgd.report.intervals import wilson_interval
from dpsgd.report.markup import Markup, element
from dpsgd.report.outcomes import Comparison
from dpsgd.report.page import (
    Drawn,
    Report,
    columns,
    details,
    draw,
    facts,
    figures,
    page,
    section,
    settings_tables,
    statement_box,
    table,
    tiles,
)
from dpsgd.report.runs import RunRecord
from dpsgd.report.statement import statement_of
from dpsgd.report.words import (
    NOT_RECORDED,
    count,
    duration,
    epsilon_in_words,
    interval_in_words,
    percent,
    significant,
    size,
)

__all__ = [
    "cost_tiles",
    "outcome_in_words",
    "outcome_parts",
    "outcomes_drawn",
    "run_report",
    "versions_table",
]

_MOST_ROWS = 20  # groups, above which the table is closed
_OUTCOMES = {"finished": "finished", "budget_spent": "stopped, budget spent"}


def run_report(run: RunRecord) -> Report:
    """Returns the report of one run."""
    curves = _curves(run)
    kinds = {"Classes": run.by_class}
    if run.by_group is not None:
        kinds["Groups"] = run.by_group
    bars = {
        heading: outcomes_drawn(heading.lower(), comparison)
        for heading, comparison in kinds.items()
    }
    outcomes = [
        section(heading, *outcome_parts(run, comparison, bars[heading]))
        for heading, comparison in kinds.items()
    ]
    body = (
        statement_box(statement_of(run)),
        section("Accuracy", _result_tiles(run)),
        section("Curves", figures(curves) or _no_curves(run)),
        *outcomes,
        section("Speed and memory", cost_tiles(run)),
        section(
            "Settings and versions",
            details("All settings", settings_tables(run.settings)),
            details("Versions", versions_table(run)),
        ),
    )
    html = page(run.name, "Training run", _subtitle(run), *body)
    return Report(html, [*curves, *itertools.chain(*bars.values())])


def outcome_in_words(run: RunRecord) -> str:
    """Returns whether, and how, a run has ended."""
    outcome = run.text("outcome") or "finished"
    return _OUTCOMES.get(outcome, outcome) if run.is_finished else "not finished"


def cost_tiles(run: RunRecord) -> Markup:
    """Returns speed, times, memory and hardware."""
    seconds, speed = run.train_seconds, run.views_per_second
    each = seconds / run.step if seconds is not None and run.step else None
    on_gpu = (run.text("device") or "cpu") != "cpu"
    memory = "of the GPU" if on_gpu else "of the process"
    threads = run.environment.get("num_threads", run.result.get("num_threads"))
    hardware = (run.text("device") or NOT_RECORDED).replace("cpu", "CPU")
    return tiles(
        [
            ("Throughput", f"{count(speed and round(speed))}", "views a second"),
            ("A step", duration(each), "with warm-up"),
            ("Time in steps", duration(seconds), None),
            ("Time in all", duration(run.number("wall_time_seconds")), None),
            ("Peak memory", size(run.number("peak_memory_bytes")), memory),
            ("Hardware", hardware, f"{threads} CPU threads" if threads else None),
        ]
    )


def outcomes_drawn(name: str, comparison: Comparison | None) -> list[Drawn]:
    """Returns the bars of classes or groups, or nothing without any."""
    kind = "class" if comparison is None else comparison.kind
    return draw(
        name,
        outcomes_figure(comparison),
        f"Test accuracy by {kind}, with 95 % intervals.",
        "Lines are 95 % intervals (Wilson) for the finite test set.",
    )


def outcome_parts(
    run: RunRecord, comparison: Comparison | None, drawn: list[Drawn]
) -> tuple[Markup, ...]:
    """Returns what is known of classes or groups: gap in words, bars, table.

    Args:
        run: The run.
        comparison: Its outcomes, or None.
        drawn: Its bars, or none.
    """
    if comparison is None:
        text = "Accuracy by class is measured when a run ends, and is not recorded."
        return (element("p", text, class_="muted"),)
    weights = "averaged" if run.keeps_average else "last"
    text = f"Of the {weights} weights. {_gap_in_words(comparison)}"
    left = figures(drawn)
    right = _outcomes_table(comparison)
    if len(comparison.ranked) > _MOST_ROWS:
        right = details(f"All {count(len(comparison.ranked))}", right)
    return (element("p", text), right if left is None else columns(left, right))


def _gap_in_words(comparison: Comparison) -> str:
    """Returns the largest gap between groups, and whether it may be chance."""
    ranked = comparison.ranked
    if len(ranked) < 2:
        return NOT_RECORDED
    best, worst = ranked[0], ranked[-1]
    text = (
        f"The largest gap is {100 * comparison.gaps['accuracy'].size:.1f} points, "
        f"between {best.name} ({percent(best.accuracy)}) and {worst.name} "
        f"({percent(worst.accuracy)})."
    )
    lower, upper = worst.interval(worst.accuracy), best.interval(best.accuracy)
    if lower is not None and upper is not None and lower[1] >= upper[0]:
        return f"{text} Their 95 % intervals overlap: it may be chance."
    return f"{text} Their 95 % intervals do not overlap."


def _outcomes_table(comparison: Comparison) -> Markup:
    """Returns the table of classes or groups, best first."""
    rows = [
        (
            one.name,
            percent(one.accuracy),
            NOT_RECORDED if interval is None else interval_in_words(interval),
            count(one.num_examples),
        )
        for one in comparison.ranked
        for interval in (one.interval(one.accuracy),)
    ]
    headings = (comparison.kind, "accuracy", "95 % interval", "examples")
    return table(headings, rows, label=f"Accuracy by {comparison.kind}")


def versions_table(run: RunRecord) -> Markup:
    """Returns what a result needs to be traced."""
    rows = [
        ("commit", run.text("commit") or NOT_RECORDED),
        ("python", run.text("python") or NOT_RECORDED),
        *run.versions.items(),
        ("CUDA", run.text("cuda") or "none"),
    ]
    return facts(rows)


def _subtitle(run: RunRecord) -> str:
    """Returns data, network and outcome in a line."""
    data = run.setting("data", "name") or run.setting("data", "source") or NOT_RECORDED
    network = run.network or NOT_RECORDED
    parameters = run.number("num_parameters")
    if parameters is not None:
        network = f"{network}, {count(parameters)} parameters"
    finished = run.text("finished_at")
    when = finished and finished[:16].replace("T", " ")
    taken = max(run.step, run.checkpoint_step or 0)
    steps = f"{count(taken)} of {count(run.planned_steps)} steps"
    parts = [data, network, outcome_in_words(run), steps, when]
    return "; ".join(str(one) for one in parts if one)


def _result_tiles(run: RunRecord) -> Markup:
    """Returns accuracies, loss and gap."""
    last = run.evaluations[-1] if run.evaluations else None
    loss, kind = (last.loss if last else None), "last weights"
    rows = [("Last weights", percent(run.accuracy), _interval(run, run.accuracy))]
    if last and run.keeps_average:
        averaged = run.accuracy_ema
        rows.insert(
            0, ("Averaged weights", percent(averaged), _interval(run, averaged))
        )
        loss, kind = last.loss_ema, "averaged weights"
    rows.append(("Test loss", significant(loss, 4), kind))
    for heading, comparison in (("class", run.by_class), ("group", run.by_group)):
        if comparison is not None and len(comparison.ranked) > 1:
            gap = f"{100 * comparison.gaps['accuracy'].size:.1f} points"
            best, *_, worst = comparison.ranked
            note = f"between {best.name} and {worst.name}"
            rows.append((f"Largest {heading} gap", gap, note))
    rows.append(("Epsilon", epsilon_in_words(run.epsilon), _delta(run)))
    return tiles(rows)


def _interval(run: RunRecord, accuracy: float | None) -> str | None:
    """Returns the interval of an accuracy in words, if the test set was counted."""
    total = run.num_test_examples
    if accuracy is None or total is None:
        return None
    return f"95 % interval {interval_in_words(wilson_interval(accuracy, total))}"


def _delta(run: RunRecord) -> str | None:
    """Returns delta, and what epsilon is; nothing beside an infinite one."""
    if run.epsilon == math.inf:
        return None
    text = f"upper bound; delta {significant(run.number('delta'))}"
    if run.is_finished or run.epsilon is None:
        return text
    return f"{text}; at the last evaluation, step {count(run.step)}"


def _curves(run: RunRecord) -> list[Drawn]:
    """Returns what happened over the steps."""
    return [
        *draw(
            "accuracy",
            accuracy_figure([run]),
            "Test accuracy over steps, of the averaged and of the last weights.",
        ),
        *draw("loss", loss_figure([run]), "Test loss over steps, of the same weights."),
        *draw(
            "epsilon",
            epsilon_figure([run]),
            "Upper bound on epsilon over steps.",
            "Certified at the steps that were evaluated; between two of them the "
            "later one is the bound.",
        ),
        *draw(
            "throughput",
            throughput_figure([run]),
            "Views a second over steps.",
            "Mean since the start, of expected views, without warm-up.",
        ),
    ]


def _no_curves(run: RunRecord) -> Markup:
    """Returns why nothing is drawn."""
    planned = run.setting("eval", "every")
    every = f"; one is due every {planned} steps" if planned else ""
    return element("p", f"There is no evaluation yet{every}.", class_="muted")
