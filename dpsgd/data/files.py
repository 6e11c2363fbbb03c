"""Finding the files of a data set and decoding its images, for every file source."""

import glob
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.config import DataConfig
from dpsgd.errors import ConfigError, DataError, fault

if TYPE_CHECKING:
    import PIL.Image

__all__ = [
    "EncodedImage",
    "check_held_once",
    "decode_images",
    "opened_as_rgb",
    "resolve",
    "resolve_splits",
]

# Large enough to hide the start of each task, small enough to share evenly.
_IMAGES_PER_TASK = 64
# Bounds the encoded images in memory at once.
_TASKS_AT_ONCE = 32
# Smaller images spend so little time outside the interpreter lock that threads only
# wait for each other: measured at 32x32, two threads are slower than none.
_MIN_PIXELS_FOR_THREADS = 64 * 64

_GREY_MODES = {"1", "L"}
# More than 8 bits a pixel.
_DEEP_MODES = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}


class EncodedImage(NamedTuple):
    """An image file not yet decoded, and how a message calls it."""

    data: bytes | Path
    field: str
    place: str

    def content(self) -> bytes:
        """Returns the encoded bytes.

        Raises:
            DataError: The file cannot be read; named.
        """
        if isinstance(self.data, bytes):
            return self.data
        try:
            return self.data.read_bytes()
        except OSError as error:
            rule = f"cannot be read ({error.strerror})"
            raise _image_fault(self, rule, "restore or remove the image") from error


class _Layout(NamedTuple):
    """What the first image decides: file format, channels and (H, W)."""

    format: str | None
    is_grey: bool
    size: tuple[int, ...]


def resolve_splits(
    config: DataConfig, *, shard_suffix: str | None
) -> tuple[list[Path], list[Path]]:
    """Resolves `data.train` and `data.test` to existing paths.

    Each is a path, a glob, or a list of them; a list keeps its order and a glob is
    sorted. No file may occur twice, under whatever names: an example held twice would
    weigh twice, which the clipping norm does not bound, and a test set shared with
    training is not public.

    Args:
        config: The section `data`.
        shard_suffix: Ending of the files that a folder stands for; None keeps folders.

    Raises:
        ConfigError: `data.train` or `data.test` is not given.
        DataError: A path does not exist, a folder is empty, or a file occurs twice.
    """
    train = resolve("data.train", config.train, shard_suffix=shard_suffix)
    test = resolve("data.test", config.test, shard_suffix=shard_suffix)
    check_held_once(
        [*(("data.train", path) for path in train), *(("data.test", p) for p in test)],
        rule="is given twice, in data.train or in both",
        remedy="name each file once, and keep test files apart",
    )
    return train, test


def check_held_once(
    held: Iterable[tuple[str, Path]],
    *,
    rule: str = "is held twice, through overlapping folders or links",
    remedy: str = "name each file once",
) -> None:
    """Refuses a file held twice, which would double what an example weighs.

    Guarantees:
        No two paths lead to one file: neither by the same name, nor by symbolic links,
        nor by hard links.

    Args:
        held: Setting and path of every file or folder.
        rule: What the message says of the second path.
        remedy: What it says to do.

    Raises:
        DataError: A file is held twice, or is not there; named.
    """
    seen: set[tuple[int, int]] = set()
    for field, path in held:
        try:
            status = path.stat()
        except OSError as error:
            told = f"cannot be read ({error.strerror})"
            remedy = "restore or remove the file"
            raise DataError(fault(field, path, told, remedy)) from error
        identity = status.st_dev, status.st_ino
        if identity in seen:
            raise DataError(fault(field, path, rule, remedy))
        seen.add(identity)


def decode_images(encoded: Iterable[EncodedImage], count: int) -> Tensor:
    """Decodes image files of one size, large ones with all CPU cores.

    The first image decides the size and whether there is one channel (grey) or three
    (RGB). Grey images among RGB ones are widened; the reverse would lose colour and
    is refused.

    Args:
        encoded: The images, in order; consumed as decoding proceeds.
        count: Number N of images that `encoded` yields, at least 1.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        DataError: An image cannot be decoded or differs in size or depth; named.
    """
    pending = iter(encoded)
    first, layout = _decode_first(next(pending))
    images = np.empty((count, first.shape[2], *layout.size), np.uint8)
    images[0] = first.transpose(2, 0, 1)  # (C, H, W)
    filled = 1
    tasks = _tasks(pending)
    with ThreadPoolExecutor() as pool:
        threaded = layout.size[0] * layout.size[1] >= _MIN_PIXELS_FOR_THREADS
        apply = pool.map if threaded else map
        while batch := list(islice(tasks, _TASKS_AT_ONCE)):
            for part in apply(partial(_decode_task, layout), batch):
                images[filled : filled + len(part)] = part
                filled += len(part)
    assert filled == count
    return torch.from_numpy(images)


@contextmanager
def opened_as_rgb(image: EncodedImage) -> "Iterator[PIL.Image.Image]":
    """Decodes an image file of any size; grey pixels are widened to RGB.

    What is done with the image inside the context is told as part of decoding it.

    Args:
        image: The file.

    Raises:
        DataError: It cannot be decoded, or has more than 8 bits a pixel; named.
    """
    with _opened(image, None) as opened:
        _check_depth(image, opened)
        yield opened if opened.mode == "RGB" else opened.convert("RGB")


