"""Seconds per calibration, and how much noise the certificate costs.

    python benchmarks/accounting.py --save benchmarks/results/accounting_NAME.json

The exact noise multipliers are reference figures: contour integrals that agree with
closed forms to 1e-9.
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpsgd.privacy import PRVAccountant, calibrate_noise_multiplier
from dpsgd.report import to_json

CIFAR, IMAGENET = 4096 / 50_000, 16_384 / 1_281_167
# (name, sample rate, steps, target epsilon, delta, exact noise multiplier)
SETTINGS = [
    ("CIFAR-10 eps 1", CIFAR, 875, 1.0, 1e-5, 9.119010),
    ("CIFAR-10 eps 2", CIFAR, 1125, 2.0, 1e-5, 5.567272),
    ("CIFAR-10 eps 3", CIFAR, 1593, 3.0, 1e-5, 4.635915),
    ("CIFAR-10 eps 4", CIFAR, 1687, 4.0, 1e-5, 3.737134),
    ("CIFAR-10 eps 6", CIFAR, 1843, 6.0, 1e-5, 2.802137),
    ("CIFAR-10 eps 8", CIFAR, 2468, 8.0, 1e-5, 2.560747),
    ("ImageNet eps 8", IMAGENET, 71_589, 8.0, 8e-7, 2.361754),
    ("ImageNet fine-tuning", 0.20461, 3910, 8.0, 8e-7, 8.463980),
]


def measure(setting: tuple[Any, ...]) -> dict[str, Any]:
    """Calibrates one setting with an accountant that has seen nothing yet."""
    name, sample_rate, num_steps, target_epsilon, delta, exact = setting
    started = time.perf_counter()
    found = calibrate_noise_multiplier(
        target_epsilon=target_epsilon,
        sample_rate=sample_rate,
        num_steps=num_steps,
        delta=delta,
        accountant=PRVAccountant(),
    )
    return {
        "setting": name,
        "sample_rate": sample_rate,
        "num_steps": num_steps,
        "target_epsilon": target_epsilon,
        "delta": delta,
        "noise_multiplier": found,
        "over_exact": found / exact - 1,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    table = Table("setting", "noise multiplier", "over exact", "seconds")
    rows = [measure(setting) for setting in SETTINGS]
    for row in rows:
        noise, over = f"{row['noise_multiplier']:.6f}", f"{row['over_exact']:.3%}"
        table.add_row(row["setting"], noise, over, f"{row['seconds']:.1f}")
    Console().print(table)
    if arguments.save:
        facts = {"processor": platform.processor() or platform.machine()}
        arguments.save.write_text(to_json({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
