"""Checkpoints that are whole or absent, and are refused where they do not belong.

A checkpoint is one safetensors file: tensors, and JSON in its header. It holds the key
of the random streams, from which the noise of every step follows, so it must stay as
secret as the training data; `model.safetensors` is what may be released.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dpsgd.errors import CheckpointError, fault

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "differences",
    "is_ours",
    "read_tensors",
    "write_atomically",
    "write_tensors",
]

_HEADER = "dpsgd"
_BEST = "best.safetensors"
_OWNER_ONLY = 0o600


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a run needs to go on.

    Attributes:
        tensors: Parameters, averages and optimiser state by full name.
        facts: JSON values: step, mechanism, settings, stream key, data fingerprint.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run: the newest few, and the best.

    Args:
        folder: Where they lie; made on the first save.
        keep: Newest checkpoints kept, >= 1.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, then drops the oldest beyond `keep`.

        Guarantees:
            A process killed at any moment leaves every earlier checkpoint as it was,
            and either the whole new one or none.

        Raises:
            CheckpointError: The file could not be written; nothing else changed.
        """
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._path(step), checkpoint.tensors, checkpoint.facts)
        for old in self._steps()[: -self._keep]:
            self._path(old).unlink()

    def mark_best(self, step: int) -> None:
        """Keeps the checkpoint of `step`, which exists, as the best.

        Raises:
            CheckpointError: It could not be kept; the best before it is untouched.
        """
        link = self.folder / f"{_BEST}.tmp"
        with _writing(self.folder / _BEST):
            link.unlink(missing_ok=True)
            try:
                os.link(self._path(step), link)
            except OSError:  # a file system without hard links
                shutil.copy(self._path(step), link)
            link.replace(self.folder / _BEST)
            link.unlink(missing_ok=True)  # two names of one file are left as they are
            _sync_folder(self.folder)

    def newest(self) -> Checkpoint:
        """Reads the newest checkpoint.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        steps = self._steps()
        if not steps:
            rule = "holds no checkpoint"
            remedy = "start the run anew in another folder"
            raise CheckpointError(fault("--resume", self.folder.parent, rule, remedy))
        tensors, facts = read_tensors(self._path(steps[-1]))
        return Checkpoint(tensors, facts)

    def _steps(self) -> list[int]:
        """Returns the steps of the checkpoints that are there, ascending."""
        names = self.folder.glob("step-" + 8 * "[0-9]" + ".safetensors")
        return sorted(int(path.stem.removeprefix("step-")) for path in names)

    def _path(self, step: int) -> Path:
        """Returns the file of one step."""
        return self.folder / f"step-{step:08d}.safetensors"


def differences(
    saved: Mapping[str, Any], present: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Returns a line for every value that a checkpoint has otherwise.

    Args:
        saved: Nested facts of the checkpoint.
        present: The same facts of the run that wants to go on.
        prefix: Dotted name of the level being compared.

    >>> differences({"model": {"depth": 16}}, {"model": {"depth": 40}})
    ['model.depth=40: the checkpoint has 16']
    """
    lines = []
    for key in sorted(saved.keys() | present.keys()):
        name = f"{prefix}{key}"
        old, new = saved.get(key), present.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{name}.")
        elif old != new:
            lines.append(
                f"{name}={json.dumps(new)}: the checkpoint has {json.dumps(old)}"
            )
    return [line.replace('"', "") for line in lines]


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
            header = (file.metadata() or {}).get(_HEADER)
            if header is None:
                raise SafetensorError("not written by dpsgd")
            facts = json.loads(header)
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, facts
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        rule = f"is missing or damaged ({' '.join(str(error).split())})"
        remedy = "delete it to go on from an older one, if there is one"
        raise CheckpointError(fault("checkpoint", path, rule, remedy)) from error


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
    with _writing(path, len(content)):
        try:
            with os.fdopen(os.open(temporary, flags, _OWNER_ONLY), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _writing(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turns what a full or locked disk raises into a CheckpointError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        rule = "the disk is full" if full else f"cannot be written ({error.strerror})"
        room = f"free {num_bytes or 4096:,} bytes" if full else "give access to it"
        remedy = f"{room} and go on with --resume"
        raise CheckpointError(fault("checkpoint", path, rule, remedy)) from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
