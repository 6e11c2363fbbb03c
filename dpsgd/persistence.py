"""From the state of a run to its checkpoint, and back."""

from collections.abc import Mapping
from typing import Any

from dpsgd.checkpoint import Checkpoint, CheckpointStore, differences
from dpsgd.errors import CheckpointError
from dpsgd.train import TrainState
from dpsgd.trees import Params

__all__ = ["check_shapes", "restore_state", "save_state"]

# What a state counts, as opposed to the tensors that it trains.
_COUNTS = (
    "step",
    "best_accuracy",
    "train_seconds",
    "timed_steps",
    "timed_seconds",
    "wall_seconds",
)


def save_state(
    store: CheckpointStore,
    state: TrainState,
    *,
    frozen: Params,
    constants: Mapping[str, Any],
) -> None:
    """Writes the checkpoint of a state, with what is constant in its run.

    Args:
        store: Where it goes.
        state: What training has changed so far.
        frozen: Tensors of the network that no step changes.
        constants: Facts that are the same in every checkpoint of the run.
    """
    tensors = {f"frozen/{name}": leaf for name, leaf in frozen.items()}
    tensors |= {f"params/{name}": leaf for name, leaf in state.params.items()}
    tensors |= {f"ema/{name}": leaf for name, leaf in (state.ema or {}).items()}
    optimizer = state.optimizer.state()
    tensors |= {f"optimizer/{name}": leaf for name, leaf in optimizer.items()}
    counts = {name: getattr(state, name) for name in _COUNTS}
    store.save(state.step, Checkpoint(tensors, {**constants, **counts}))


def restore_state(state: TrainState, frozen: Params, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's values into a fresh state and network, in place.

    Args:
        state: As before the first step.
        frozen: Tensors of the network that no step changes.
        checkpoint: Of this run.

    Raises:
        CheckpointError: It is of another network.
    """
    groups: dict[str, Params] = {"params": {}, "ema": {}, "optimizer": {}, "frozen": {}}
    for full_name, leaf in checkpoint.tensors.items():
        group, _, name = full_name.partition("/")
        groups[group][name] = leaf
    own = {"params": state.params, "ema": state.ema or {}, "frozen": frozen}
    for group, leaves in own.items():
        check_shapes(group, groups[group], leaves)
        for name, leaf in leaves.items():
            leaf.copy_(groups[group][name])
    state.optimizer.load_state(groups["optimizer"])
    for name in _COUNTS:
        setattr(state, name, checkpoint.facts[name])


def check_shapes(group: str, saved: Params, present: Params) -> None:
    """Raises if saved leaves are not the network's.

    Args:
        group: What they are, for the message.
        saved: Leaves of a checkpoint or of weights.
        present: Those of the network.

    Raises:
        CheckpointError: One line for each leaf that is not there, or of another shape.
    """
    lines = differences(_shapes(saved), _shapes(present), f"{group}.")
    if lines:
        remedy = "use the network that the run began with"
        raise CheckpointError("\n".join(f"{line}; {remedy}" for line in lines))


def _shapes(params: Params) -> dict[str, list[int]]:
    """Returns the shape of every leaf."""
    return {name: list(leaf.shape) for name, leaf in params.items()}
