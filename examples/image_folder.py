"""Writes the images of parquet files into class folders, as they are encoded there.

    python examples/image_folder.py 'data/train-*.parquet' images/train --classes 20

A class is named as the files declare it, or else by its number. Nothing is overwritten.
"""

import argparse
import io
from pathlib import Path

from PIL import Image

from dpsgd.data import open_source
from dpsgd.errors import UserError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("source", help="parquet file, glob of them, or folder of them")
parser.add_argument("folder", type=Path, help="where class folders go")
parser.add_argument("--classes", type=int, help="only so many of the first")
arguments = parser.parse_args()
folder = arguments.folder
if folder.exists():
    parser.error(f"{folder} is there already; name another folder")

try:
    source = open_source(arguments.source)
except UserError as error:
    parser.error(str(error))
names = source.class_names or [
    f"{label:05d}" for label in range(max(source.labels) + 1)
]
names = names[: arguments.classes]
for name in names:
    (folder / name).mkdir(parents=True)
for row, (label, image) in enumerate(
    zip(source.labels, source.encoded(0), strict=True)
):
    if label < len(names):
        suffix = Image.open(io.BytesIO(image.data)).format.lower()
        (folder / names[label] / f"{row:07d}.{suffix}").write_bytes(image.data)
