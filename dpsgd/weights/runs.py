"""The weights that our own runs leave."""

from collections.abc import Mapping
from typing import Any

from dpsgd.checkpoint import CheckpointStore, read_tensors
from dpsgd.config import ModelConfig, with_later_settings
from dpsgd.errors import CheckpointError, ConfigError, fault
from dpsgd.report import RunDirectory, guarantee_in_words
from dpsgd.trees import Params

__all__ = ["chosen_weights", "guarantee_of", "network_of", "run_weights"]

# By kind of weights: prefixes of its names in a finished run and in a checkpoint.
_PREFIXES = {"ema": ("ema/", "ema/"), "last": ("last/", "params/")}
_FROZEN = "frozen/"


def run_weights(
    directory: RunDirectory, which: str, *, field: str
) -> tuple[Params, dict[str, Any]]:
    """Returns the weights of a finished run, or of its newest checkpoint, with facts.

    Args:
        directory: The run.
        which: `last`, `ema`, or `auto`: the average if the run keeps one.
        field: The setting that says which, for messages.

    Raises:
        ConfigError: The folder holds no run or an audit, or the run kept no such
            weights.
        CheckpointError: The weights are missing or damaged.
    """
    directory.require()
    if directory.weights.exists():
        remedy = "move it away, and the newest checkpoint is taken, if there is one"
        tensors, facts = read_tensors(directory.weights, remedy=remedy)
    elif directory.newest_checkpoint() is None:
        rule = "holds no weights yet, as model.safetensors or in a checkpoint"
        remedy = "name a run that has saved some"
        raise CheckpointError(fault("run_dir", directory.path, rule, remedy))
    else:
        newest = CheckpointStore(directory.checkpoints, keep=1).newest()
        tensors, facts = dict(newest.tensors), newest.facts
    return chosen_weights(tensors, which, field=field), facts


def chosen_weights(tensors: Params, which: str, *, field: str) -> Params:
    """Returns one kind of the weights that a file of ours holds, by parameter name.

    Args:
        tensors: By their names in the file.
        which: `last`, `ema` or `auto`.
        field: The setting that says which, for messages.

    Raises:
        ConfigError: The file holds no such weights.
    """
    for kind in _PREFIXES if which == "auto" else [which]:
        for prefix in _PREFIXES[kind]:
            if any(name.startswith(prefix) for name in tensors):
                return _named(tensors, prefix) | _named(tensors, _FROZEN)
    rule = "the run kept no such weights"
    raise ConfigError(fault(field, which, rule, "take the other kind"))


def guarantee_of(facts: Mapping[str, Any]) -> str:
    """Returns what the weights of a run guarantee to its own training data."""
    return guarantee_in_words(facts) if "epsilon" in facts else "not known yet"


def network_of(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the section `model` of the run, empty if its facts do not tell it.

    A run that is older than a setting had its default.
    """
    model = facts.get("settings", facts).get("model")
    return with_later_settings(model, ModelConfig) if model else {}


def _named(tensors: Params, prefix: str) -> Params:
    """Returns the tensors whose names have a prefix, without it."""
    return {
        name.removeprefix(prefix): leaf
        for name, leaf in tensors.items()
        if name.startswith(prefix)
    }
