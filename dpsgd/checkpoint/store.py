"""The checkpoints of a run: each is whole or absent, and the newest few are kept.

A checkpoint is one safetensors file: tensors, and JSON in its header; or a folder of
shards. It holds the key of the random streams, from which the noise of every step
follows, so it must stay as secret as the training data; `model.safetensors` is what may
be released.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpsgd.checkpoint.files import (
    GO_ON,
    read_tensors,
    sync_folder,
    write_tensors,
    writing,
)
from dpsgd.checkpoint.shards import (
    Checkpoint,
    complete_shards,
    read_shards,
    write_shard,
)
from dpsgd.errors import CheckpointError, fault, readable
from dpsgd.parallel import Ranks

__all__ = ["CheckpointStore", "differences"]

_WHOLE = ".safetensors"
_SHARDS = ".shards"
_STEP = re.compile(rf"step-([0-9]{{8}})(?:{re.escape(_WHOLE)}|{re.escape(_SHARDS)})")
_ANEW = "start the run anew in another folder"


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
        then = self._after_a_failure()
        with writing(self.folder, then=then):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step, _WHOLE)
        write_tensors(path, checkpoint.tensors, checkpoint.facts, then=then)
        self._drop_old(path)

    def save_shards(self, step: int, shard: Checkpoint, ranks: Ranks) -> None:
        """Writes a checkpoint of which every rank holds a shard; all must call.

        Shards are written into a folder of another name. Only when all are, the first
        rank adds what says that they belong together, and renames the folder.

        Guarantees:
            Those of `save`, for all ranks together: when a rank returns, the
            checkpoint is there.

        Args:
            step: Of the checkpoint.
            shard: This rank's tensors, as `write_shard` wants them.
            ranks: The processes.

        Raises:
            CheckpointError: This rank's file could not be written. The others wait for
                it until their launcher ends them.
        """
        path = self._path(step, _SHARDS)
        part = path.with_suffix(".part")
        then = self._after_a_failure()
        if ranks.is_first:
            with writing(part, then=then):
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
        ranks.meet()
        save = ranks.from_first(secrets.token_hex(16))
        write_shard(part, shard.tensors, rank=ranks.rank, save=save, then=then)
        ranks.meet()
        if ranks.is_first:
            complete_shards(
                part, path, shard.facts, num_ranks=ranks.size, save=save, then=then
            )
            self._drop_old(path)
        ranks.meet()

    def mark_best(self, step: int) -> None:
        """Keeps the checkpoint of `step`, which exists, as the best.

        Raises:
            CheckpointError: It could not be kept; the best before it is untouched.
        """
        path = self._found()[step]
        best = self.folder / f"best{path.suffix}"
        link = self.folder / f"{best.name}.tmp"
        with writing(best):
            link.unlink(missing_ok=True)
            if path.is_dir():  # folders have one name only
                link.symlink_to(path.name)
            else:
                _link(path, link)
            link.replace(best)
            link.unlink(missing_ok=True)  # two names of one file are left as they are
            for other in {_WHOLE, _SHARDS} - {path.suffix}:
                best.with_suffix(other).unlink(missing_ok=True)
            sync_folder(self.folder)

    def newest(self) -> Checkpoint:
        """Reads the newest checkpoint.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        found = self._found()
        if not found:
            rule = "holds no checkpoint"
            raise CheckpointError(fault("--resume", self.folder.parent, rule, _ANEW))
        path = found[max(found)]
        return read_shards(path) if path.is_dir() else Checkpoint(*read_tensors(path))

    def _after_a_failure(self) -> str:
        """Returns what to do about a save that failed, once it would not."""
        return GO_ON if self._found() else _ANEW

    def _found(self) -> dict[int, Path]:
        """Returns the checkpoints that are there, by step, ascending.

        Raises:
            UserError: The folder is there and cannot be read. To take it for an empty
                one would be to begin a run anew, and to spend its budget twice.
        """
        with readable("checkpoint", self.folder):
            names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = [one for name in sorted(names) if (one := _STEP.fullmatch(name))]
        return {int(one[1]): self.folder / one[0] for one in found}

    def _drop_old(self, newest: Path) -> None:
        """Removes what the newest checkpoint makes dispensable, but never the best."""
        for other in {_WHOLE, _SHARDS} - {newest.suffix}:
            _remove(newest.with_suffix(other))
        best = (self.folder / f"best{_SHARDS}").resolve()
        for path in list(self._found().values())[: -self._keep]:
            if path.resolve() != best:
                _remove(path)

    def _path(self, step: int, suffix: str) -> Path:
        """Returns the file or folder of one step."""
        return self.folder / f"step-{step:08d}{suffix}"


def _link(path: Path, link: Path) -> None:
    """Gives a file a second name."""
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copy(path, link)


def _remove(path: Path) -> None:
    """Removes a checkpoint, if it is there."""
    if path.is_dir():
        # Under another name: what a killed removal leaves is no checkpoint.
        path = path.rename(path.with_suffix(".old"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
