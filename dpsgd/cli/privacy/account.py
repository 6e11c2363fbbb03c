"""`dpsgd-privacy epsilon` and `calibrate`: one setting, by one accountant."""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from dpsgd.cli.errors import UsageParser
from dpsgd.cli.privacy.options import (
    Commands,
    add_accountant,
    add_command,
    add_sampling,
    as_count,
    as_number,
    delta_of,
    json_number,
    sample_rate_of,
)
from dpsgd.errors import fault
from dpsgd.privacy import (
    Accountant,
    Phase,
    build_accountant,
    calibrate_noise_multiplier,
    calibrate_num_steps,
    rounded_up,
)

__all__ = ["add_to"]


def add_to(commands: "Commands[UsageParser]") -> None:
    """Adds `epsilon` and `calibrate`.

    Args:
        commands: What they are added to.
    """
    epsilon = add_command(commands, "epsilon", "the epsilon that a run spends")
    epsilon.add_argument("--noise-multiplier", required=True, metavar="SIGMA")
    epsilon.add_argument("--num-steps", required=True, metavar="T")
    calibrate = add_command(
        commands, "calibrate", "the least noise, or the most steps, for an epsilon"
    )
    calibrate.add_argument("--target-epsilon", required=True, metavar="EPSILON")
    wanted = calibrate.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--num-steps", metavar="T", help="find the noise multiplier")
    wanted.add_argument("--noise-multiplier", metavar="SIGMA", help="find the steps")
    for command in (epsilon, calibrate):
        add_sampling(command)
        add_accountant(command, default="prv")
        command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Answers, as JSON or as a table."""
    report = _report(arguments)
    if arguments.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _show(report)


def _report(arguments: argparse.Namespace) -> dict[str, float | int | str | None]:
    """Returns what is asked for, with everything it depends on."""
    accountant = build_accountant(arguments.accountant)
    sample_rate, delta = sample_rate_of(arguments), delta_of(arguments)
    if arguments.command == "epsilon":
        noise_multiplier = as_number("noise_multiplier", arguments.noise_multiplier)
        num_steps = as_count("num_steps", arguments.num_steps)
    else:
        noise_multiplier, num_steps = _calibrated(
            arguments, sample_rate, delta, accountant
        )
    phase = Phase(sample_rate, noise_multiplier, num_steps)
    bound = accountant.epsilon([phase], delta)
    return {
        "epsilon_lower": json_number(bound.lower),
        "epsilon_estimate": json_number(bound.estimate),
        "epsilon_upper": json_number(bound.upper),
        "noise_multiplier": noise_multiplier,
        "num_steps": num_steps,
        "sample_rate": sample_rate,
        "delta": delta,
        "accountant": arguments.accountant,
    }


def _calibrated(
    arguments: argparse.Namespace,
    sample_rate: float,
    delta: float,
    accountant: Accountant,
) -> tuple[float, int]:
    """Returns noise multiplier and steps, of which one is given and one is found."""
    target_epsilon = as_number("target_epsilon", arguments.target_epsilon)
    if arguments.num_steps is None:
        noise_multiplier = as_number("noise_multiplier", arguments.noise_multiplier)
        num_steps = calibrate_num_steps(
            target_epsilon=target_epsilon,
            sample_rate=sample_rate,
            noise_multiplier=noise_multiplier,
            delta=delta,
            accountant=accountant,
        )
        if num_steps == 0:
            rule = "is less than a single step spends"
            remedy = "raise it, or raise noise_multiplier"
            print(
                fault("target_epsilon", target_epsilon, rule, remedy), file=sys.stderr
            )
        return noise_multiplier, num_steps
    num_steps = as_count("num_steps", arguments.num_steps)
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=target_epsilon,
        sample_rate=sample_rate,
        num_steps=num_steps,
        delta=delta,
        accountant=accountant,
    )
    return noise_multiplier, num_steps


def _show(report: dict[str, float | int | str | None]) -> None:
    """Prints the report as a table."""
    table = Table(show_header=False)
    for name, value in report.items():
        shown = f"{value:.7g}" if isinstance(value, float) else str(value)
        if name == "epsilon_upper" and isinstance(value, float):
            shown = rounded_up(value, 6)
        style = "bold" if name == "epsilon_upper" else ""
        table.add_row(name, shown, style=style)
    Console().print(table)
