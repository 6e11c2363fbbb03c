"""Images a second that are decoded into views, beside a torchvision DataLoader.

    python benchmarks/loading.py --save benchmarks/results/loading_NAME.json

Both make the same transform of the same JPEG files: ours from a store, torchvision's
from the image folder that it was packed from. What is timed ends where images go to a
device: uint8, before normalisation. Images are drawn at random, each once a pass. Rates
are told per second of all cores, and per second of processor time of all processes,
which other work on the machine changes less.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from dpsgd.config import DataConfig
from dpsgd.data import Resizing, draw_views, load_datasets, open_source, prepare
from dpsgd.report import to_json
from dpsgd.rng import RandomStreams

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

SIZE = (500, 375)
VIEW, BATCH = 224, 64
NOISE, QUALITY = 16.0, 90
WARM_UPS, PASSES = 1, 5
NUM_CLASSES = 4
BICUBIC = InterpolationMode.BICUBIC
WORK = [(name, k) for name in ("scaled_crop_flip", "resized_crop_flip") for k in (1, 4)]


def photographs(source: str | None, count: int) -> Iterator[Image.Image]:
    """Yields small images upscaled, or smooth random ones, all with some noise."""
    rng = np.random.default_rng(0)
    encoded = None if source is None else open_source(source).encoded(0)
    for _ in range(count):
        if encoded is None:
            small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        else:
            small = Image.open(io.BytesIO(next(encoded).data)).convert("RGB")
        large = np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC), np.float32)
        noisy = large + NOISE * rng.standard_normal(large.shape, dtype=np.float32)
        yield Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_folder(root: Path, images: Iterator[Image.Image]) -> int:
    """Writes JPEG files in class folders; returns their mean size in bytes."""
    sizes = []
    for index, image in enumerate(images):
        path = root / f"class{index % NUM_CLASSES}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return round(statistics.mean(sizes))


class ViewsOfFolder(Dataset):
    """The same views as torchvision makes them: one decode, then K of each image."""

    def __init__(self, root: Path, augmentation: str, num_views: int) -> None:
        self.folder = ImageFolder(str(root))
        self.num_views = num_views
        if augmentation == "scaled_crop_flip":
            side = int(1.2 * VIEW)
            self.once = v2.Compose(
                [
                    lambda image: v2.functional.center_crop(image, [min(image.size)]),
                    v2.Resize((side, side), BICUBIC),
                    v2.PILToTensor(),
                ]
            )
            each: list[Any] = [v2.RandomCrop(VIEW)]
        else:
            self.once = v2.Identity()
            each = [v2.RandomResizedCrop(VIEW, interpolation=BICUBIC), v2.PILToTensor()]
        self.each = v2.Compose([*each, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.folder[index]
        image = self.once(image)
        return torch.stack([self.each(image) for _ in range(self.num_views)]), label


def torchvision_pass(root: Path, augmentation: str, num_views: int, workers: int):
    """Returns what loads all images once with PyTorch's loader."""
    loader = DataLoader(
        ViewsOfFolder(root, augmentation, num_views),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
    )

    def run() -> int:
        return sum(len(views) for views, _ in loader)

    return run


def our_pass(folder: Path, augmentation: str, num_views: int, workers: int):
    """Returns what loads all images once from a store."""
    config = DataConfig(
        source="store",
        train=str(folder / "store"),
        test=str(folder / "test"),
        image_size=VIEW,
        augmentation=augmentation,
        augmentation_multiplicity=num_views,
    )
    cpu = torch.device("cpu")
    dataset = load_datasets(config).train.placed(cpu, num_workers=workers)
    rng = RandomStreams.from_seed(0).generator("augmentation")

    def run() -> int:
        rows = torch.from_numpy(rng.permutation(len(dataset)))
        views = draw_views(
            rng,
            len(rows),
            augmentation=augmentation,
            crop_padding=0,
            augmentation_multiplicity=num_views,
            image_size=VIEW,
        )
        full, rest = divmod(len(rows), BATCH)
        sizes = [BATCH] * full + [rest] * (rest > 0)
        batches = dataset.batches(rows, sizes, crops=views.crops, device=cpu)
        return sum(len(images) for images, _ in batches)

    return run


def processor_seconds() -> float:
    """Returns the processor time of this process and of those that it started."""
    parents, times = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        times[number] = int(fields[11]) + int(fields[12])
    total = 0
    for number, ticks in times.items():
        above = number
        while above not in (0, os.getpid()):
            above = parents.get(above, 0)
        total += ticks if above else 0
    return total / os.sysconf("SC_CLK_TCK")


def measure(run: Callable[[], int]) -> tuple[float, float]:
    """Returns images a second of one pass, and images a second of processor time."""
    clock, used = time.perf_counter(), processor_seconds()
    count = run()
    clock, used = time.perf_counter() - clock, processor_seconds() - used
    return count / clock, count / used


def compare(
    folder: Path, augmentation: str, num_views: int, workers: int
) -> dict[str, Any]:
    """Measures both loaders on one work, in turn, so that both see the same machine."""
    how = (augmentation, num_views, workers)
    runs = {
        "dpsgd": our_pass(folder, *how),
        "torchvision": torchvision_pass(folder / "images", *how),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(WARM_UPS + PASSES):
        for name, run in runs.items():
            rate = measure(run)
            if number >= WARM_UPS:
                rates[name].append(rate)
    row: dict[str, Any] = {"augmentation": augmentation, "views": num_views}
    for name, found in rates.items():
        wall, processor = (statistics.median(one) for one in zip(*found, strict=True))
        row[name] = {
            "images_per_second": wall,
            "images_per_core_second": processor,
        }
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table(title="Images a second; in brackets a second of processor time")
    for name in ("transform", "K", "dpsgd", "torchvision", "ratio"):
        table.add_column(name, justify="left" if name == "transform" else "right")
    for row in rows:
        ours, theirs = row["dpsgd"], row["torchvision"]
        wall, core = "images_per_second", "images_per_core_second"
        cells = [f"{one[wall]:.0f} ({one[core]:.0f})" for one in (ours, theirs)]
        ratios = f"{ours[wall] / theirs[wall]:.2f} ({ours[core] / theirs[core]:.2f})"
        table.add_row(row["augmentation"], str(row["views"]), *cells, ratios)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", help="small images to upscale (default: random)")
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = photographs(arguments.source, arguments.count)
        size = write_folder(folder / "images", images)
        for store in ("store", "test"):
            source = open_source(str(folder / "images"))
            prepare(source, folder / store, resizing=Resizing())
        rows = [compare(folder, *work, arguments.workers) for work in WORK]
    show(rows)
    facts = {
        **machine.facts(),
        "workers": arguments.workers,
        "image_size": SIZE,
        "mean_bytes": size,
        "images": arguments.count,
        "upscaled": arguments.source is not None,
    }
    if arguments.save:
        arguments.save.write_text(to_json({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