def resolve(
    field: str, value: str | tuple[str, ...] | None, *, shard_suffix: str | None
) -> list[Path]:
    """Returns the paths that one setting stands for.

    Args:
        field: The setting, for messages.
        value: Path, glob, or a list of them.
        shard_suffix: As for `resolve_splits`.

    Raises:
        ConfigError: Nothing is given.
        DataError: A path does not exist, or a folder is empty.
    """
    if not value:
        message = fault(
            field,
            None,
            "must name the files of this data.source",
            "give a path, a list of paths, a glob or a folder",
        )
        raise ConfigError(message)
    patterns = (value,) if isinstance(value, str) else value
    return [
        path
        for pattern in patterns
        for found in _match(field, pattern)
        for path in _expand(field, found, shard_suffix)
    ]


def _match(field: str, pattern: str) -> list[Path]:
    """Returns the path itself if it exists, else what it matches as a glob."""
    path = Path(pattern).expanduser()
    # A file name may hold brackets, so the literal path comes first.
    matches = [path] if path.exists() else [Path(p) for p in glob.glob(str(path))]
    if not matches:
        message = fault(field, pattern, "no such file", "check the path or the pattern")
        raise DataError(message)
    return sorted(matches)


def _expand(field: str, path: Path, shard_suffix: str | None) -> list[Path]:
    """Returns the shards of a folder, sorted by name, or the path itself."""
    if shard_suffix is None or not path.is_dir():
        return [path]
    shards = sorted(path.glob(f"*{shard_suffix}"))
    if not shards:
        rule = f"is a folder without {shard_suffix} files"
        raise DataError(fault(field, path, rule, "name the folder that holds them"))
    return shards


def _tasks(encoded: Iterator[EncodedImage]) -> Iterator[list[EncodedImage]]:
    """Groups images into the pieces that one task decodes."""
    while part := list(islice(encoded, _IMAGES_PER_TASK)):
        yield part


def _decode_first(image: EncodedImage) -> tuple[NDArray[np.uint8], _Layout]:
    """Decodes the image that decides what the others must be."""
    with _opened(image, None) as opened:
        is_grey = opened.mode in _GREY_MODES
        pixels = _pixels(image, opened, is_grey=is_grey)
        layout = _Layout(opened.format, is_grey, pixels.shape[:2])
    return pixels, layout


def _decode_task(layout: _Layout, part: list[EncodedImage]) -> NDArray[np.uint8]:
    """Returns (N, C, H, W) pixels of images that must have the first one's layout."""
    decoded = []
    for image in part:
        with _opened(image, layout.format) as opened:
            pixels = _pixels(image, opened, is_grey=layout.is_grey)
        _check_size(image, pixels.shape[:2], layout.size)
        decoded.append(pixels)
    return np.stack(decoded).transpose(0, 3, 1, 2)  # (N, C, H, W)


@contextmanager
def _opened(
    image: EncodedImage, likely_format: str | None
) -> "Iterator[PIL.Image.Image]":
    """Opens an image file, and turns what decoding raises into a DataError."""
    from PIL import Image, UnidentifiedImageError

    stream = io.BytesIO(image.data) if isinstance(image.data, bytes) else image.data
    try:
        try:
            # Trying every format in turn would take a third of the time.
            formats = (likely_format,) if likely_format else None
            opened = Image.open(stream, formats=formats)
        except UnidentifiedImageError:
            opened = Image.open(stream)
        with opened:
            yield opened
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        rule = f"cannot be decoded ({error})"
        raise _image_fault(image, rule, "restore or remove the image") from error


def _pixels(
    image: EncodedImage, opened: "PIL.Image.Image", *, is_grey: bool
) -> NDArray[np.uint8]:
    """Returns the (H, W, C) pixels of an opened image with one channel or three."""
    mode = opened.mode
    _check_depth(image, opened)
    if is_grey and mode not in _GREY_MODES:
        rule = f"is not grey (mode {mode}), and the first image is"
        raise _image_fault(image, rule, "convert all images to one mode")
    target = "L" if is_grey else "RGB"
    pixels = np.asarray(opened if mode == target else opened.convert(target))
    return pixels[:, :, None] if is_grey else pixels  # (H, W, C)


def _check_depth(image: EncodedImage, opened: "PIL.Image.Image") -> None:
    """Refuses an image whose conversion to 8 bits would clip or rescale silently."""
    if opened.mode in _DEEP_MODES:
        rule = f"has pixels of more than 8 bits (mode {opened.mode})"
        raise _image_fault(image, rule, "convert the images to 8 bits")


def _check_size(
    image: EncodedImage, size: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Refuses an image of another size than the first."""
    if size != expected:
        rule = (
            f"is {size[1]}x{size[0]} pixels, "
            f"and the first image is {expected[1]}x{expected[0]}"
        )
        raise _image_fault(image, rule, "resize all images to one size beforehand")


def _image_fault(image: EncodedImage, rule: str, remedy: str) -> DataError:
    """Returns the error that names the image."""
    return DataError(fault(image.field, image.place, rule, remedy))
