"""Calibration of every published setting: seconds, and how much noise certainty costs.

    python benchmarks/accounting.py --save benchmarks/results/accounting_NAME.json

The exact noise multipliers solve delta(epsilon; sigma) = delta by contour integrals,
which agree with closed forms to 1e-9; eight of them are reference figures in the
tests. Seconds are of one core, by accountants that have seen nothing yet.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.optimize import brentq

from dpsgd.privacy import (
    Accountant,
    EpsilonBound,
    Phase,
    build_accountant,
    calibrate_noise_multiplier,
    estimate_delta,
    estimate_epsilon,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

Row = dict[str, Any]

CIFAR, IMAGENET = 50_000, 1_281_167
SMALL, LARGE = 4096 / CIFAR, 16_384 / CIFAR
# (name, sample rate, steps, target epsilon, delta): De et al. 2022
SETTINGS = [
    ("CIFAR-10 WRN-16-4 eps 1", SMALL, 875, 1.0, 1e-5),
    ("CIFAR-10 WRN-16-4 eps 2", SMALL, 1125, 2.0, 1e-5),
    ("CIFAR-10 WRN-16-4 eps 3", SMALL, 1593, 3.0, 1e-5),
    ("CIFAR-10 WRN-16-4 eps 4", SMALL, 1687, 4.0, 1e-5),
    ("CIFAR-10 WRN-16-4 eps 6", SMALL, 1843, 6.0, 1e-5),
    ("CIFAR-10 WRN-16-4 eps 8", SMALL, 2468, 8.0, 1e-5),
    ("CIFAR-10 WRN-40-4 eps 1", LARGE, 906, 1.0, 1e-5),
    ("CIFAR-10 WRN-40-4 eps 2", LARGE, 1156, 2.0, 1e-5),
    ("CIFAR-10 WRN-40-4 eps 3", LARGE, 1656, 3.0, 1e-5),
    ("CIFAR-10 WRN-40-4 eps 4", LARGE, 1765, 4.0, 1e-5),
    ("CIFAR-10 WRN-40-4 eps 6", LARGE, 1994, 6.0, 1e-5),
    ("CIFAR-10 WRN-40-4 eps 8", LARGE, 2000, 8.0, 1e-5),
    ("fine-tuned WRN-28-10 eps 1", LARGE, 250, 1.0, 1e-5),
    ("fine-tuned WRN-28-10 eps 2", LARGE, 500, 2.0, 1e-5),
    ("fine-tuned WRN-28-10 eps 4", LARGE, 1000, 4.0, 1e-5),
    ("fine-tuned WRN-28-10 eps 8", LARGE, 2000, 8.0, 1e-5),
    ("ImageNet NF-ResNet-50 eps 8", 16_384 / IMAGENET, 71_589, 8.0, 8e-7),
    ("ImageNet fine-tuned eps 8", 0.20461, 3910, 8.0, 8e-7),
]
ACCOUNTANTS = ("prv", "pld")


class Counting(Accountant):
    """Counts the certificates that a calibration asks for."""

    def __init__(self, accountant: Accountant) -> None:
        self.accountant, self.name, self.asked = accountant, accountant.name, 0

    def epsilon(self, phases: Sequence[Phase], delta: float) -> EpsilonBound:
        self.asked += 1
        return self.accountant.epsilon(phases, delta)

    def slack(self, phases: Sequence[Phase], delta: float) -> float:
        return self.accountant.slack(phases, delta)


def exact_noise(
    sample_rate: float, num_steps: int, target_epsilon: float, delta: float, near: float
) -> float:
    """Returns the noise multiplier whose delta at the target is the one given."""

    def excess(log_sigma: float) -> float:
        phase = Phase(sample_rate, math.exp(log_sigma), num_steps)
        found = estimate_delta([phase], target_epsilon)
        return math.log(found / delta)

    start = math.log(near)
    return math.exp(brentq(excess, start - 0.01, start + 0.01, xtol=1e-12))


def measure(setting: tuple[str, float, int, float, float], name: str) -> Row:
    """Calibrates one setting."""
    title, sample_rate, num_steps, target_epsilon, delta = setting
    accountant = Counting(build_accountant(name))
    started = time.process_time()
    found = calibrate_noise_multiplier(
        target_epsilon=target_epsilon,
        sample_rate=sample_rate,
        num_steps=num_steps,
        delta=delta,
        accountant=accountant,
    )
    seconds = time.process_time() - started
    phase = Phase(sample_rate, found, num_steps)
    exact = exact_noise(sample_rate, num_steps, target_epsilon, delta, found)
    return {
        "setting": title,
        "sample_rate": sample_rate,
        "num_steps": num_steps,
        "target_epsilon": target_epsilon,
        "delta": delta,
        "accountant": name,
        "noise_multiplier": found,
        "exact_noise_multiplier": exact,
        "over_exact": found / exact - 1,
        "epsilon": accountant.accountant.epsilon([phase], delta).upper,
        "certificates": accountant.asked,
        "seconds": seconds,
        "estimate_seconds": estimate_seconds(phase, delta),
    }


def estimate_seconds(phase: Phase, delta: float) -> float:
    """Returns the median of how long an estimate takes."""
    times = []
    for _ in range(5):
        started = time.process_time()
        estimate_epsilon([phase], delta)
        times.append(time.process_time() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="JSON file; .md is written beside it")
    arguments = parser.parse_args()
    rows = [measure(setting, name) for name in ACCOUNTANTS for setting in SETTINGS]
    facts = machine.facts("scipy")
    told = markdown(rows, facts["processor"])
    print(told)
    if arguments.save:
        text = json.dumps({**facts, "rows": rows}, indent=1)
        arguments.save.write_text(text + "\n")
        arguments.save.with_suffix(".md").write_text(told)


HEADINGS = (
    "setting",
    "by",
    "noise",
    "over exact",
    "epsilon",
    "asked",
    "s",
    "estimate",
)


def cells(row: Row) -> list[str]:
    """Returns a row in words, under `HEADINGS`."""
    return [
        row["setting"],
        row["accountant"],
        f"{row['noise_multiplier']:.6f}",
        f"{row['over_exact']:.4%}",
        f"{row['epsilon']:.6f}",
        str(row["certificates"]),
        f"{row['seconds']:.2f}",
        f"{1000 * row['estimate_seconds']:.1f} ms",
    ]


def markdown(rows: Sequence[Row], processor: str) -> str:
    """Returns the rows for reading."""
    lines = [
        "# Calibration of the published settings",
        "",
        f"One core of {processor}. `over exact` is how much more noise than the least",
        "possible; `asked` counts certificates; no epsilon is above its target.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|--|--|" + "--:|" * (len(HEADINGS) - 2),
    ]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
