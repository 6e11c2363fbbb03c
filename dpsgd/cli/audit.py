"""`bin/dpsgd-audit`: tries to refute the epsilon of a run, with canaries."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from dpsgd.assembly import assemble
from dpsgd.audit import audit, audited_config, require_auditable
from dpsgd.checkpoint import CheckpointStore, write_atomically
from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.config import Config, config_to_dict, load_config, with_absolute_paths
from dpsgd.data import load_datasets
from dpsgd.privacy import AuditResult, check_confidence
from dpsgd.report import (
    ProgressView,
    RunDirectory,
    audit_table,
    default_run_directory,
    environment,
    facts_table,
    save_audit_plot,
    to_json,
)
from dpsgd.run import EvaluationRecord, Run, StepRecord

__all__ = ["main"]

_REFUTED: Final = 1
_GRADIENT_CANARIES: Final = 1000
_IMAGE_CANARIES: Final = 300
_ON_FAILURE: Final = {"field": "run_dir", "then": "audit anew in another folder"}
_NOT_FOR_RELEASE: Final = (
    "This run has learned from canaries. Its weights are not kept, and no run with "
    "canaries may be released."
)
_EPILOG: Final = """\
A whole run is trained with canaries added to its data, each by a fair coin, and the
coins are guessed from what the run released. Many right guesses refute an epsilon. Each
lower bound holds by itself with the given confidence. Exit code 0: the claim was not
refuted; 1: it was; 2: the input cannot be used.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        0 if the claim stands, 1 if it is refuted, 2 when something given is at fault.
    """
    return exit_code(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = UsageParser(
        prog="dpsgd-audit",
        description="Try to refute the epsilon of a run, with canaries in its data.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file of settings")
    parser.add_overrides()
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="where results go (default runs/<config>-audit-<time>)",
    )
    parser.add_argument(
        "--gradient-canaries",
        type=int,
        default=_GRADIENT_CANARIES,
        metavar="M",
        help=f"records with a gradient of their own (default {_GRADIENT_CANARIES})",
    )
    parser.add_argument(
        "--image-canaries",
        type=int,
        metavar="M",
        help=f"mislabelled test images (default {_IMAGE_CANARIES}, or all there are)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="P",
        help="of each lower bound, in (0, 1) (default 0.95)",
    )
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    """Audits, prints and writes."""
    console = Console(markup=False, emoji=False)  # a path may hold [brackets]
    check_confidence(arguments.confidence)
    config = load_config(arguments.config, arguments.overrides)
    directory = RunDirectory(arguments.run_dir or _default_directory(arguments.config))
    directory.require_absent(can_resume=False)
    result, run = _audit(console, config, directory, arguments)
    report = to_json(_report(result, run), indent=2).encode()
    write_atomically(directory.report, report, **_ON_FAILURE)
    scores = to_json(_scores(result)).encode()
    write_atomically(directory.scores, scores, **_ON_FAILURE)
    save_audit_plot(directory.path / "audit.png", result)
    console.print(audit_table(result))
    console.print(_verdict(result), highlight=False)
    console.print(f"report: {directory.report}", highlight=False, soft_wrap=True)
    return _REFUTED if result.is_refuted else 0


def _default_directory(config: Path) -> Path:
    """Returns a folder that no training run has."""
    named = config.with_stem(f"{config.stem}-audit")
    return default_run_directory(named, datetime.now())


def _audit(
    console: Console,
    config: Config,
    directory: RunDirectory,
    arguments: argparse.Namespace,
) -> tuple[AuditResult, Run]:
    """Assembles the run and audits it."""
    store = CheckpointStore(directory.checkpoints, keep=1)  # nothing is saved
    config = audited_config(config, arguments.gradient_canaries)
    splits = load_datasets(config.data)
    run, state, plan = assemble(config, store=store)
    num_images = arguments.image_canaries
    if num_images is None:
        num_images = min(_IMAGE_CANARIES, len(splits.test))
    numbers = {
        "num_gradient_canaries": arguments.gradient_canaries,
        "num_image_canaries": num_images,
    }
    require_auditable(run, state, splits, **numbers)
    settings = config_to_dict(with_absolute_paths(config))
    directory.create(settings, can_resume=False)
    # Even if killed, it is no other run.
    write_atomically(directory.scores, b"{}", **_ON_FAILURE)
    console.print(facts_table(plan.rows(config), title="Privacy plan, to be audited"))
    progress = ProgressView(console, num_steps=run.ledger.max_steps, step=0)
    with progress:
        result = audit(
            run,
            state,
            splits,
            num_classes=plan.facts.num_classes,
            confidence=arguments.confidence,
            observers=[_Shown(progress)],
            **numbers,
        )
    return result, run


class _Shown:
    """Shows the steps of the audited run; its accuracy says nothing."""

    def __init__(self, progress: ProgressView) -> None:
        self._progress = progress

    def on_step(self, record: StepRecord) -> None:
        """Shows the step."""
        self._progress.show_step(
            record.step,
            epsilon=record.epsilon,
            views_per_second=record.views_per_second,
        )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Shows nothing: the test set holds canaries."""
        del record


def _verdict(result: AuditResult) -> str:
    """Returns what the bounds mean, in a sentence."""
    sure = f"with {result.confidence:.0%} confidence each"
    if result.is_refuted:
        return f"REFUTED: a lower bound passes the claim ({sure})"
    return f"not refuted: the lower bounds, {sure}, stay below the claim"


def _report(result: AuditResult, run: Run) -> dict[str, Any]:
    """Returns the facts of report.json."""
    return {
        "note": _NOT_FOR_RELEASE,
        "is_refuted": result.is_refuted,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "confidence": result.confidence,
        "canaries": {
            kind: {
                **asdict(found.guesses),
                "epsilon_lower_bound": found.epsilon_lower_bound,
                "epsilon_if_gaussian": found.epsilon_if_gaussian,
            }
            for kind, found in result.canaries.items()
        },
        "adjacency": run.mechanism.adjacency,
        "noise_multiplier": run.mechanism.noise_multiplier,
        "sample_rate": run.mechanism.sample_rate,
        "num_steps": result.num_steps,
        "seeded": run.streams.seeded,
        **environment(),
    }


def _scores(result: AuditResult) -> dict[str, Any]:
    """Returns coins and scores, from which the guesses can be made again."""
    return {
        kind: {"is_in": found.is_in.tolist(), "scores": found.scores.tolist()}
        for kind, found in result.canaries.items()
    }
