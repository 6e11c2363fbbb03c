"""Files that are whole or absent: tensors and JSON, never code.

Tensors lie in safetensors files, JSON with them in the header.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dpsgd.errors import CheckpointError, fault

__all__ = [
    "damaged",
    "facts_of",
    "is_ours",
    "read_tensors",
    "sync_folder",
    "write_atomically",
    "write_tensors",
    "writing",
]

_HEADER = "dpsgd"
_OWNER_ONLY = 0o600


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes tensors with JSON facts atomically, readable by the owner alone.

    Raises:
        CheckpointError: The file could not be written; an older one is untouched.
    """
    on_cpu = {name: leaf.detach().cpu().contiguous() for name, leaf in tensors.items()}
    write_atomically(path, save(on_cpu, metadata={_HEADER: json.dumps(dict(facts))}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote; never runs code from the file.

    Raises:
        CheckpointError: The file is missing, damaged or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = facts_of(file.metadata())
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, facts
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise damaged(path, error) from error


def facts_of(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns the JSON facts in the header of a safetensors file.

    Raises:
        SafetensorError: `write_tensors` did not write it.
        JSONDecodeError: The header is damaged.
    """
    header = (metadata or {}).get(_HEADER)
    if header is None:
        raise SafetensorError("not written by dpsgd")
    facts: dict[str, Any] = json.loads(header)
    return facts


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Returns the error for a file that cannot be read."""
    rule = f"is missing or damaged ({' '.join(str(error).split())})"
    remedy = "delete it to go on from an older one, if there is one"
    return CheckpointError(fault("checkpoint", path, rule, remedy))


def is_ours(path: Path) -> bool:
    """Returns whether `write_tensors` wrote a safetensors file.

    Raises:
        SafetensorError: It is damaged.
    """
    with safe_open(path, framework="pt") as file:
        return _HEADER in (file.metadata() or {})


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file by new content, or leaves it as it was.

    Temporary file, fsync, rename, fsync of the folder: after a crash at any point
    the path holds the old content or the new, never a part.

    Raises:
        CheckpointError: The disk is full or refuses; the temporary file is removed.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with writing(path, len(content)):
        try:
            with os.fdopen(os.open(temporary, flags, _OWNER_ONLY), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turns what a full or locked disk raises into a CheckpointError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        rule = "the disk is full" if full else f"cannot be written ({error.strerror})"
        room = f"free {num_bytes or 4096:,} bytes" if full else "give access to it"
        remedy = f"{room} and go on with --resume"
        raise CheckpointError(fault("checkpoint", path, rule, remedy)) from error


def sync_folder(folder: Path) -> None:
    """Makes a rename in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
