"""Parquet files of a few random images, as `datasets` writes them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from dpsgd.config import DataConfig
from dpsgd.data.dataset import DataSplits
from dpsgd.data.sources import load_datasets

NAMES = ("cat", "dog", "owl")


def random_pixels(
    count: int, size: tuple[int, ...] = (6, 5, 3), seed: int = 0
) -> np.ndarray:
    """Colour images, or others, as (count, *size)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *size), dtype=np.uint8)


def encode(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    """One image as the content of a file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, image_format, lossless=True)
    return stream.getvalue()


def write(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    *,
    names: Sequence[str] | None = NAMES,
    image: str = "img",
    label: str = "label",
    plain: bool = False,
    more: dict[str, Any] | None = None,
) -> str:
    """Writes a file as `datasets` does, and returns its path."""
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = images if plain else [{"bytes": b, "path": "x"} for b in images]
    columns = {
        image: pa.array(cells, pa.binary() if plain else struct),
        label: pa.array(labels, pa.int64()),
        **(more or {}),
    }
    features = {image: {"_type": "Image"}}
    if names is not None:
        features[label] = {"names": list(names), "_type": "ClassLabel"}
    info = json.dumps({"info": {"features": features}})
    table = pa.table(columns).replace_schema_metadata({"huggingface": info})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def write_test(folder: Path, **options: Any) -> str:
    """Writes a test file of two images, and returns its path."""
    images = [encode(pixels) for pixels in random_pixels(2, seed=9)]
    return write(folder / "test.parquet", images, [0, 1], **options)


def load(train: Any, test: str, **settings: Any) -> DataSplits:
    """Both splits, from the paths of their files."""
    return load_datasets(
        DataConfig(source="parquet", train=train, test=test, **settings)
    )
