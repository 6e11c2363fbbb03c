"""Whether a run depends on how many ranks take it: it must not, beyond rounding.

python benchmarks/equality.py --ranks 1 2 4 8 --save OUT.json

Two small networks take a few steps on made-up images, with float32, momentum and an
average, once alone and then on every number of ranks, with `ddp` and `fsdp`: on one GPU
each where there are GPUs, else on the CPU. Then every rank takes one more step, from
zero and without an example, which shows the noise alone; and what the ranks saved is
read by one process. Ends with 1 if anything is unequal.

A step is equal to rounding. Later steps let rounding grow, where a ReLU flips by it; a
row `none` shows by how much: of one process whose parameters are each changed in their
last bit after the first step.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from dpsgd.assembly import assemble
from dpsgd.checkpoint import CheckpointStore
from dpsgd.config import Config, parse_config
from dpsgd.errors import UserError
from dpsgd.models.nf_resnet import nf_resnet_design
from dpsgd.parallel import Ranks, joined
from dpsgd.report import to_json
from dpsgd.run import Run, TrainState
from dpsgd.train import train_step
from dpsgd.trees import Params, num_elements, sha256

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
import scaling

NETWORKS: dict[str, dict[str, Any]] = {
    "wide_resnet": {"name": "wide_resnet", "depth": 10, "width": 1},
    "nf_resnet": {
        "name": "nf_resnet",
        "depth": 50,  # see `small`
        "normalization": "none",
        "skip_gain_init": 1.0,
        "stochastic_depth": 0.1,
    },
}
NUM_EXAMPLES, NUM_TEST, NUM_CLASSES, SIDE = 48, 8, 4, 32
# Of float32 sums in another order, after one step; a skip gain is one number, of whose
# terms some cancel.
ROUNDING = 4e-6
GROWN = 0.03  # the same some steps later: one ReLU that flips moves a bias by 0.007
# One block at each size of images, and an eighth of the channels: eight processes on
# one machine have no room for more.
SMALL = {"depths": (1, 1, 1, 1), "widths": (32, 64, 128, 256)}
KINDS = ("params", "ema", "momenta")
VERDICTS = ("same_draws", "same_noise", "alike", "restored_by_one")


def settings(network: str, mode: str, arguments: argparse.Namespace) -> Config:
    """Returns the run; noise is small, or it would hide the sum in the parameters."""
    images = arguments.folder
    return parse_config(
        {
            "data": {
                "source": "image_folder",
                "train": str(images / "train"),
                "test": str(images / "test"),
                "num_examples": NUM_EXAMPLES,
                "augmentation": "crop_flip",
                "augmentation_multiplicity": 2,
            },
            "model": NETWORKS[network],
            "privacy": {
                "noise_multiplier": 0.01,
                "delta": 1e-3,
                "expected_batch_size": 12,
                "accountant": "rdp",
            },
            "optimizer": {"learning_rate": 0.5, "momentum": 0.9},
            "ema": {"decay": 0.9},
            "train": {"num_steps": arguments.steps + 1, "seed": 0},
            "runtime": {
                "device": arguments.device,
                "parallel": mode,
                "microbatch_size": 4,
            },
        }
    )


def small() -> Any:
    """Lets NF-ResNets be small inside this context."""
    design = dataclasses.replace(nf_resnet_design(50), **SMALL)
    name = "dpsgd.models.nf_resnet.nf_resnet_design"
    return mock.patch(name, return_value=design)


def write_images(folder: Path) -> None:
    """Writes random images of some classes, for training and for the test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_EXAMPLES), ("test", NUM_TEST)):
        for index in range(count):
            place = folder / split / f"class {index % NUM_CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{index:03d}.png")


@dataclasses.dataclass(frozen=True)
class NoDraw:
    """A sampler whose draws are all empty."""

    sample_rate: float

    def draw(self, step: int) -> NDArray[np.int64]:
        return np.empty(0, np.int64)


def noise_of_step(run: Run, state: TrainState) -> Params:
    """Returns what a step without examples makes of zeros: a multiple of its noise."""
    momenta = state.optimizer.momenta() or {}
    for leaf in (*state.params.values(), *momenta.values()):
        leaf.zero_()
    idle = dataclasses.replace(run, sampler=NoDraw(run.mechanism.sample_rate))
    train_step(idle, state)
    return dict(run.layout.whole(state.params))


def whole_state(run: Run, state: TrainState) -> Params:
    """Returns parameters, averages and momenta, gathered, on the CPU."""
    trees = (state.params, state.ema or {}, state.optimizer.momenta() or {})
    return {
        f"{kind}/{name}": leaf.to("cpu", copy=True)
        for kind, tree in zip(KINDS, trees, strict=True)
        for name, leaf in run.layout.whole(tree).items()
    }


def play(
    config: Config, ranks: Ranks, folder: Path, steps: int, *, nudged: bool = False
) -> None:
    """Takes the steps as one of the ranks, and leaves what came of them.

    Args:
        config: Settings.
        ranks: The processes.
        folder: Where to leave it.
        steps: How many.
        nudged: Whether parameters are changed in the last bit after the first.
    """
    folder.mkdir(exist_ok=True)
    store = CheckpointStore(folder / "checkpoints", keep=1)
    run, state, _ = assemble(config, store=store, ranks=ranks)
    held = num_elements(state.params)
    draws = [run.sampler.draw(step).tolist() for step in range(steps)]
    train_step(run, state)
    first = whole_state(run, state)
    if nudged:
        for leaf in state.params.values():
            leaf.copy_(torch.nextafter(leaf, torch.full_like(leaf, torch.inf)))
    while state.step < steps:
        train_step(run, state)
    run.save(state)
    whole = whole_state(run, state)
    noise = noise_of_step(run, state)
    facts = {
        "draws": draws,
        "noise": sha256(noise),
        "has_noise": all(bool(leaf.any()) for leaf in noise.values()),
        "state": sha256(whole),
        "held": held,
    }
    (folder / f"{ranks.rank}.json").write_text(to_json(facts))
    if ranks.is_first:
        save_file(first, folder / "first")
        save_file(whole, folder / "last")


