"""The report of several runs side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpsgd.errors import ConfigError, fault
from dpsgd.report.figures import (
    accuracy_figure,
    epsilon_figure,
    loss_figure,
    throughput_figure,
    utility_figure,
)
from dpsgd.report.markup import Markup, element
from dpsgd.report.page import (
    Drawn,
    Report,
    details,
    draw,
    figures,
    page,
    section,
    settings_tables,
    statement_box,
    table,
)
from dpsgd.report.run_page import (
    cost_tiles,
    outcome_in_words,
    outcome_parts,
    outcomes_drawn,
    versions_table,
)
from dpsgd.report.runs import RunRecord
from dpsgd.report.statement import joint_epsilon, statement_of
from dpsgd.report.words import (
    NONE,
    NOT_RECORDED,
    count,
    duration,
    epsilon_in_words,
    percent,
    setting_in_words,
    significant,
    size,
    steps_in_words,
)

__all__ = ["comparison_report"]


def comparison_report(runs: Sequence[RunRecord]) -> Report:
    """Returns the report of several runs.

    Args:
        runs: Two or more, of different folders.

    Raises:
        ConfigError: A run is given twice.
    """
    runs = _told_apart(runs)
    curves = _figures(runs)
    body = (
        section("Privacy", _privacy_table(runs), _joint_statement(runs)),
        section("Results", _results_table(runs)),
        section("Curves", _or_nothing(curves)),
        section("Speed and memory", _cost_table(runs)),
        section("What the runs have set differently", _differing_settings(runs)),
        section("Each run", *map(_one_run, range(len(runs)), runs)),
    )
    names = ", ".join(run.name for run in runs)
    html = page(f"Comparison of {len(runs)} runs", "Training runs", names, *body)
    return Report(html, curves)


def _told_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the runs under different names: whole paths where folders share one.

    Raises:
        ConfigError: A run is given twice.
    """
    paths = [run.path.resolve() for run in runs]
    for path, run in zip(paths, runs, strict=True):
        if paths.count(path) > 1:
            raise ConfigError(
                fault("run_dir", run.path, "is given twice", "give each run once")
            )
    names = [run.name for run in runs]
    return [
        replace(run, name=str(run.path)) if names.count(run.name) > 1 else run
        for run in runs
    ]


def _figures(runs: Sequence[RunRecord]) -> list[Drawn]:
    """Returns the curves of several runs, each drawn in its own colour."""
    note = "Averaged weights where a run keeps them, else the last ones."
    return [
        *draw(
            "accuracy", accuracy_figure(runs), "Test accuracy of runs over steps.", note
        ),
        *draw("loss", loss_figure(runs), "Test loss of runs over steps.", note),
        *draw("epsilon", epsilon_figure(runs), "Epsilon of runs over steps."),
        *draw(
            "utility",
            utility_figure(runs),
            "Test accuracy of runs over the epsilon spent.",
            note,
        ),
        *draw(
            "throughput", throughput_figure(runs), "Views a second of runs over steps."
        ),
    ]


def _joint_statement(runs: Sequence[RunRecord]) -> Markup:
    """Returns what several runs on the same private data have spent together."""
    together = joint_epsilon(runs)
    text = (
        "A guarantee speaks of one run. Whoever picks the best of several has used all "
        "of them, and choosing settings is not covered by the epsilon of the one that "
        "was picked."
    )
    if together is not None and together[0] == float("inf"):
        text = f"{text} Together the runs have no guarantee."
    elif any(run.is_seeded for run in runs):
        text = f"{text} Runs with a seed have no guarantee that could be added up."
    elif together is None:
        text = (
            f"{text} What the runs spent together is not recorded, or is not of one "
            "unit of privacy."
        )
    else:
        epsilon, delta = together
        text = (
            f"{text} If all {len(runs)} were trained on the same private data, they "
            f"are ({epsilon_in_words(epsilon)}, {significant(delta)})-differentially "
            f"private per {runs[0].unit} together, by basic composition; runs that are "
            "not finished count with all their planned steps."
        )
    return element("p", text)


