"""Image folders and stores of a few small images, each unlike the others."""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from dpsgd.data import Resizing, Store, open_source, prepare

CLASSES = ("cat", "dog", "owl")


def write_images(
    root: Path, count: int, *, size: tuple[int, int] = (12, 9), seed: int = 0
) -> Path:
    """Writes PNG and JPEG files of three classes; width and height vary a little."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        width, height = size[0] + index % 3, size[1] + index % 2
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        suffix = ("png", "jpg")[index % 2]
        path = root / CLASSES[index % 3] / f"{index:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def damage(path: Path, *, at: int | None = None, seed: int = 0) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(content)) if at is None else at
    content[place] ^= 1
    path.write_bytes(content)


def make_store(
    folder: Path, count: int, *, size: tuple[int, int] = (12, 9), seed: int = 0
) -> Store:
    """Packs as many random images; the folder of images lies beside the store."""
    images = folder.with_name(f"{folder.name}-images")
    write_images(images, count, size=size, seed=seed)
    prepare(open_source(str(images)), folder, resizing=Resizing())
    return Store(folder)