def work(arguments: argparse.Namespace) -> None:
    """Is one rank, and takes all runs of this number of ranks, one after the other."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # or float32 would not be compared
    with joined(settings(arguments.networks[0], "fsdp", arguments)) as ranks:
        for network in arguments.networks:
            for mode in arguments.modes:
                config = settings(network, mode, arguments)
                play(config, ranks, arguments.folder / mode, arguments.steps)


def difference(folder: Path, alone: Path, state: str, *kinds: str) -> float:
    """Returns the largest relative difference of a leaf, by its L2 norm."""
    found, wanted = load_file(folder / state), load_file(alone / state)
    return max(
        float((found[name] - leaf).norm() / leaf.norm())
        for name, leaf in wanted.items()
        if name.startswith(kinds)
    )


def restored(config: Config, folder: Path) -> Params:
    """Returns the state that one process reads from what ranks have saved."""
    store = CheckpointStore(folder / "checkpoints", keep=1)
    run, state, _ = assemble(config, store=store, checkpoint=store.newest())
    return whole_state(run, state)


def compared(folder: Path, alone: Path, *, size: int, config: Config) -> dict[str, Any]:
    """Returns what a run has in common with that of one process.

    Args:
        folder: What came of its ranks.
        alone: The same of one process.
        size: How many ranks.
        config: Settings with which one process goes on.
    """
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    wanted = json.loads((alone / "0.json").read_text())
    noises = {one["noise"] for one in (*facts, wanted)}
    saved = load_file(folder / "last")
    return {
        "parameters": wanted["held"],
        "held_at_most": max(one["held"] for one in facts),
        "first_step": difference(folder, alone, "first", *KINDS),
        "params": difference(folder, alone, "last", "params"),
        "ema": difference(folder, alone, "last", "ema"),
        "same_draws": all(one["draws"] == wanted["draws"] for one in facts),
        "same_noise": len(noises) == 1 and wanted["has_noise"],
        "alike": len({one["state"] for one in facts}) == 1,
        "restored_by_one": sha256(restored(config, folder)) == sha256(saved),
    }


def rows_of(network: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for one process, and one for every number of ranks and mode."""
    alone = arguments.folder / "alone"
    config = settings(network, "none", arguments)
    play(config, Ranks(), alone, arguments.steps)
    kind = {"network": network, "parallel": "none", "ranks": 1}
    place = arguments.folder / "none"
    play(config, Ranks(), place, arguments.steps, nudged=True)
    yield {**kind, **compared(place, alone, size=1, config=config)}
    for size in arguments.ranks:
        command = [sys.executable, __file__, "--networks", network]
        command += ["--modes", *arguments.modes, "--device", arguments.device]
        command += ["--steps", str(arguments.steps), "--folder", str(arguments.folder)]
        scaling.launch(command, size)
        for mode in arguments.modes:
            place = arguments.folder / mode
            kind = {"network": network, "parallel": mode, "ranks": size}
            yield {**kind, **compared(place, alone, size=size, config=config)}
            shutil.rmtree(place)


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows of all networks."""
    rows = []
    for network in arguments.networks:
        with tempfile.TemporaryDirectory() as name:
            arguments.folder = Path(name)
            write_images(arguments.folder)
            rows += rows_of(network, arguments)
    return rows


def is_equal(row: dict[str, Any]) -> bool:
    """Returns whether a run is that of one process."""
    is_close = row["first_step"] < ROUNDING and max(row["params"], row["ema"]) < GROWN
    return is_close and all(row[verdict] for verdict in VERDICTS)


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Returns what is shown."""
    heads = ["network", "parallel", "ranks", "held", "first step", "parameters"]
    table = Table(*heads, "average", "draws", "noise", "ranks", "read by one")
    for row in rows:
        table.add_row(
            row["network"],
            row["parallel"],
            str(row["ranks"]),
            f"{row['held_at_most'] / row['parameters']:.1%}",
            f"{row['first_step']:.1e}",
            f"{row['params']:.1e}",
            f"{row['ema']:.1e}",
            *("equal" if row[verdict] else "no" for verdict in VERDICTS),
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--modes", nargs="+", choices=scaling.MODES)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(modes=scaling.MODES, networks=[*NETWORKS])
    arguments = parser.parse_args()
    try:
        if arguments.folder is not None:
            with small():
                work(arguments)
            return 0
        counts = {"--steps": arguments.steps}
        scaling.check_counts(counts, arguments.ranks, arguments.device)
    except UserError as error:
        raise SystemExit(str(error)) from None
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    with small():
        rows = measured(arguments)
    Console(width=120).print(table_of(rows))
    if arguments.save:
        facts = {"steps": arguments.steps, **machine.facts(), "rows": rows}
        arguments.save.write_text(to_json(facts, indent=1) + "\n")
    return 0 if all(is_equal(row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
