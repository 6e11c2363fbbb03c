"""Whether the loader keeps a GPU busy: passes of NF-ResNet-50 on views from a store.

    python benchmarks/feeding.py --save benchmarks/results/loading_NAME.json

JPEG files of 500x375 pixels are packed, and drawn at random as a training step draws
them: decoded by workers, copied to pinned memory and on to the device ahead of their
use, where K views are cut. Three times are taken over the same microbatches: loading
alone, private passes alone on one microbatch that is there already, and both, as in
training. The share of the passes in the last is how busy the loader keeps the device.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dpsgd.clipping import clipped_grad
from dpsgd.config import DataConfig
from dpsgd.data import Resizing, ViewLoader, load_datasets, open_source, prepare
from dpsgd.models import per_example_loss, trainable_params
from dpsgd.report import to_json
from dpsgd.rng import RandomStreams
from dpsgd.trees import zeros_like

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
from loading import SIZE, photographs, write_folder
from throughput_paths import WORK, Work, network


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def loader(
    folder: Path, work: Work, workers: int, device: torch.device, dtype: torch.dtype
) -> ViewLoader:
    """Returns what training makes its microbatches with."""
    config = DataConfig(
        source="store",
        train=str(folder / "store"),
        test=str(folder / "test"),
        image_size=work.side,
        augmentation="scaled_crop_flip",
        augmentation_multiplicity=work.views,
    )
    return ViewLoader(
        load_datasets(config).train.placed(device, num_workers=workers),
        config=config,
        streams=RandomStreams.from_seed(0),
        microbatch_size=work.examples_on(device),
        dtype=dtype,
        device=device,
    )


def private_pass(
    work: Work, device: torch.device, dtype: torch.dtype
) -> Callable[..., object]:
    """Returns a private pass as training takes it: images, labels and mask."""
    model = network(work, str(dtype).removeprefix("torch.")).to(device)
    params = trainable_params(model)
    total = zeros_like(params)
    grad_fn = clipped_grad(
        per_example_loss(model),
        clipping_norm=1.0,
        engine="ghost",
        execution="cuda_graph" if device.type == "cuda" else "eager",
    )
    return lambda images, labels, mask: grad_fn.accumulate(
        total, params, images, labels, mask=mask
    )


def seconds(run: Callable[[], object]) -> float:
    """Returns the time of a run, until the device has done its work."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def measure(
    folder: Path,
    name: str,
    *,
    batches: int,
    workers: int,
    warm_up: float,
    device: torch.device,
) -> dict[str, Any]:
    """Takes the three times on a work, by its name, once loading has warmed up."""
    work = WORK[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    load = loader(folder, work, workers, device, dtype)
    take = private_pass(work, device, dtype)
    rows = np.random.default_rng(0).permutation(len(list(folder.glob("images/*/*"))))
    size = work.examples_on(device)
    count = batches * size
    draw = np.resize(rows, count)  # some more than once: as many images as wanted

    def loads() -> None:
        for _ in load(draw, 0):
            pass

    def passes() -> None:
        for _ in range(batches):
            take(*batch)

    def both() -> None:
        for loaded in load(draw, 0):
            take(*loaded)

    batch = next(iter(load(draw[:size], 0)))
    take(*batch)  # is recorded
    until = time.monotonic() + warm_up
    loads()
    while time.monotonic() < until:  # workers start one by one, when they are wanted
        loads()
    found = {run.__name__: seconds(run) for run in (loads, passes, both)}
    return {
        "work": name,
        "examples": count,
        "views": work.views,
        "microbatch_size": size,
        **{f"{name}_images_per_second": count / took for name, took in found.items()},
        **{
            f"{name}_views_per_second": count * work.views / took
            for name, took in found.items()
        },
        "busy_share": found["passes"] / found["both"],
    }


def show(row: dict[str, Any]) -> None:
    """Prints the table."""
    table = Table(title=f"{row['work']}, {row['microbatch_size']} examples a pass")
    for name in ("what", "images/s", "views/s"):
        table.add_column(name, justify="left" if name == "what" else "right")
    words = {"loads": "loader alone", "passes": "passes alone", "both": "passes, fed"}
    for name, word in words.items():
        rates = (row[f"{name}_{one}_per_second"] for one in ("images", "views"))
        table.add_row(word, *(f"{rate:,.0f}" for rate in rates))
    console = Console(width=100)
    console.print(table)
    console.print(f"busy share: {row['busy_share']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=512, help="different images")
    parser.add_argument("--batches", type=int, default=40, help="microbatches a run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--warm-up", type=float, default=20, help="seconds of loading")
    parser.add_argument("--device", default=None)
    parser.add_argument("--work", choices=list(WORK), default="nf-resnet-50 K=4")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        images = photographs(None, arguments.count)
        size = write_folder(folder / "images", images)
        for store in ("store", "test"):
            source = open_source(str(folder / "images"))
            prepare(source, folder / store, resizing=Resizing())
        row = measure(
            folder,
            arguments.work,
            batches=arguments.batches,
            workers=arguments.workers,
            warm_up=arguments.warm_up,
            device=torch.device(name),
        )
    show(row)
    facts = {
        **machine.facts(),
        "workers": arguments.workers,
        "image_size": SIZE,
        "mean_bytes": size,
        "images": arguments.count,
    }
    if arguments.save:
        arguments.save.write_text(to_json({**facts, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
