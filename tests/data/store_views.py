"""Settings, views and pixels of the stores that tests share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_up_images import make_store
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from dpsgd.config import DataConfig
from dpsgd.data import ViewLoader, load_datasets
from dpsgd.data.store import Store
from dpsgd.rng import RandomStreams

STREAMS = RandomStreams.from_seed(0)
CPU = torch.device("cpu")
SIZE = 10  # scaled_crop_flip cuts it from 12
IMAGES = (30, 23)  # width and height, give or take a pixel


def two_stores(folder: Path) -> Path:
    """Two stores, of 20 images and of 7, in a folder."""
    make_store(folder / "train", 20, size=IMAGES)
    make_store(folder / "test", 7, size=IMAGES, seed=1)
    return folder


def settings(folder: Path, **changes: Any) -> DataConfig:
    """Settings of the two stores in a folder."""
    return DataConfig(
        **{
            "source": "store",
            "train": str(folder / "train"),
            "test": str(folder / "test"),
            "image_size": SIZE,
            "augmentation": "scaled_crop_flip",
            "augmentation_multiplicity": 3,
            "num_examples": 20,
            **changes,
        }
    )


def loader(config: DataConfig, *, workers: int = 0, microbatch: int = 4) -> ViewLoader:
    """Makes views of the training store, on the CPU."""
    return ViewLoader(
        load_datasets(config).train.placed(CPU, num_workers=workers),
        config=config,
        streams=STREAMS,
        microbatch_size=microbatch,
        dtype=torch.float32,
        device=CPU,
    )


def views_of(
    config: DataConfig, draw: list[int], *, step: int = 7, **how: Any
) -> tuple[Tensor, Tensor]:
    """All views and labels of a draw, without padding."""
    parts = list(loader(config, **how)(np.array(draw, np.int64), step))
    mask = torch.cat([mask for _, _, mask in parts])
    views = torch.cat([views for views, _, _ in parts])[mask]
    return views, torch.cat([labels for _, labels, _ in parts])[mask]


def decoded(store: Store, row: int, folder: Path) -> Image.Image:
    """One image of a store, decoded by PIL alone; the folder takes a file."""
    path = folder / "one"
    path.write_bytes(store.read(row))
    with Image.open(path) as image:
        return image.convert("RGB")


def pixels(image: Image.Image, side: int) -> Tensor:
    """An image scaled as torchvision does it, channels first."""
    scaled = v2.functional.resize(image, [side, side], InterpolationMode.BICUBIC)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


def central_square(image: Image.Image) -> Image.Image:
    """The square of the reference code, whose corner is rounded down."""
    short = min(image.size)
    left, top = ((side - short) // 2 for side in image.size)
    return image.crop((left, top, left + short, top + short))
