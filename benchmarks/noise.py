"""Seconds a step that noise takes on the CPU, standard and secure.

python benchmarks/noise.py --save benchmarks/results/noise_NAME.json
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dpsgd.clipping import clipping_slack
from dpsgd.config import ModelConfig
from dpsgd.kernels import add_gaussian_noise_
from dpsgd.models import build_model, trainable_params
from dpsgd.optim import SecureNoise
from dpsgd.optim.rounded_gaussian import magnitudes, rounded_gaussian
from dpsgd.privacy import DPSGDMechanism
from dpsgd.report import to_json
from dpsgd.trees import num_elements

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

NUM_PARAMETERS = 2_753_818  # a WRN-16-4
REPETITIONS = 9
MECHANISM = DPSGDMechanism(
    sample_rate=4096 / 50_000,
    num_steps=2468,
    noise_multiplier=2.563,
    clipping_norm=1.0,
    expected_batch_size=4096,
    delta=1e-5,
)


def measure(name: str, work: Callable[[], object]) -> dict[str, Any]:
    """Returns median times of some work on all parameters, once warmed up.

    Processor time counts all threads, and not the time that other processes take.
    """
    work()
    walls, processors = [], []
    for _ in range(REPETITIONS):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    processor = statistics.median(processors)
    return {
        "what": name,
        "threads": torch.get_num_threads(),
        "wall_milliseconds": 1e3 * statistics.median(walls),
        "processor_milliseconds": 1e3 * processor,
        "processor_ns_an_element": 1e9 * processor / NUM_PARAMETERS,
    }


def noise_of_a_network() -> SecureNoise:
    """Returns the secure noise of a WRN-16-4 of ten classes."""
    config = ModelConfig(name="wide_resnet", depth=16, width=4)
    params = trainable_params(
        build_model(config, image_shape=(3, 32, 32), num_classes=10)
    )
    assert num_elements(params) == NUM_PARAMETERS
    return SecureNoise.for_sums(
        MECHANISM,
        num_parameters=NUM_PARAMETERS,
        clipping_slack=clipping_slack(params, MECHANISM.clipping_norm),
    )


def unsure_share(noise: SecureNoise) -> float:
    """Returns how many draws in one need more than 64 bits."""
    places = np.frombuffer(os.urandom(8 * 10**6), np.uint64) >> np.uint64(1)
    _, is_sure = magnitudes(places, noise.std)
    return float(1 - is_sure.mean())


def rows_of(noise: SecureNoise) -> list[dict[str, Any]]:
    """Measures both kinds of noise, and the parts of the secure one."""
    total = torch.zeros(NUM_PARAMETERS)
    wide = total.double()
    threads = torch.get_num_threads()
    return [
        measure(
            "standard: Philox, float32",
            lambda: add_gaussian_noise_(total, std=2.563, key=1, leaf=0),
        ),
        measure("secure", lambda: noise.add_({"w": wide})),
        measure("of it: bits", lambda: os.urandom(8 * NUM_PARAMETERS)),
        measure(
            "of it: numbers from bits",
            lambda: rounded_gaussian(NUM_PARAMETERS, noise.std, num_threads=threads),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    noise = noise_of_a_network()
    table = Table("noise", "threads", "wall ms", "processor ms", "ns an element")
    rows = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        rows += rows_of(noise)
    for row in rows:
        *names, wall, processor, each = row.values()
        cost = f"{wall:.0f}", f"{processor:.0f}", f"{each:.0f}"
        table.add_row(*map(str, names), *cost)
    Console().print(table)
    facts = {
        **machine.facts("scipy"),
        "num_parameters": NUM_PARAMETERS,
        "more_noise": noise.std * noise.spacing / MECHANISM.noise_std - 1,
        "unsure_share": unsure_share(noise),
    }
    print(to_json(facts))
    if arguments.save:
        arguments.save.write_text(to_json({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
