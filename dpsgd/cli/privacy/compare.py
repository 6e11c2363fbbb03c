"""`dpsgd-privacy compare`: every account of one setting, side by side."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpsgd.cli.errors import UsageParser
from dpsgd.cli.privacy.options import (
    Commands,
    add_command,
    add_sampling,
    as_count,
    as_number,
    delta_of,
    json_number,
    sample_rate_of,
)
from dpsgd.errors import ConfigError, fault
from dpsgd.privacy import Phase, rounded_up
from dpsgd.privacy.comparison import Opinion, compare

__all__ = ["add_to"]

_CAPTION = "Only an upper bound may be promised; the approximation is often too low."
_NEEDED = ("noise_multiplier", "num_steps", "delta")
_FLAGS = (*_NEEDED, "sample_rate", "expected_batch_size", "num_examples")


def add_to(commands: "Commands[UsageParser]") -> None:
    """Adds `compare`.

    Args:
        commands: What it is added to.
    """
    command = add_command(commands, "compare", "what every account says of one run")
    command.add_argument(
        "config", nargs="?", type=Path, help="YAML file of settings; or flags"
    )
    command.add_overrides()
    add_sampling(command, required=False)
    command.add_argument("--noise-multiplier", metavar="SIGMA")
    command.add_argument("--num-steps", metavar="T")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Asks all, and shows what they say."""
    phase, delta = _configured(arguments) if arguments.config else _given(arguments)
    opinions = compare([phase], delta)
    if arguments.json:
        print(json.dumps(_report(phase, delta, opinions), indent=2, allow_nan=False))
    else:
        Console().print(_table(phase, delta, opinions))


def _given(arguments: argparse.Namespace) -> tuple[Phase, float]:
    """Returns the run and the delta that flags describe."""
    if arguments.overrides:
        rule, remedy = "changes a configuration file", "name the file, or use flags"
        raise ConfigError(fault("set", arguments.overrides[0], rule, remedy))
    for field in _NEEDED:
        if getattr(arguments, field) is None:
            remedy = f"give --{field.replace('_', '-')}, or a configuration file"
            raise ConfigError(fault(field, None, "is needed", remedy))
    sample_rate = sample_rate_of(arguments)
    noise_multiplier = as_number("noise_multiplier", arguments.noise_multiplier)
    num_steps = as_count("num_steps", arguments.num_steps)
    return Phase(sample_rate, noise_multiplier, num_steps), delta_of(arguments)


def _configured(arguments: argparse.Namespace) -> tuple[Phase, float]:
    """Returns the run and the delta that a configuration file describes."""
    for field in _FLAGS:
        value = getattr(arguments, field)
        if value is not None:
            rule = "is given twice: by itself and by the configuration file"
            raise ConfigError(fault(field, value, rule, "use --set to change settings"))
    # These import torch, which flags do without.
    from dpsgd.assembly import plan_of
    from dpsgd.config import load_config

    plan = plan_of(load_config(arguments.config, arguments.overrides))
    return plan.mechanism.phase(), plan.mechanism.delta


def _report(
    phase: Phase, delta: float, opinions: list[Opinion]
) -> dict[str, float | int | list[dict[str, float | str | None]]]:
    """Returns all that was asked and answered, as JSON can hold it."""
    return {
        "sample_rate": phase.sample_rate,
        "noise_multiplier": phase.noise_multiplier,
        "num_steps": phase.num_steps,
        "delta": delta,
        "accounts": [
            {
                "method": opinion.method,
                "epsilon_lower": json_number(opinion.lower),
                "epsilon": json_number(opinion.epsilon),
                "kind": opinion.kind,
                "seconds": opinion.seconds,
            }
            for opinion in opinions
        ],
    }


def _table(phase: Phase, delta: float, opinions: list[Opinion]) -> Table:
    """Returns a table of a row for each method."""
    title = (
        f"sample rate {phase.sample_rate:.7g}, noise multiplier "
        f"{phase.noise_multiplier:.7g}, {phase.num_steps:,} steps, delta {delta:g}"
    )
    table = Table(title=title, title_justify="left", caption=_CAPTION)
    table.add_column("account", style="bold", no_wrap=True)
    for heading in ("at least", "epsilon", "vs estimate"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it is")
    table.add_column("seconds", justify="right")
    estimate = next(o.epsilon for o in opinions if o.method == "estimate")
    for opinion in opinions:
        table.add_row(
            opinion.method,
            "" if opinion.lower is None else f"{opinion.lower:.6f}",
            "" if opinion.epsilon is None else rounded_up(opinion.epsilon, 6),
            _excess(opinion.epsilon, estimate),
            opinion.kind,
            f"{opinion.seconds:.2f}",
        )
    return table


def _excess(epsilon: float | None, estimate: float | None) -> str:
    """Returns by how much a figure is above the estimate."""
    if not epsilon or not estimate or epsilon == estimate:
        return ""
    return f"{epsilon / estimate - 1:+.3%}"
