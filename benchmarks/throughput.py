"""Views per second of one pass: ours, plain vmap(grad), and training without privacy.

One process, the same shapes for every path; warm-up, then the median of 20 passes.
A pass is forward, backward and, with privacy, the clipped sum of one microbatch.

    python benchmarks/throughput.py --save benchmarks/results/throughput_NAME.json
"""

import argparse
import contextlib
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.func import functional_call

from dpsgd.clipping import clipped_grad
from dpsgd.config import ModelConfig
from dpsgd.models import build_model, initialize, per_example_loss, trainable_params
from dpsgd.report import environment, to_json
from dpsgd.rng import RandomStreams
from dpsgd.trees import zeros_like

IMAGE_SHAPE, NUM_CLASSES = (3, 32, 32), 10
# Multiply-adds of one forward pass, of which training takes three, at 2 FLOP each.
GIGA_MACS = {16: 0.393, 40: 1.299}
WORK = {  # name: (depth, examples, views)
    "wrn16-4 K=16": (16, 128, 16),
    "wrn16-4 K=4": (16, 256, 4),
    "wrn16-4 K=1": (16, 512, 1),
    "wrn40-4 K=16": (40, 64, 16),
}
OPERATORS = ("fused_norm", "standardized_conv")
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


PATHS: dict[str, tuple[Callable[..., Callable[[], Any]], bool]] = {
    # name: (what builds a pass, whether layers use our operators)
    "non-private, eager": (non_private(compiled=False), False),
    "non-private, torch.compile": (non_private(compiled=True), False),
    "vmap(grad), eager": (private("eager"), False),
    "vmap(grad), torch.compile": (private("compile"), False),
    "dpsgd vmap, eager": (private("eager"), True),
    "dpsgd vmap, CUDA graph": (private("cuda_graph"), True),
    "dpsgd ghost, eager": (private("eager", "ghost"), True),
    "dpsgd ghost, CUDA graph": (private("cuda_graph", "ghost"), True),
}


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the median time of a pass."""
    on_gpu = device.type == "cuda"
    times = []
    for index in range(WARM_UPS + PASSES):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        if index >= WARM_UPS:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(work: str, path: str, device: torch.device) -> dict[str, Any]:
    """Measures one path on one work, in bfloat16 on CUDA and float32 on the CPU."""
    depth, num_examples, num_views = WORK[work]
    if device.type == "cpu":
        num_examples = max(1, 16 // num_views)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    config = ModelConfig(depth=depth, width=4, compute_dtype=dtype)
    model = build_model(config, image_shape=IMAGE_SHAPE, num_classes=NUM_CLASSES)
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    model.to(device)
    shape = (num_examples, num_views, *IMAGE_SHAPE)
    images = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
    images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    images = images.unflatten(0, shape[:2])  # as the loader lays them out
    labels = torch.randint(NUM_CLASSES, (num_examples,), device=device)
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    build, is_ours = PATHS[path]
    try:
        with contextlib.nullcontext() if is_ours else plain_operators():
            taken = seconds(build(model, images, labels), device)
    except torch.OutOfMemoryError:
        taken = math.inf  # shown as no views a second
    speed = num_examples * num_views / taken
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "work": work,
        "path": path,
        "examples": num_examples,
        "views": num_views,
        "milliseconds": 1e3 * taken,
        "views_per_second": speed,
        "peak_memory_gib": peak and peak / 2**30,
        "tflop_per_second": 6e-3 * GIGA_MACS[depth] * speed,
    }


def show(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Prints the table, with the ratio to compiled training without privacy."""
    base = {
        row["work"]: row["views_per_second"]
        for row in rows
        if row["path"] == "non-private, torch.compile"
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
    )
    for name in names:
        table.add_column(name, justify="left" if name in names[:2] else "right")
    for row in rows:
        speed, memory = row["views_per_second"], row["peak_memory_gib"]
        ratio = f"{speed / base[row['work']]:.2f}" if row["work"] in base else "-"
        cells = (f"{row['milliseconds']:.2f}", f"{speed:,.0f}", ratio)
        gib = f"{memory:.1f}" if memory else "-"
        tflops = f"{row['tflop_per_second']:.3g}"
        table.add_row(row["work"], row["path"], *cells, gib, tflops)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--paths", nargs="*", choices=list(PATHS), default=None)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    torch.backends.cudnn.benchmark = True
    paths = arguments.paths or [
        path for path in PATHS if device.type == "cuda" or "CUDA" not in path
    ]
    rows = []
    for work in arguments.work:
        for path in paths:
            rows.append(measure(work, path, device))
            print(to_json(rows[-1]), flush=True)
    facts = environment()
    show(rows, facts)
    if arguments.save:
        arguments.save.write_text(to_json({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
