"""Views per second of one pass: ours, plain vmap(grad), Opacus, and without privacy.

One process, the same shapes for every path; warm-up, then the median of 20 passes. On
a CPU the paths take turns, a pass each in every round. A pass is forward, backward and,
with privacy, the clipped sum of one microbatch.

    pip install opacus
    python benchmarks/throughput.py --save benchmarks/results/throughput_NAME.json \
        --plot benchmarks/results/throughput_NAME.png
    python benchmarks/throughput.py --work "nf-resnet-50 K=4" "nfnet-f3 K=4"

The large networks are measured only when they are asked for.
"""

import argparse
import contextlib
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.func import functional_call

from dpsgd.clipping import clipped_grad
from dpsgd.config import ModelConfig
from dpsgd.models import build_model, initialize, per_example_loss, trainable_params
from dpsgd.report import environment, to_json
from dpsgd.rng import RandomStreams
from dpsgd.trees import zeros_like

sys.path.insert(0, str(Path(__file__).resolve().parent))
import opacus_passes


@dataclass(frozen=True, kw_only=True)
class Work:
    """One microbatch of one network.

    Attributes:
        model: Settings of the network, but for its type.
        examples: M.
        views: K.
        giga_macs: Multiply-adds of one view's forward pass, of which training takes
            three, at 2 FLOP each.
        side: Of the images.
        classes: Of the classifier.
    """

    model: dict[str, Any]
    examples: int
    views: int
    giga_macs: float
    side: int = 32
    classes: int = 10

    def examples_on(self, device: torch.device) -> int:
        """Returns M, or few examples on the CPU."""
        return self.examples if device.type == "cuda" else max(1, 16 // self.views)

    @property
    def is_large(self) -> bool:
        """Whether it takes a GPU, and only some of the paths."""
        return self.side > 32


WRN_16, WRN_40 = ({"depth": depth, "width": 4} for depth in (16, 40))
NORM_FREE = {"normalization": "none", "skip_gain_init": 1.0}
NF_RESNET_50 = {"name": "nf_resnet", "depth": 50, **NORM_FREE}
NFNET_F3 = {"name": "nfnet", "variant": "F3", **NORM_FREE}
WORK = {
    "wrn16-4 K=16": Work(model=WRN_16, examples=128, views=16, giga_macs=0.393),
    "wrn16-4 K=4": Work(model=WRN_16, examples=256, views=4, giga_macs=0.393),
    "wrn16-4 K=1": Work(model=WRN_16, examples=512, views=1, giga_macs=0.393),
    "wrn40-4 K=16": Work(model=WRN_40, examples=64, views=16, giga_macs=1.299),
    "nf-resnet-50 K=4": Work(
        model=NF_RESNET_50,
        examples=64,
        views=4,
        giga_macs=4.089,
        side=224,
        classes=1000,
    ),
    "nfnet-f3 K=4": Work(
        model=NFNET_F3, examples=8, views=4, giga_macs=67.94, side=320, classes=1000
    ),
}
SMALL = [name for name, work in WORK.items() if not work.is_large]
OPERATORS = ("fused_norm", "standardized_conv")
DENSE_BF16_TFLOPS = 989  # of an H100 or H200 SXM, by the vendor's data sheet
WARM_UPS, PASSES = 3, 20


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Keeps layers on PyTorch's own operators; the clipped sum stays ours."""
    with contextlib.ExitStack() as stack:
        for name in OPERATORS:
            module = importlib.import_module(f"dpsgd.kernels.{name}")
            patch = mock.patch.object(module, "runs_on_triton", return_value=False)
            stack.enter_context(patch)
        yield


def private(execution: str, engine: str = "vmap") -> Callable[..., Callable[[], Any]]:
    """Returns what builds a private pass."""

    def build(model, images, labels):
        params = trainable_params(model)
        total = zeros_like(params)
        mask = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        grad_fn = clipped_grad(
            per_example_loss(model),
            clipping_norm=1.0,
            engine=engine,
            execution=execution,
        )
        return lambda: grad_fn.accumulate(total, params, images, labels, mask=mask)

    return build


def non_private(*, compiled: bool) -> Callable[..., Callable[[], Any]]:
    """Returns what builds an ordinary forward and backward pass."""

    def build(model, images, labels):
        params = {
            name: leaf.requires_grad_() for name, leaf in model.named_parameters()
        }
        images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        labels = labels.repeat_interleave(images.shape[0] // len(labels))

        def loss(images, labels):
            return F.cross_entropy(functional_call(model, params, (images,)), labels)

        loss = torch.compile(loss) if compiled else loss
        return lambda: torch.autograd.grad(loss(images, labels), list(params.values()))

    return build


def network(work: Work, dtype: str) -> nn.Module:
    """Returns our network."""
    config = ModelConfig(**work.model, compute_dtype=dtype)
    shape = (3, work.side, work.side)
    model = build_model(config, image_shape=shape, num_classes=work.classes)
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    return model


def plain_network(work: Work, dtype: str) -> nn.Module:
    """Returns the Wide-ResNet that Opacus can take."""
    del dtype  # float32, of which autocast makes what it is
    return opacus_passes.plain_wide_resnet(
        work.model["depth"], 4, in_channels=3, num_classes=work.classes
    )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to take a pass.

    Attributes:
        build: Returns a pass of a network, images (M, K, ...) and labels (M,).
        network: Builds the network of a work, in a type.
        uses_our_operators: Whether layers use our kernels.
        views: The only number of views that it can take; None takes any.
    """

    build: Callable[..., Callable[[], Any]]
    network: Callable[[Work, str], nn.Module] = network
    uses_our_operators: bool = False
    views: int | None = None

    def takes(self, work: Work) -> bool:
        """Returns whether it is measured on a work."""
        if work.is_large and self.network is plain_network:
            return False
        return self.views in (None, work.views)


def _ours(execution: str, engine: str) -> Contender:
    return Contender(build=private(execution, engine), uses_our_operators=True)


COMPILED = "non-private, torch.compile"
PATHS: dict[str, Contender] = {
    "non-private, eager": Contender(build=non_private(compiled=False)),
    COMPILED: Contender(build=non_private(compiled=True)),
    "Opacus, hooks": Contender(build=opacus_passes.hooks, network=plain_network),
    "Opacus, ghost": Contender(
        build=opacus_passes.ghost, network=plain_network, views=1
    ),
    "vmap(grad), eager": Contender(build=private("eager")),
    "vmap(grad), torch.compile": Contender(build=private("compile")),
    "dpsgd vmap, eager": _ours("eager", "vmap"),
    "dpsgd vmap, CUDA graph": _ours("cuda_graph", "vmap"),
    "dpsgd ghost, eager": _ours("eager", "ghost"),
    "dpsgd ghost, CUDA graph": _ours("cuda_graph", "ghost"),
}


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the time of one pass."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def operators_of(path: str) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which a path is built and taken."""
    ours = PATHS[path].uses_our_operators
    return contextlib.nullcontext() if ours else plain_operators()


def prepared(work: Work, path: str, device: torch.device) -> Callable[[], Any]:
    """Returns a pass of a path, in bfloat16 on CUDA and float32 on the CPU."""
    num_examples, num_views = work.examples_on(device), work.views
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = PATHS[path].network(work, dtype).to(device)
    shape = (num_examples, num_views, 3, work.side, work.side)
    images = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
    images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    images = images.unflatten(0, shape[:2])  # as the loader lays them out
    labels = torch.randint(work.classes, (num_examples,), device=device)
    return PATHS[path].build(model, images, labels)


def rounds(
    work: Work, paths: list[str], device: torch.device
) -> list[dict[str, float]]:
    """Returns seconds of every path in every round, one pass each.

    What else a machine does then slows all of them, and a ratio can be the median over
    rounds of what it was in each.
    """
    torch.compiler.reset()
    runs = {}
    for path in paths:
        with operators_of(path):
            runs[path] = prepared(work, path, device)
    taken = []
    for _ in range(WARM_UPS + PASSES):
        times = {}
        for path, run in runs.items():
            with operators_of(path):
                times[path] = seconds(run, device)
        taken.append(times)
    return taken[WARM_UPS:]


def measure_on_gpu(name: str, path: str, device: torch.device) -> dict[str, Any]:
    """Measures one path on one work by itself, and its memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
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
    """Draws bars of views a second, one group for each work."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    figure, panels = plt.subplots(
        1, len(works), figsize=(4.2 * len(works), 3.6), squeeze=False
    )
    for panel, work in zip(panels[0], works, strict=True):
        shown = [row for row in reversed(rows) if row["work"] == work]
        speeds = [row["views_per_second"] for row in shown]
        ours = [row["path"].startswith("dpsgd") for row in shown]
        bars = panel.barh(
            [row["path"] for row in shown],
            speeds,
            color=["#1f6feb" if is_ours else "#9aa4b2" for is_ours in ours],
        )
        panel.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        panel.set_title(work, fontsize=10)
        panel.set_xlabel("views / s", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.margins(x=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{facts['device']}, torch {facts['versions']['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=SMALL)
    parser.add_argument("--paths", nargs="*", choices=list(PATHS), default=None)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    torch.backends.cudnn.benchmark = True
    paths = arguments.paths or [
        path for path in PATHS if device.type == "cuda" or "CUDA" not in path
    ]
    rows = []
    for work in arguments.work:
        fitting = [path for path in paths if PATHS[path].takes(WORK[work])]
        if device.type == "cpu":
            rows += measure_in_turn(work, fitting, device)
            print(to_json(rows[-len(fitting) :]), flush=True)
            continue
        for path in fitting:
            rows.append(measure_on_gpu(work, path, device))
            print(to_json(rows[-1]), flush=True)
    facts = environment()
    show(rows, facts)
    if arguments.save:
        arguments.save.write_text(to_json({**facts, "rows": rows}, indent=1) + "\n")
    if arguments.plot:
        draw(rows, facts, arguments.plot)


if __name__ == "__main__":
    main()
