"""`bin/dpsgd-train`: read settings, show the plan, train, leave a report."""

import argparse
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from dpsgd.assembly import assemble, plan_of
from dpsgd.checkpoint import CheckpointStore, write_atomically, write_tensors
from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.cli.groups import comparisons
from dpsgd.cli.launch import launch_of, run_of
from dpsgd.cli.signals import SIGNAL_EXIT, StopSignal
from dpsgd.config import (
    Config,
    config_to_dict,
    load_config,
    with_absolute_paths,
)
from dpsgd.errors import ConfigError, fault
from dpsgd.parallel import Ranks, joined
from dpsgd.planning import Plan
from dpsgd.report import (
    FORMAT,
    MetricsWriter,
    ProgressView,
    RunDirectory,
    comparison_table,
    environment,
    facts_table,
    guarantee_in_words,
    last_evaluated_step,
    result_table,
    to_json,
)
from dpsgd.run import EvaluationRecord, Outcome, Run, StepRecord, TrainState
from dpsgd.train import train
from dpsgd.trees import Params

__all__ = ["main"]

# What of the report goes with the weights wherever they are copied to.
_GUARANTEE = (
    "private",
    "epsilon",
    "delta",
    "unit",
    "adjacency",
    "accountant",
    "noise",
    "num_steps",
    "seeded",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        0 when trained, 2 when something given is at fault, 130 or 143 when stopped by
        SIGINT or SIGTERM with a checkpoint written.
    """
    try:
        code = exit_code(lambda: _run(_parse(argv)))
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if dist.is_initialized():  # this rank failed; leaving, NCCL would wait for others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = UsageParser(
        prog="dpsgd-train",
        description="Train an image classifier with differential privacy.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of settings")
    parser.add_argument(
        "--plan", action="store_true", help="show what would be done, and stop"
    )
    parser.add_overrides()
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="where results go (default runs/<config>-<time>)",
    )
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the run in DIR"
    )
    arguments = parser.parse_args(argv)
    if arguments.config is None and arguments.resume is None:
        parser.error("a configuration file is required, or --resume DIR")
    if arguments.run_dir is not None and arguments.resume is not None:
        parser.error("--run-dir and --resume both name the run; give one of them")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    """Plans or trains, as the arguments say."""
    path = arguments.config or RunDirectory(arguments.resume).config
    if arguments.resume is not None:
        RunDirectory(arguments.resume).require()
    has_begun = arguments.resume is not None
    config = load_config(path, arguments.overrides, has_begun=has_begun)
    with joined(config) as ranks:
        # A path may hold [brackets]; the first rank speaks for all.
        console = Console(markup=False, emoji=False, quiet=not ranks.is_first)
        if arguments.plan:
            _show_plan(console, config, plan_of(config))
            return 0
        directory, resumes = run_of(arguments.resume, arguments.run_dir, path, ranks)
        return _train(console, config, directory, ranks, resumes=resumes)


def _train(
    console: Console,
    config: Config,
    directory: RunDirectory,
    ranks: Ranks,
    *,
    resumes: bool,
) -> int:
    """Trains in a folder, from the start or from its newest checkpoint."""
    store = CheckpointStore(directory.checkpoints, keep=config.runtime.keep_checkpoints)
    if not resumes:
        directory.require_absent()
    with ExitStack() as lock:
        if resumes:  # before it is read how far the run is, lest another goes on
            if ranks.is_first:
                lock.enter_context(directory.locked())
            ranks.meet()
        run, state, plan = assemble(
            config,
            store=store,
            checkpoint=store.newest() if resumes else None,
            shown_step=last_evaluated_step(directory.metrics),
            ranks=ranks,
        )
        if not ranks.is_first:
            with _memory_fault_told(plan):
                return _follow(run, state)
        if not resumes:
            directory.create(config_to_dict(with_absolute_paths(config)))
            lock.enter_context(directory.locked())
            _record_plan(directory, config, plan)
        return _train_locked(console, config, directory, run, state, plan)


def _follow(run: Run, state: TrainState) -> int:
    """Trains along with the first rank, which speaks and writes."""
    stop = StopSignal()
    with stop:
        outcome = train(run, state, stop_requested=partial(stop.agreed, run.ranks))
    if outcome == "interrupted":
        return SIGNAL_EXIT + (stop.received or 0)
    _final_weights(run, state)
    return 0


def _record_plan(directory: RunDirectory, config: Config, plan: Plan) -> None:
    """Writes what the run will do, and with what, for those who read it unfinished."""
    planned = {"format": FORMAT, **plan.to_dict(config)}
    found = {**environment(), **launch_of()}
    told = {"field": "run_dir", "then": "start the run anew in another folder"}
    write_atomically(directory.plan, to_json(planned, indent=2).encode(), **told)
    write_atomically(directory.environment, to_json(found).encode(), **told)


def _train_locked(
    console: Console,
    config: Config,
    directory: RunDirectory,
    run: Run,
    state: TrainState,
    plan: Plan,
) -> int:
    """Trains in a folder that no other process trains in."""
    _show_plan(console, config, plan)
    console.print(f"run directory: {directory.path}", highlight=False, soft_wrap=True)
    held, declared = run.sampler.num_rows, plan.facts.num_examples
    if held != declared:
        text = f"{held} {run.mechanism.unit}s are held, {declared} are declared"
        console.print(f"note: {text}: sample rate and divisor follow the declared size")
    stop = StopSignal()
    metrics = MetricsWriter(directory.metrics, from_step=state.step)
    progress = ProgressView(console, num_steps=run.ledger.max_steps, step=state.step)
    observer = _Recorder(metrics, progress)
    with _memory_fault_told(plan), stop, progress:
        outcome = train(
            run, state, [observer], stop_requested=partial(stop.agreed, run.ranks)
        )
    if outcome == "interrupted":
        console.print(
            f"stopped after step {state.step}, checkpoint written; go on with\n"
            f"  bin/dpsgd-train --resume {directory.path}",
            highlight=False,
            soft_wrap=True,
        )
        return SIGNAL_EXIT + (stop.received or 0)
    assert observer.evaluation is not None  # the last step is always evaluated
    _leave(console, directory, run, state, observer.evaluation, outcome)
    return 0


@contextmanager
def _memory_fault_told(plan: Plan) -> Iterator[None]:
    """Names the setting by which memory that ran out can be spared."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        size = plan.microbatch_size
        rule = f"does not fit in the memory of {plan.device}"
        remedy = f"set it to {max(1, size // 2)} or less; go on with --resume"
        raise ConfigError(
            fault("runtime.microbatch_size", size, rule, remedy)
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether memory ran out: on the CPU torch has no error type for it."""
    on_cpu = "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError)


class _Recorder:
    """Hands what training tells to the metrics file and the progress view."""

    def __init__(self, metrics: MetricsWriter, progress: ProgressView) -> None:
        self._metrics = metrics
        self._progress = progress
        self.evaluation: EvaluationRecord | None = None

    def on_step(self, record: StepRecord) -> None:
        """Shows the step; records it only if unprotected values were asked for."""
        self._progress.show_step(
            record.step,
            epsilon=record.epsilon,
            views_per_second=record.views_per_second,
        )
        if record.unprotected is not None:
            self._metrics.write(
                {"step": record.step, "unprotected": dict(record.unprotected)}
            )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Shows and records the evaluation."""
        self.evaluation = record
        accuracies = {"last": record.last.accuracy}
        line: dict[str, Any] = {
            "step": record.step,
            "epsilon": record.epsilon,
            "test_accuracy": record.last.accuracy,
            "test_loss": record.last.loss,
        }
        if record.ema is not None:
            accuracies["ema"] = record.ema.accuracy
            line["test_accuracy_ema"] = record.ema.accuracy
            line["test_loss_ema"] = record.ema.loss
        line["train_seconds"] = record.train_seconds
        line["views_per_second"] = record.views_per_second
        self._metrics.write(line)
        self._progress.show_evaluation(
            record.step, epsilon=record.epsilon, accuracies=accuracies
        )


def _show_plan(console: Console, config: Config, plan: Plan) -> None:
    """Prints the privacy plan."""
    console.print(facts_table(plan.rows(config), title=plan.title))


def _leave(
    console: Console,
    directory: RunDirectory,
    run: Run,
    state: TrainState,
    record: EvaluationRecord,
    outcome: Outcome,
) -> None:
    """Writes weights and report, and prints the result."""
    report = _report(run, state, record, outcome)
    weights = _final_weights(run, state)
    weights |= {f"frozen/{name}": leaf for name, leaf in run.frozen.items()}
    facts = {"step": state.step, **{name: report[name] for name in _GUARANTEE}}
    network = config_to_dict(run.config)["model"]
    del network["init_from"], network["init_weights"]  # a path is nobody's business
    facts["model"] = network
    write_tensors(directory.weights, weights, facts)
    content = to_json(report, indent=2).encode()
    write_atomically(directory.report, content, field="run_dir")
    results = {
        name: one.measures
        for name, one in (("last", record.last), ("ema", record.ema))
        if one is not None
    }
    for comparison in comparisons(record.ema or record.last, run.config):
        console.print(comparison_table(comparison))
    told = f"Result, {guarantee_in_words(report)}"
    console.print(told, style="italic", highlight=False, soft_wrap=True)
    console.print(result_table(results))
    if outcome == "budget_spent":
        text = f"the budget was spent after {state.step} of {run.mechanism.num_steps}"
        console.print(f"stopped early: {text} steps", highlight=False, soft_wrap=True)
    console.print(f"report: {directory.report}", highlight=False, soft_wrap=True)


def _final_weights(run: Run, state: TrainState) -> Params:
    """Returns the weights that may be released, which all ranks put together."""
    run.ranks.meet()  # the first writes its report before
    weights = {}
    for group, leaves in (("last", state.params), ("ema", state.ema or {})):
        for name, leaf in run.layout.whole(leaves).items():
            weights[f"{group}/{name}"] = leaf
    return weights


def _report(
    run: Run, state: TrainState, record: EvaluationRecord, outcome: Outcome
) -> dict[str, Any]:
    """Returns the facts of report.json."""
    mechanism = run.mechanism
    best_known = record.ema or record.last
    epsilon = run.ledger.epsilon_exactly(state.step)
    return {
        "format": FORMAT,
        "outcome": outcome,
        "test_accuracy": record.last.accuracy,
        "test_accuracy_ema": record.ema.accuracy if record.ema else None,
        "test_loss": record.last.loss,
        "test_loss_ema": record.ema.loss if record.ema else None,
        "per_class_accuracy": best_known.per_class_accuracy,
        "per_class_num_examples": best_known.per_class_num_examples,
        "per_group_accuracy": best_known.per_group_accuracy,
        "per_group_num_examples": best_known.per_group_num_examples,
        "largest_gap": best_known.largest_gap,
        "private": epsilon < float("inf"),
        **_guarantee(run, epsilon),
        "expected_batch_size": mechanism.expected_batch_size,
        "num_steps": state.step,
        "seeded": run.streams.seeded,
        "views_per_second": run.views_per_second(state),
        "peak_memory_bytes": _peak_memory(),
        "wall_time_seconds": state.wall_seconds,
        "train_seconds": state.train_seconds,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **environment(),
    }


def _guarantee(run: Run, epsilon: float) -> dict[str, Any]:
    """Returns what is guaranteed, and by what means; nulls in a run without privacy."""
    mechanism = run.mechanism
    facts = {
        "epsilon": epsilon if epsilon < float("inf") else None,
        "delta": mechanism.delta,
        "unit": mechanism.unit,
        "adjacency": mechanism.adjacency,
        "accountant": run.config.privacy.accountant,
        "noise": run.config.privacy.noise,
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "clipping_norm": mechanism.clipping_norm,
    }
    return facts if run.config.privacy.enabled else dict.fromkeys(facts)


def _peak_memory() -> int:
    """Returns the most bytes held: on the GPU if there is one, else by the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":  # as bin/dpsgd-sweep starts its runs
    sys.exit(main())
