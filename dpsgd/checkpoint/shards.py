"""A checkpoint in shards: every rank writes what it holds, none needs the whole.

    step-00000003.shards/
      rank-00000.safetensors   its rows of every leaf, and what is whole on every rank
      rank-00001.safetensors   its rows
      index.json               how many ranks wrote, and the facts: written last

A leaf's rows follow one another in the order of ranks, so the files together are the
leaf, whoever reads it: another number of ranks, or a process alone. Every file names
its rank and, by a random word, its save: rows of two saves are no checkpoint. Every
file has a checksum, which is compared when the checkpoint is opened.

Not torch.distributed.checkpoint, whose index is a pickle: reading a checkpoint would
run whatever code someone put there, and files here never do.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpsgd.checkpoint.files import (
    checked,
    damaged,
    mapped_tensors,
    sealed,
    sync_folder,
    write_atomically,
    write_tensors,
    writing,
)

__all__ = ["Checkpoint", "complete_shards", "read_shards", "write_shard"]

_INDEX = "index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a run needs to go on.

    Attributes:
        tensors: Parameters, averages and optimiser state by full name.
        facts: JSON values: step, mechanism, settings, stream key, data fingerprint.
    """

    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]


def write_shard(
    folder: Path, tensors: Mapping[str, Tensor], *, rank: int, save: str, then: str
) -> None:
    """Writes what one rank holds.

    Args:
        folder: Of the checkpoint, not complete yet.
        tensors: Rows of leaves, which follow on those of the rank before; and of rank
            0 alone what is whole on every rank.
        rank: Which.
        save: The word of this save, which all ranks share.
        then: As of `write_atomically`.

    Raises:
        CheckpointError: The file could not be written.
    """
    facts = {"rank": rank, "save": save}
    write_tensors(_file(folder, rank), tensors, facts, then=then)


def complete_shards(
    part: Path,
    path: Path,
    facts: Mapping[str, Any],
    *,
    num_ranks: int,
    save: str,
    then: str,
) -> None:
    """Makes a checkpoint of the shards that all ranks have written.

    Args:
        part: Folder that holds them.
        path: Its name from now on; an older one of that name is removed.
        facts: As of `Checkpoint`.
        num_ranks: Ranks that wrote.
        save: The word that they wrote with.
        then: As of `write_atomically`.

    Raises:
        CheckpointError: The index could not be written, or the folder not renamed.
    """
    index = {"num_ranks": num_ranks, "save": save, "facts": dict(facts)}
    write_atomically(part / _INDEX, sealed(index, {}).encode(), then=then)
    with writing(path, then=then):
        old = path.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        part.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def read_shards(folder: Path) -> Checkpoint:
    """Opens a checkpoint in shards; leaves are read when they are asked for.

    Those of before there was the word of a save, or checksums, lack it in every file.

    Raises:
        CheckpointError: A file is missing, damaged, or of another save or rank.
    """
    try:
        content = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index = checked(content, {}, name=_INDEX)
        if not _is_index(index):
            raise ValueError(f"{_INDEX} says something else")
        files = (_file(folder, rank) for rank in range(index["num_ranks"]))
        return Checkpoint(_ShardedTensors(files, index.get("save")), index["facts"])
    except (OSError, SafetensorError, ValueError) as error:  # not UTF-8, not JSON
        raise damaged(folder, error) from error


def _is_index(value: object) -> bool:
    """Returns whether a JSON value says what `complete_shards` wrote."""
    if not isinstance(value, dict):
        return False
    num_ranks, facts = value.get("num_ranks"), value.get("facts")
    return isinstance(num_ranks, int) and num_ranks > 0 and isinstance(facts, dict)


@final
class _ShardedTensors(Mapping[str, Tensor]):
    """Whole leaves, each put together on the CPU when it is asked for.

    Args:
        files: Of all ranks, in their order.
        save: The word that each must have.

    Raises:
        ValueError: A file is damaged, or of another save or rank.
    """

    def __init__(self, files: Iterable[Path], save: str | None) -> None:
        self._holders: dict[str, list[Path]] = {}
        for rank, path in enumerate(files):
            tensors, facts = mapped_tensors(path)
            if (facts.get("rank"), facts.get("save")) != (rank, save):
                raise ValueError(f"{path.name} is of another save or rank")
            for name in tensors:
                self._holders.setdefault(name, []).append(path)

    def __getitem__(self, name: str) -> Tensor:
        """Returns all rows of a leaf."""
        rows = []
        for path in self._holders[name]:
            with safe_open(path, framework="pt") as file:
                rows.append(file.get_tensor(name))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


def _file(folder: Path, rank: int) -> Path:
    """Returns the file of one rank."""
    return folder / f"rank-{rank:05d}.safetensors"
