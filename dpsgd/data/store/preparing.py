"""Packs images into a store: each decoded once, so that none fails a run later."""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dpsgd.data.files import EncodedImage, opened_as_rgb
from dpsgd.data.store.sources import ImageSource
from dpsgd.data.store.writing import StoreWriter
from dpsgd.errors import ConfigError, DataError, fault

__all__ = ["Resizing", "prepare"]

# Large enough to make a write to the disk worth while, small enough to lose.
_IMAGES_AT_ONCE = 256
_MAX_TOLD = 20
_MAX_QUALITY = 95  # beyond it JPEG files grow and gain nothing, as Pillow says


@dataclass(frozen=True, kw_only=True, slots=True)
class Resizing:
    """How large images are made smaller; smaller ones are left as they are.

    Args:
        short_side: Pixels of the shorter side, at least 1; None resizes nothing.
        quality: Of the JPEG files that are written then, 1 to 95.

    Raises:
        ConfigError: A number is out of range.
    """

    short_side: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            rule = "must be at least 1"
            raise ConfigError(
                fault("--short-side", self.short_side, rule, "raise it or leave it out")
            )
        given = self.quality is not None
        if given != (self.short_side is not None):
            rule = "goes with --short-side, and one asks for the other"
            raise ConfigError(
                fault("--quality", self.quality, rule, "give both or neither")
            )
        if self.quality is not None and not 1 <= self.quality <= _MAX_QUALITY:
            rule = f"must be in [1, {_MAX_QUALITY}]"
            raise ConfigError(fault("--quality", self.quality, rule, "change it"))

    def apply(self, image: EncodedImage) -> bytes:
        """Decodes an image, and returns the bytes to keep.

        Raises:
            DataError: It does not decode.
        """
        from PIL import Image

        with opened_as_rgb(image) as opened:
            opened.load()
            short = min(opened.size)
            if self.short_side is None or short <= self.short_side:
                return _bytes_of(image)
            scale = self.short_side / short
            width, height = (round(side * scale) for side in opened.size)
            stream = io.BytesIO()
            smaller = opened.resize((width, height), Image.Resampling.LANCZOS)
            smaller.save(stream, "JPEG", quality=self.quality)
        return stream.getvalue()


def prepare(
    source: ImageSource,
    path: Path,
    *,
    resizing: Resizing,
    skip_corrupt: bool = False,
    on_progress: Callable[[int], object] = lambda done: None,
) -> int:
    """Packs a source into a store, from the start or from where it was left.

    Args:
        source: Images and labels.
        path: Folder of the store.
        resizing: How large images are made smaller.
        skip_corrupt: Leave out images that do not decode; the manifest lists them.
        on_progress: Told how many images were looked at.

    Returns:
        Number of images held.

    Raises:
        DataError: The store is finished, or was begun with another source or other
            options; or images do not decode, listed by name and index. What is done
            already is kept.
    """
    options = asdict(resizing)
    plan = {"source": source.digest, **options}
    with StoreWriter(path, plan) as writer:
        on_progress(writer.position)
        for batch in _examined(source, writer.position, resizing):
            writer.add(batch)
            on_progress(writer.position)
        skipped = [_reason(source, one, resizing) for one in writer.undecodable]
        if skipped and not skip_corrupt:
            raise DataError(_corrupt(path, skipped))
        if len(skipped) == len(source):
            rule = "none of its images decodes"
            raise DataError(fault("SOURCE", path, rule, "name a folder of images"))
        writer.finish(source.class_names, options, skipped)
    return len(source) - len(skipped)


def _examined(
    source: ImageSource, start: int, resizing: Resizing
) -> Iterator[list[tuple[bytes | None, int]]]:
    """Yields the bytes and labels of images, decoded with all CPU cores."""
    encoded = source.encoded(start)
    labels = iter(source.labels[start:])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(encoded, _IMAGES_AT_ONCE)):
            kept = pool.map(partial(_kept, resizing), batch)
            yield [(data, int(next(labels))) for data in kept]


def _kept(resizing: Resizing, image: EncodedImage) -> bytes | None:
    """Returns the bytes to keep, None if the image does not decode."""
    try:
        return resizing.apply(image)
    except DataError:
        return None


def _reason(source: ImageSource, index: int, resizing: Resizing) -> dict[str, Any]:
    """Returns which image does not decode, and why."""
    image = next(source.encoded(index))
    try:
        resizing.apply(image)
    except DataError as error:
        return {"index": index, "name": image.place, "reason": str(error)}
    rule = "did not decode before, and does now"
    raise DataError(
        fault("SOURCE", image.place, rule, "delete the unfinished store and begin anew")
    )


def _corrupt(path: Path, skipped: list[dict[str, Any]]) -> str:
    """Words which images do not decode."""
    told = [f"index {one['index']}: {one['reason']}" for one in skipped[:_MAX_TOLD]]
    more = len(skipped) - len(told)
    if more:
        told.append(f"and {more} more")
    rule = f"{len(skipped)} images do not decode"
    remedy = "leave them out with --skip-corrupt, or mend them and begin a new store"
    return "\n".join([*told, fault("STORE", path, rule, remedy)])


def _bytes_of(image: EncodedImage) -> bytes:
    """Returns the encoded bytes of an image."""
    return image.data if isinstance(image.data, bytes) else image.data.read_bytes()
