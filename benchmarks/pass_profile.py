"""Where the time of one pass goes: its kernels, or the operators of a CPU, by time.

    python benchmarks/pass_profile.py --work "nf-resnet-50 K=4" --save OUT.json

Passes are those of benchmarks/throughput.py. What a pass takes by a wall clock, without
the profiler, beyond its kernels is the last row: launches, and waiting for the host.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dpsgd.report import to_json

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
from throughput import seconds, start_afresh
from throughput_paths import PATHS, WORK, Work, prepared

WARM_UPS, PASSES = 3, 10
SHOWN = 30  # rows of the table; all are saved
LONGEST_NAME = 70


def profiled(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Returns name, milliseconds a pass and launches a pass of all kernels."""
    on_gpu = device.type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        for _ in range(PASSES):
            seconds(run, device)
    rows = []
    for event in found.key_averages():
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == kind and taken > 0:
            row = {"name": event.key, "milliseconds": 1e-3 * taken / PASSES}
            rows.append({**row, "launches": event.count / PASSES})
    return sorted(rows, key=lambda row: -row["milliseconds"])


def measure(work: Work, path: str, device: torch.device) -> dict[str, Any]:
    """Returns what a pass takes, and what takes it."""
    start_afresh(device)
    with PATHS[path].operators():
        run = prepared(work, path, device)
        for _ in range(WARM_UPS):
            run()
        taken = [seconds(run, device) for _ in range(PASSES)]
        rows = profiled(run, device)
    whole = 1e3 * statistics.median(taken)
    return {
        "milliseconds": whole,
        "between_kernels": whole - sum(row["milliseconds"] for row in rows),
        "kernels": rows,
    }


def show(found: dict[str, Any], title: str) -> None:
    """Prints the table."""
    table = Table(title=title)
    for name in ("kernel", "ms", "share", "launches"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    rows, whole = found["kernels"], found["milliseconds"]
    rest = sum(row["milliseconds"] for row in rows[SHOWN:])
    cells = [
        (row["name"][:LONGEST_NAME], row["milliseconds"], f"{row['launches']:.0f}")
        for row in rows[:SHOWN]
    ]
    cells.append((f"{len(rows[SHOWN:])} others", rest, ""))
    cells.append(("between kernels", found["between_kernels"], ""))
    for name, taken, launches in [*cells, ("a pass", whole, "")]:
        table.add_row(name, f"{taken:.3f}", f"{taken / whole:.1%}", launches)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--work", choices=list(WORK), default="wrn16-4 K=16")
    parser.add_argument("--path", choices=list(PATHS), default=None)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    torch.backends.cudnn.benchmark = True
    execution = "CUDA graph" if device.type == "cuda" else "eager"
    path = arguments.path or f"dpsgd ghost, {execution}"
    found = measure(WORK[arguments.work], path, device)
    show(found, f"{arguments.work}, {path}")
    if arguments.save:
        facts = {**machine.facts(), "work": arguments.work, "path": path}
        arguments.save.write_text(to_json({**facts, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
