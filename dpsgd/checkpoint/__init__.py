"""Checkpoints that are whole or absent, and are refused where they do not belong."""

from dpsgd.checkpoint.files import (
    is_ours,
    read_tensors,
    write_atomically,
    write_tensors,
)
from dpsgd.checkpoint.shards import Checkpoint
from dpsgd.checkpoint.store import CheckpointStore, differences

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "differences",
    "is_ours",
    "read_tensors",
    "write_atomically",
    "write_tensors",
]
