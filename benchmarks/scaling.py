"""One run on 1, 2, ... ranks: speed, memory, communication, and that they agree.

python benchmarks/scaling.py configs/digits.yaml --ranks 1 2 4 --save OUT.json

Each row is a run of its own processes, on one GPU each where there are GPUs, else on
the CPU, where ranks share the cores: there it shows that results agree, and no speed.
The time of communication includes waiting for the slowest rank. Figures follow the
sizes of the draws: measure on public data.
"""

import argparse
import json
import math
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from dpsgd.assembly import assemble
from dpsgd.checkpoint import CheckpointStore
from dpsgd.config import load_config
from dpsgd.data import LoadAhead
from dpsgd.errors import ConfigError, UserError, fault
from dpsgd.parallel import Layout, joined
from dpsgd.report import to_json
from dpsgd.run import Run, TrainState
from dpsgd.train import train_step
from dpsgd.trees import Params, zeros_like

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

WARM_UPS = 2
MIB = 2**20
MODES = ["ddp", "fsdp"]


class Watch:
    """Adds up the time that is spent inside it, when the device has done its work."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what happens in this context."""
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds += time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_communication(watch: Watch) -> None:
    """Lets gathering and sum over ranks count on a watch."""
    total, gathered = Layout.total, Layout.gathered

    def timed_total(self: Layout, clipped_sum: Any) -> Any:
        with watch.running():
            return total(self, clipped_sum)

    @contextmanager
    def timed_gathered(self: Layout, params: Any) -> Iterator[Any]:
        context = gathered(self, params)
        with watch.running():
            whole = context.__enter__()
        yield whole
        context.__exit__(None, None, None)

    Layout.total, Layout.gathered = timed_total, timed_gathered  # type: ignore[method-assign]


def warm_up(run: Run, params: Params, microbatch_size: int) -> None:
    """Takes a pass of both sizes that a draw is cut into, as kernels are new then."""
    with run.layout.gathered(params) as whole:
        for size in (microbatch_size, math.ceil(microbatch_size / 2)):
            rows = np.zeros(size * run.ranks.size, np.int64)
            for *batch, mask in run.load_views(rows, 0):
                run.grad_fn.accumulate(zeros_like(whole), whole, *batch, mask=mask)


def ahead_of(run: Run, state: TrainState) -> Callable[[], None]:
    """Returns what takes a step, and begins the next one as training does."""
    ahead = LoadAhead(run.load_views)
    run = replace(run, load_views=ahead)

    def take() -> None:
        train_step(run, state)
        ahead.begin(run.sampler.draw(state.step), state.step)

    return take


def work(arguments: argparse.Namespace) -> None:
    """Is one rank: takes the steps, and leaves what it measured in the folder."""
    config = load_config(arguments.config, arguments.set)
    folder, steps, watch = arguments.folder, arguments.steps, Watch()
    with joined(config) as ranks:
        store = CheckpointStore(folder / "checkpoints", keep=1)  # nothing is saved
        run, state, plan = assemble(config, store=store, ranks=ranks)
        take = ahead_of(run, state)
        warm_up(run, state.params, plan.microbatch_size)
        for _ in range(WARM_UPS):
            take()
        time_communication(watch)
        ranks.meet()
        whole = Watch()
        with whole.running():
            for _ in range(steps):
                take()
        trees = [state.params, state.ema or {}, state.optimizer.momenta() or {}]
        held = sum(leaf.nbytes for tree in trees for leaf in tree.values())
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        on_gpu = plan.device.type == "cuda"
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
        views = plan.mechanism.expected_batch_size * config.views_per_unit
        row = {
            "views_per_second": views * steps / whole.seconds,
            "seconds_per_step": whole.seconds / steps,
            "communication_share": watch.seconds / whole.seconds,
            "state_mib": held / MIB,
            "peak_mib": peak / MIB,
            "device": torch.cuda.get_device_name() if on_gpu else machine.processor(),
        }
        (folder / f"{ranks.rank}.json").write_text(to_json(row))
        weights = run.layout.whole(state.params)
        on_cpu = {name: leaf.cpu() for name, leaf in weights.items()}
        if ranks.is_first:
            save_file(on_cpu, folder / "w")


