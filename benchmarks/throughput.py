"""Views per second of one pass: ours, plain vmap(grad), Opacus, and without privacy.

One process, the same shapes for every path; warm-up, then the median of 20 passes. On
a CPU the paths take turns, a pass each in every round. A pass is forward, backward and,
with privacy, the clipped sum of one microbatch.

    pip install --editable '.[opacus]'
    python benchmarks/throughput.py --save benchmarks/results/throughput_NAME.json \
        --plot benchmarks/results/throughput_NAME.svg
    python benchmarks/throughput.py --work "nf-resnet-50 K=4" "nfnet-f3 K=4"
    python benchmarks/throughput.py --from A.json B.json --plot AB.svg

The large networks are measured only when they are asked for.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dpsgd.report import to_json
from dpsgd.report.drawing import LIGHT, new_axes, to_svg

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
from throughput_paths import COMPILED, PATHS, SMALL, WORK, Work, prepared

DENSE_BF16_TFLOPS = 989  # of an H100 or H200 SXM, by the vendor's data sheet
WARM_UPS, PASSES = 3, 20


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the time of one pass."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def start_afresh(device: torch.device) -> None:
    """Drops what earlier paths left, which counts as memory of the next one otherwise.

    That is compiled code with its graphs, and recordings, which lie in cycles.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def rounds(
    work: Work, paths: list[str], device: torch.device
) -> list[dict[str, float]]:
    """Returns seconds of every path in every round, one pass each.

    What else a machine does then slows all of them, and a ratio can be the median over
    rounds of what it was in each.
    """
    start_afresh(device)
    runs = {}
    for path in paths:
        with PATHS[path].operators():
            runs[path] = prepared(work, path, device)
    taken = []
    for _ in range(WARM_UPS + PASSES):
        times = {}
        for path, run in runs.items():
            with PATHS[path].operators():
                times[path] = seconds(run, device)
        taken.append(times)
    return taken[WARM_UPS:]


def measure_on_gpu(name: str, path: str, device: torch.device) -> dict[str, Any]:
    """Measures one path on one work by itself, and its memory."""
    try:
        times = [one[path] for one in rounds(WORK[name], [path], device)]
    except torch.OutOfMemoryError:
        times = [math.inf]  # shown as no views a second
    found = row_of(name, path, device, statistics.median(times))
    found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    used = found["tflop_per_second"] / DENSE_BF16_TFLOPS
    return {**found, "model_flop_utilisation": used}


def measure_in_turn(
    name: str, paths: list[str], device: torch.device
) -> list[dict[str, Any]]:
    """Measures paths on one work on the CPU, and by how much they pass each other."""
    taken = rounds(WORK[name], paths, device)
    rows = []
    for path in paths:
        times = [one[path] for one in taken]
        found = row_of(name, path, device, statistics.median(times))
        found["least_milliseconds"] = 1e3 * min(times)
        found["speed_over"] = {
            other: statistics.median(one[other] / one[path] for one in taken)
            for other in paths
            if other != path
        }
        rows.append(found)
    return rows


def row_of(name: str, path: str, device: torch.device, taken: float) -> dict[str, Any]:
    """Returns what is said of a path that takes so many seconds."""
    work = WORK[name]
    num_examples = work.examples_on(device)
    speed = num_examples * work.views / taken
    return {
        "work": name,
        "path": path,
        "examples": num_examples,
        "views": work.views,
        "milliseconds": 1e3 * taken,
        "views_per_second": speed,
        "peak_memory_gib": None,
        "tflop_per_second": 6e-3 * work.giga_macs * speed,
        "model_flop_utilisation": None,
    }


def show(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Prints the table, with the ratio to compiled training without privacy."""
    base = {
        row["work"]: row["views_per_second"] for row in rows if row["path"] == COMPILED
    }
    table = Table(title=f"{facts['device']}, torch {facts['versions']['torch']}")
    names = (
        "work",
        "path",
        "ms",
        "views/s",
        "of compiled non-private",
        "GiB",
        "TFLOP/s",
        "MFU",
    )
    for name in names:
        table.add_column(name, justify="left" if name in names[:2] else "right")
    for row in rows:
        speed, memory = row["views_per_second"], row["peak_memory_gib"]
        ratio = f"{speed / base[row['work']]:.2f}" if row["work"] in base else "-"
        cells = (f"{row['milliseconds']:.2f}", f"{speed:,.0f}", ratio)
        gib = f"{memory:.1f}" if memory else "-"
        tflops = f"{row['tflop_per_second']:.3g}"
        used = row["model_flop_utilisation"]
        share = f"{used:.1%}" if used else "-"
        table.add_row(row["work"], row["path"], *cells, gib, tflops, share)
    Console(width=130).print(table)


def draw(rows: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Draws bars of views a second as SVG, one group for each work."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    title = f"Views/s, {facts['device']}"
    lines = [
        line
        for work in works
        for line in (work, *(row for row in rows if row["work"] == work))
    ]
    with new_axes(title, height=0.7 + 0.21 * len(lines)) as axes:
        bars = {at: line for at, line in enumerate(lines) if line not in works}
        drawn = axes.barh(
            list(bars),
            [row["views_per_second"] for row in bars.values()],
            color=[
                LIGHT["series-1" if row["path"].startswith("dpsgd") else "bar"]
                for row in bars.values()
            ],
        )
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set_yticks(list(bars), [row["path"] for row in bars.values()], fontsize=8)
        for at, work in enumerate(lines):
            if work in works:
                axes.text(0, at, f" {work}", weight="bold", fontsize=8, va="center")
        axes.set_ylim(len(lines) - 0.5, -0.7)
        axes.margins(x=0.25)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        path.write_text(to_svg(axes.figure, path.stem, is_inline=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=SMALL)
    parser.add_argument("--paths", nargs="*", choices=list(PATHS), default=None)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--from",
        dest="saved",
        nargs="+",
        type=Path,
        metavar="SAVED.json",
        help="show what was saved, of one machine, and measure nothing",
    )
    arguments = parser.parse_args()
    facts, rows = read(arguments.saved) if arguments.saved else measured(arguments)
    show(rows, facts)
    if arguments.plot:
        draw(rows, facts, arguments.plot)


def read(saved: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns facts and rows of saved files, in the order of works and paths here.

    Raises:
        SystemExit: They were measured on different devices or versions.
    """
    files = [json.loads(path.read_text()) for path in saved]
    told = {(one["device"], one["versions"]["torch"]) for one in files}
    if len(told) > 1:
        raise SystemExit(f"--from: devices or versions differ, {sorted(told)}")
    rows = [row for one in files for row in one["rows"]]
    works, paths = list(WORK), list(PATHS)
    rows.sort(key=lambda row: (works.index(row["work"]), paths.index(row["path"])))
    return files[0], rows


def measured(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures what is asked for, and returns facts of the machine and rows."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    torch.backends.cudnn.benchmark = True
    paths = arguments.paths or [
        path for path in PATHS if device.type == "cuda" or "CUDA" not in path
    ]
    facts, rows = machine.facts(), []
    for work in arguments.work:
        fitting = [path for path in paths if PATHS[path].takes(WORK[work])]
        measured = (
            measure_in_turn(work, fitting, device)
            if device.type == "cpu"
            else (measure_on_gpu(work, path, device) for path in fitting)
        )
        for row in measured:
            print(to_json(row), flush=True)
            rows.append(row)
            if arguments.save:  # after every row: a later path may fail
                text = to_json({**facts, "rows": rows}, indent=1)
                arguments.save.write_text(text + "\n")
    return facts, rows


if __name__ == "__main__":
    main()
