"""Files that are whole or absent: tensors and JSON, never code.

Tensors lie in safetensors files, JSON with them in the header, and in the JSON a
checksum of both. Files of before there was one lack it.
"""

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

from dpsgd.errors import CheckpointError, fault, is_full
from dpsgd.trees import sha256

__all__ = [
    "GO_ON",
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
_FIELD = "checkpoint"
GO_ON = "go on with --resume"
_TAKE_OLDER = "delete it to go on from an older one, if there is one"


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    then: str = GO_ON,
) -> None:
    """Writes tensors with JSON facts atomically, readable by the owner alone.

    Args:
        path: Of the file.
        tensors: By name, on any device.
        facts: Plain values by name.
        then: What to do once the disk can be written, for the message.

    Raises:
        CheckpointError: The file could not be written; an older one is untouched.
    """
    on_cpu = {name: leaf.detach().cpu().contiguous() for name, leaf in tensors.items()}
    content = save(on_cpu, metadata={_HEADER: sealed(facts, on_cpu)})
    write_atomically(path, content, then=then)


def read_tensors(
    path: Path, *, remedy: str = _TAKE_OLDER
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote; never runs code from the file.

    Args:
        path: Of the file.
        remedy: What to do without it, for the message.

    Raises:
        CheckpointError: The file is missing, damaged or not one of ours, or may not be
            read.
    """
    try:
        return mapped_tensors(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, error, remedy=remedy) from error


def mapped_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors that lie in a file, not in memory, and facts; both are checked.

    Raises:
        OSError: The file is missing, or may not be read.
        SafetensorError: It is damaged, or `write_tensors` did not write it.
        ValueError: It is damaged.
    """
    path.open("rb").close()  # a file that may not be read is no missing one
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


def damaged(
    path: Path, error: Exception, *, remedy: str = _TAKE_OLDER
) -> CheckpointError:
    """Returns the error for a file that cannot be read.

    Args:
        path: Of the file.
        error: Why; a file that is there and may not be read is not called damaged.
        remedy: What to do without a file that is missing or damaged.
    """
    rule = f"is missing or damaged ({' '.join(str(error).split())})"
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        rule = f"cannot be read ({error.strerror or error})"
        remedy = "give access to it"
    return CheckpointError(fault(_FIELD, path, rule, remedy))


def is_ours(path: Path) -> bool:
    """Returns whether `write_tensors` wrote a safetensors file.

    Raises:
        SafetensorError: It is damaged.
    """
    with safe_open(path, framework="pt") as file:
        return _HEADER in (file.metadata() or {})


def write_atomically(
    path: Path, content: bytes, *, field: str = _FIELD, then: str = GO_ON
) -> None:
    """Replaces a file by new content, or leaves it as it was.

    Temporary file, fsync, rename, fsync of the folder: after a crash at any point
    the path holds the old content or the new, never a part.

    Args:
        path: Of the file.
        content: All of it.
        field: What the file is, for the message.
        then: What to do once the disk can be written, for the message.

    Raises:
        CheckpointError: The disk is full or refuses; the temporary file is removed.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with writing(path, len(content), field=field, then=then):
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
def writing(
    path: Path, num_bytes: int = 0, *, field: str = _FIELD, then: str = GO_ON
) -> Iterator[None]:
    """Turns what a full or locked disk raises into a CheckpointError.

    Args:
        path: What is written.
        num_bytes: How much of it, if that is known.
        field: As of `write_atomically`.
        then: As of `write_atomically`.
    """
    try:
        yield
    except OSError as error:
        full = is_full(error)
        rule = "the disk is full" if full else f"cannot be written ({error.strerror})"
        room = f"free {num_bytes or 4096:,} bytes" if full else "give access to it"
        raise CheckpointError(fault(field, path, rule, f"{room} and {then}")) from error


def sync_folder(folder: Path) -> None:
    """Makes a rename in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
