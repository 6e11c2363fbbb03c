"""Writes the images of parquet files into class folders, as they are encoded there.

    python examples/image_folder.py 'data/train-*.parquet' images/train --classes 20

A class is named as the files declare it, or else by its number. Nothing is overwritten.
"""

import argparse
import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dpsgd.data import new_folder, open_source, told_of_writing
from dpsgd.data.store import ImageSource
from dpsgd.errors import ConfigError, DataError, UserError, fault


def class_names(source: ImageSource, count: int | None) -> list[str]:
    """Returns the names of the first classes, or of all."""
    names = list(source.class_names) or [
        f"{label:05d}" for label in range(max(source.labels) + 1)
    ]
    if count is not None and not 1 <= count <= len(names):
        rule = f"must be in [1, {len(names)}], the number of classes"
        raise ConfigError(fault("--classes", count, rule, "change it or leave it out"))
    return names[:count]


def write(source: ImageSource, names: list[str], folder: Path) -> None:
    """Writes the images of these classes."""
    told = told_of_writing(folder, field="folder")
    with new_folder(folder, field="folder") as partial, told:
        for name in names:
            (partial / name).mkdir(parents=True)
        images = zip(source.labels, source.encoded(0), strict=True)
        for row, (label, image) in enumerate(images):
            if label < len(names):
                content = image.content()
                name = f"{row:07d}.{suffix_of(content, image.place)}"
                (partial / names[label] / name).write_bytes(content)


def suffix_of(content: bytes, place: str) -> str:
    """Returns the name of the format of an image."""
    try:
        return Image.open(io.BytesIO(content)).format.lower()
    except UnidentifiedImageError as error:
        rule = "is no image that can be read"
        raise DataError(fault("source", place, rule, "mend the file")) from error


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("source", help="parquet file, glob of them, or folder of them")
parser.add_argument("folder", type=Path, help="where class folders go")
parser.add_argument("--classes", type=int, help="only so many of the first")
arguments = parser.parse_args()
try:
    source = open_source(arguments.source)
    names = class_names(source, arguments.classes)
    write(source, names, arguments.folder)
except UserError as error:
    parser.error(str(error))
