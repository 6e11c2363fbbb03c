"""How a store lies on disk: shards of encoded images, an index, and a manifest.

STORE/
    shard-00000.bin ...   the images as they were encoded, one after another
    records.bin           where each image is, its label and its checksum
    manifest.json         classes, sizes and checksums of the rest; written last

A store without a manifest is not finished: `plan.json` says what it is made of, and
`journal.bin` how far it has come.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "FORMAT",
    "JOURNAL",
    "MANIFEST",
    "PLAN",
    "RECORD",
    "RECORDS",
    "Manifest",
    "digest_of",
    "read_plan",
    "shard_name",
    "write_whole",
]

FORMAT = 1
MANIFEST = "manifest.json"
RECORDS = "records.bin"
PLAN = "plan.json"
JOURNAL = "journal.bin"

RECORD = np.dtype(
    [
        ("shard", "<u4"),
        ("checksum", "<u4"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("label", "<i4"),
    ]
)
"""One image: its shard, the CRC-32 of its bytes, where they begin and how many there
are, and its label. In a journal a length of 0 marks an image that does not decode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a finished store says of itself.

    Attributes:
        num_images: Images held. Of a private set it is private, like the labels.
        class_names: Name of each class in label order; () if the source declares none.
        shards: Size in bytes of every shard, in order.
        records_sha256: Checksum of `records.bin`, and by the checksums in it of every
            image.
        options: How images were resized, null for those that are as they were.
        skipped: Images of the source that do not decode, by name and index.
    """

    num_images: int
    class_names: tuple[str, ...]
    shards: tuple[int, ...]
    records_sha256: str
    options: Mapping[str, Any]
    skipped: tuple[Mapping[str, Any], ...]

    def to_json(self) -> str:
        """Returns the file's content, which ends with a checksum of the rest."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({**content, "digest": digest_of(content)}, indent=1)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Manifest":
        """Returns the manifest of a file's content, without format and digest.

        Raises:
            KeyError, TypeError: It has other fields.
        """
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in content.items()
        }
        return cls(**fields)


def digest_of(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of JSON values, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Returns what an unfinished store is made of; None if the folder is not one.

    Training runs have a file of the same name.

    Raises:
        OSError: The file is there and cannot be read.
    """
    try:
        plan = json.loads((folder / PLAN).read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    is_plan = isinstance(plan, dict) and {"format", "source"} <= plan.keys()
    return plan if is_plan else None


def shard_name(number: int) -> str:
    """Returns the file name of one shard, counted from 0."""
    return f"shard-{number:05d}.bin"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, whenever the process is killed.

    Raises:
        OSError: The disk is full or refuses.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
