"""Files that are whole or absent: tensors and JSON, never code.

Tensors lie in safetensors files, JSON with them in the header, and in the JSON a
checksum of both. Files of before there was one lack it.
"""

import errno
import hashlib
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
from dpsgd.trees import sha256

__all__ = [
    "checked",
    "damaged",
    "is_ours",
    "mapped_tensors",
    "read_tensors",
    "sealed",
    "sync_folder",
    "write_atomically",
    "write_tensors",
    "writing",
]

_HEADER = "dpsgd"
# Beside the facts: of two entries in a header safetensors draws the order, and equal
# files would differ.
_CHECKSUM = "sha256"
_OWNER_ONLY = 0o600


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes tensors with JSON facts atomically, readable by the owner alone.

    Raises:
        CheckpointError: The file could not be written; an older one is untouched.
    """
    on_cpu = {name: leaf.detach().cpu().contiguous() for name, leaf in tensors.items()}
    write_atomically(path, save(on_cpu, metadata={_HEADER: sealed(facts, on_cpu)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote; never runs code from the file.

    Raises:
        CheckpointError: The file is missing, damaged or not one of ours.
    """
    try:
        return mapped_tensors(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, error) from error


def mapped_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors that lie in a file, not in memory, and facts; both are checked.

    Raises:
        OSError: The file is missing.
        SafetensorError: It is damaged, or `write_tensors` did not write it.
        ValueError: It is damaged.
    """
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(_HEADER)
        if header is None:
            raise SafetensorError("not written by dpsgd")
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    return tensors, checked(json.loads(header), tensors, name=path.name)


def sealed(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Returns facts as JSON, with a checksum of them and of tensors."""
    assert _CHECKSUM not in facts
    return json.dumps({**facts, _CHECKSUM: _checksum(facts, tensors)})


def checked(content: Any, tensors: Mapping[str, Tensor], *, name: str) -> Any:
    """Returns the facts that `sealed` wrote.

    What has no checksum is older than checksums, and comes back as it is.

    Args:
        content: The JSON value.
        tensors: Those that were sealed with it.
        name: Of the file, for the message.

    Raises:
        ValueError: The facts or tensors are not those that were sealed.
    """
    if not isinstance(content, dict) or _CHECKSUM not in content:
        return content
    facts = {key: value for key, value in content.items() if key != _CHECKSUM}
    if content[_CHECKSUM] != _checksum(facts, tensors):
        raise ValueError(f"the checksum of {name} differs")
    return facts


def _checksum(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Returns a digest of facts, which JSON brings back in their order, and tensors."""
    told = json.dumps(dict(facts))
    return hashlib.sha256(f"{sha256(tensors)} {told}".encode()).hexdigest()


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