def launch(command: list[str], size: int) -> None:
    """Runs a command on so many ranks of this machine.

    Raises:
        SystemExit: One of them failed; it has said why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(size)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"ranks ended with the exit codes {codes}")


def start(
    arguments: argparse.Namespace, mode: str, size: int, folder: Path
) -> dict[str, Any]:
    """Runs so many ranks, and returns what the slowest and the largest of them say."""
    settings = [*arguments.set, f"runtime.parallel={mode}"]
    command = [sys.executable, __file__, str(arguments.config)]
    command += ["--steps", str(arguments.steps), "--folder", str(folder), "--set"]
    folder.mkdir()
    launch([*command, *settings], size)
    rows = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    row = {key: max(one[key] for one in rows) for key in rows[0]}
    row["views_per_second"] = min(one["views_per_second"] for one in rows)
    each = [
        {key: one[key] for key in ("seconds_per_step", "communication_share")}
        for one in rows
    ]
    return {"parallel": mode, "ranks": size, **row, "each_rank": each}


def difference(folder: Path, other: Path) -> float:
    """Returns the largest difference of any parameter."""
    one, two = load_file(folder / "w"), load_file(other / "w")
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for every number of ranks and mode, the first alone."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for mode, size in [
            ("none", 1),
            *((mode, size) for mode in arguments.modes for size in arguments.ranks),
        ]:
            place = folder / f"{mode}-{size}"
            row = start(arguments, mode, size, place)
            alone = rows[0] if rows else row
            speed = row["views_per_second"] / alone["views_per_second"]
            row["efficiency"] = speed / size
            row["difference_to_one"] = difference(place, folder / "none-1")
            rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Returns what is shown."""
    heads = ["parallel", "ranks", "views/s", "efficiency", "communication"]
    table = Table(*heads, "state MiB", "peak MiB", "differs by")
    for row in rows:
        table.add_row(
            row["parallel"],
            str(row["ranks"]),
            f"{row['views_per_second']:,.0f}",
            f"{row['efficiency']:.0%}",
            f"{row['communication_share']:.0%}",
            f"{row['state_mib']:.3f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['difference_to_one']:.1e}",
        )
    return table


def check_counts(counts: dict[str, int], ranks: list[int], device: str) -> None:
    """Raises ConfigError if there is nothing to measure, or no device for a rank.

    Args:
        counts: What must be at least 1, by the names of options.
        ranks: Numbers of ranks.
        device: As `runtime.device`.
    """
    faults = [
        fault(option, count, "must be at least 1", "raise it")
        for option, count in [*counts.items(), *(("--ranks", size) for size in ranks)]
        if count < 1
    ]
    devices = torch.cuda.device_count()
    if device != "cpu" and torch.cuda.is_available() and max(ranks) > devices:
        rule = f"this machine has {devices} CUDA devices"
        faults.append(fault("--ranks", max(ranks), rule, "take at most as many"))
    if faults:
        raise ConfigError("\n".join(faults))


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError if settings are at fault, or their runs cannot be compared."""
    config = load_config(arguments.config, arguments.set)
    check_counts({"--steps": arguments.steps}, arguments.ranks, config.runtime.device)
    if config.train.seed is None:
        rule = "every run would draw its own parameters, and none could be compared"
        raise ConfigError(fault("train.seed", None, rule, "--set train.seed=0"))
    if config.runtime.parallel != "none":
        rule = "every mode is run by itself"
        remedy = "choose with --modes"
        raise ConfigError(
            fault("runtime.parallel", config.runtime.parallel, rule, remedy)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.folder is not None:
            work(arguments)
            return
        check(arguments)
    except UserError as error:
        raise SystemExit(str(error)) from None
    rows = measured(arguments)
    Console(width=100).print(table_of(rows))
    if arguments.save:
        facts = {
            "config": str(arguments.config),
            "set": arguments.set,
            "steps": arguments.steps,
            **machine.facts(),
        }
        arguments.save.write_text(to_json({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