def _results_table(runs: Sequence[RunRecord]) -> Markup:
    """Returns accuracy, privacy and length, a row a run."""
    headings = (
        "run", "outcome", "averaged", "last", "class gap", "epsilon", "noise",
        "batch", "steps",
    )  # fmt: skip
    rows = [
        (
            run.name,
            outcome_in_words(run),
            percent(run.accuracy_ema) if run.keeps_average else "-",
            percent(run.accuracy),
            _gap(run),
            epsilon_in_words(run.epsilon),
            _of_mechanism(run, "noise_multiplier"),
            count(run.number("expected_batch_size")),
            steps_in_words(run.step, run.planned_steps, run.checkpoint_step),
        )
        for run in runs
    ]
    return table(headings, rows, label="Results of the runs", text_columns=2)


def _cost_table(runs: Sequence[RunRecord]) -> Markup:
    """Returns speed, times, memory and hardware, a row a run."""
    headings = ("run", "views/s", "time in steps", "in all", "memory", "hardware")
    rows = [
        (
            run.name,
            count(_rounded(run.views_per_second)),
            duration(run.train_seconds),
            duration(run.number("wall_time_seconds")),
            size(run.number("peak_memory_bytes")),
            run.text("device") or NOT_RECORDED,
        )
        for run in runs
    ]
    return table(headings, rows, label="Speed and memory of the runs")


def _differing_settings(runs: Sequence[RunRecord]) -> Markup:
    """Returns the settings that are not the same in all runs that record them."""
    flat = [_flattened(run.settings) for run in runs]
    rows = []
    for key in dict.fromkeys(key for one in flat for key in one):
        if len({one[key] for one in flat if key in one}) > 1:
            rows.append((key, *(one.get(key, NOT_RECORDED) for one in flat)))
    if not rows:
        return element("p", "Nothing: all settings are the same.", class_="muted")
    headings = ("setting", *(run.name for run in runs))
    return table(
        headings, rows, label="Settings that differ", text_columns=len(headings)
    )


def _privacy_table(runs: Sequence[RunRecord]) -> Markup:
    """Returns the headline of each run's statement."""
    rows = [
        (
            run.name,
            statement_of(run).headline,
            _spent(run),
            epsilon_in_words(run.planned_epsilon),
            _of_mechanism(run, "delta"),
        )
        for run in runs
    ]
    headings = ("run", "statement", "epsilon spent", "epsilon planned", "delta")
    return table(headings, rows, label="Privacy of the runs", text_columns=2)


def _one_run(number: int, run: RunRecord) -> Markup:
    """Returns all that there is of one run, closed."""
    bars = outcomes_drawn(f"classes-{number}", run.by_class)
    parts = [element("h3", "Classes"), *outcome_parts(run, run.by_class, bars)]
    if run.by_group is not None:
        bars = outcomes_drawn(f"groups-{number}", run.by_group)
        parts += [element("h3", "Groups"), *outcome_parts(run, run.by_group, bars)]
    return details(
        run.name,
        statement_box(statement_of(run)),
        *parts,
        element("h3", "Speed and memory"),
        cost_tiles(run),
        details("All settings", settings_tables(run.settings)),
        details("Versions", versions_table(run)),
    )


def _or_nothing(curves: Sequence[Drawn]) -> Markup:
    """Returns the curves, or that there are none."""
    nothing = element("p", "No run has an evaluation yet.", class_="muted")
    return figures(curves) or nothing


def _gap(run: RunRecord) -> str:
    """Returns the largest gap between classes."""
    if run.by_class is None or not run.by_class.gaps:
        return NOT_RECORDED
    return f"{100 * run.by_class.gaps['accuracy'].size:.1f}"


def _spent(run: RunRecord) -> str:
    """Returns the epsilon spent, and by which step as long as a run is unfinished."""
    spent = epsilon_in_words(run.epsilon)
    if run.is_finished or run.epsilon is None or run.epsilon == float("inf"):
        return spent
    return f"{spent} at step {count(run.step)}"


def _of_mechanism(run: RunRecord, name: str) -> str:
    """Returns a number of the mechanism, which a run without privacy does not have."""
    return significant(run.number(name)) if run.has_mechanism else NONE


def _rounded(value: float | None) -> float | None:
    """Returns a whole number."""
    return None if value is None else round(value)


def _flattened(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns settings in words, by dotted name."""
    return {
        f"{section}.{key}": setting_in_words(value)
        for section, values in settings.items()
        for key, value in (values.items() if isinstance(values, Mapping) else ())
    }
