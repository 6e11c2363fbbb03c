"""Time of each fused operator, the least that its work can take, and its error.

The least time is what a copy takes for the bytes that must be moved, or a matrix
product for the multiplications, whichever is longer; both are measured in the same run.
The error is the largest difference from float64, over the largest value.

    python benchmarks/kernels.py --save benchmarks/results/kernels_NAME.json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dpsgd.report import to_json

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
from kernel_cases import CASES
from kernel_work import Case, Work

COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
PRODUCT_SIDE = {"cuda": 8192, "cpu": 512}
CLEARED_BYTES = 1 << 32
WARM_UPS, PASSES = 2, 9


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the median time, on CUDA from a cold cache and without the launch."""
    timed = seconds_on_cuda if device.type == "cuda" else seconds_on_cpu
    return statistics.median([timed(run) for _ in range(WARM_UPS + PASSES)][WARM_UPS:])


def seconds_on_cpu(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def seconds_on_cuda(run: Callable[[], Any]) -> float:
    # Clears the cache, and keeps the GPU busy until the launch has been prepared.
    torch.zeros(CLEARED_BYTES, dtype=torch.uint8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return 1e-3 * start.elapsed_time(stop)


def speed_of_light(device: torch.device) -> tuple[float, float]:
    """Returns bytes a second of a copy, and FLOP a second of a matrix product."""
    source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), device)
    side = PRODUCT_SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    factor = torch.randn(side, side, device=device).to(dtype)
    return copied, 2 * side**3 / seconds(lambda: factor @ factor, device)


def largest_error(case: Case) -> float:
    """Returns the largest error of any result, over the largest value of it."""
    errors = []
    for exact, mine in zip(case.exact(), case.run(), strict=True):
        largest = float((mine.double() - exact).abs().max())
        errors.append(largest / float(exact.abs().max()))
    return max(errors)


def measure(
    name: str, work: Work, trial: Work, rates: tuple[float, float]
) -> dict[str, Any]:
    """Times an operator on the work, and takes its error on a part of it."""
    error = largest_error(CASES[name](trial))
    case = CASES[name](work)
    taken = seconds(case.run, work.device)
    least = max(case.num_bytes / rates[0], case.num_flops / rates[1])
    return {
        "operator": name,
        "milliseconds": 1e3 * taken,
        "least_milliseconds": 1e3 * least,
        "share_of_least": least / taken,
        "gigabytes_per_second": 1e-9 * case.num_bytes / taken,
        "tflop_per_second": 1e-12 * case.num_flops / taken,
        "error": error,
    }


def show(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Prints the table."""
    work = f"{facts['examples']} x {facts['views']} views, side {facts['side']} for 32"
    table = Table(
        title=f"{facts['device']}, torch {facts['versions']['torch']}; {work}",
        caption=f"copy {facts['copy_gigabytes_per_second']:,.0f} GB/s, matrix product "
        f"{facts['product_tflop_per_second']:,.3g} TFLOP/s",
    )
    for column in (
        "operator",
        "ms",
        "least ms",
        "of least",
        "GB/s",
        "TFLOP/s",
        "error",
    ):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for row in rows:
        flops = row["tflop_per_second"]
        table.add_row(
            row["operator"],
            f"{row['milliseconds']:.3f}",
            f"{row['least_milliseconds']:.3f}",
            f"{row['share_of_least']:.0%}",
            f"{row['gigabytes_per_second']:,.0f}",
            f"{flops:,.3g}" if flops else "-",
            f"{row['error']:.0e}",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--operators", nargs="*", choices=list(CASES), default=CASES)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    work = Work(examples=2, views=2, width=1, side=8, device=device)
    if device.type == "cuda":
        work = Work(examples=128, views=16, width=4, side=32, device=device)
    trial = work._replace(examples=2)  # what float64 has room for
    rates = speed_of_light(device)
    rows = []
    for operator in arguments.operators:
        rows.append(measure(operator, work, trial, rates))
        print(to_json(rows[-1]), flush=True)
    facts = machine.facts() | {
        "examples": work.examples,
        "views": work.views,
        "side": work.side,
        "copy_gigabytes_per_second": 1e-9 * rates[0],
        "product_tflop_per_second": 1e-12 * rates[1],
    }
    show(rows, facts)
    if arguments.save:
        arguments.save.write_text(to_json({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
