"""From the state of a run to its checkpoint, and back."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from dpsgd.checkpoint import Checkpoint, CheckpointStore, differences
from dpsgd.errors import CheckpointError
from dpsgd.parallel import Layout
from dpsgd.run import TrainState
from dpsgd.trees import Params

__all__ = ["check_shapes", "restore_state", "save_state"]

# What a state trains; all else it counts, and a checkpoint holds as facts.
_TENSORS = ("params", "ema", "optimizer")
_COUNTS = tuple(one.name for one in fields(TrainState) if one.name not in _TENSORS)


def save_state(
    store: CheckpointStore,
    state: TrainState,
    *,
    frozen: Params,
    constants: Mapping[str, Any],
    layout: Layout,
) -> None:
    """Writes the checkpoint of a state, with what is constant in its run.

    Where leaves are whole on every rank, the first one writes; of shards every rank
    writes its own. All wait for the end, so that none goes on from a step that no
    checkpoint holds.

    Args:
        store: Where it goes.
        state: What training has changed so far.
        frozen: Tensors of the network that no step changes.
        constants: Facts that are the same in every checkpoint of the run.
        layout: Where parameters lie.

    Raises:
        CheckpointError: It could not be written.
        ConfigError: Ranks that should hold the same parameters do not.
    """
    layout.require_alike(state.params)
    tensors = {f"params/{name}": leaf for name, leaf in state.params.items()}
    tensors |= {f"ema/{name}": leaf for name, leaf in (state.ema or {}).items()}
    optimizer = state.optimizer.state()
    tensors |= {f"optimizer/{name}": leaf for name, leaf in optimizer.items()}
    counts = {name: getattr(state, name) for name in _COUNTS}
    ranks = layout.ranks
    if ranks.is_first:
        tensors |= {f"frozen/{name}": leaf for name, leaf in frozen.items()}
    elif layout.is_sharded:
        tensors = _sharded_only(tensors, layout)
    checkpoint = Checkpoint(tensors, {**constants, **counts})
    if layout.is_sharded:
        store.save_shards(state.step, checkpoint, ranks)
        return
    if ranks.is_first:
        store.save(state.step, checkpoint)
    ranks.meet()


def _sharded_only(tensors: Params, layout: Layout) -> Params:
    """Returns what other ranks do not hold as well."""
    return {
        name: leaf
        for name, leaf in tensors.items()
        if layout.divides(_leaf(name), leaf)
    }


def _leaf(full_name: str) -> str:
    """Returns the parameter that a tensor of a checkpoint belongs to.

    >>> _leaf("ema/stem.weight"), _leaf("optimizer/stem.weight.momentum_buffer")
    ('stem.weight', 'stem.weight')
    """
    group, _, name = full_name.partition("/")
    return name.rpartition(".")[0] if group == "optimizer" else name


def restore_state(
    state: TrainState, frozen: Params, checkpoint: Checkpoint, layout: Layout
) -> None:
    """Puts a checkpoint's values into a fresh state and network, in place.

    However many ranks wrote them, every rank takes its part, leaf by leaf.

    Args:
        state: As before the first step.
        frozen: Tensors of the network that no step changes.
        checkpoint: Of this run.
        layout: Where parameters lie.

    Raises:
        CheckpointError: It is of another network.
    """
    own = {"params": state.params, "ema": state.ema or {}, "frozen": frozen}
    for group, leaves in own.items():
        saved = _Group(checkpoint.tensors, group)
        check_shapes(group, saved, layout.outline(leaves))
        for name, leaf in leaves.items():
            leaf.copy_(layout.part(name, saved[name]))
    momenta = _Group(checkpoint.tensors, "optimizer")
    state.optimizer.load_state(
        {
            name: layout.part(_leaf(f"optimizer/{name}"), momenta[name]).clone()
            for name in momenta
        }
    )
    for name in _COUNTS:
        setattr(state, name, checkpoint.facts[name])


class _Group(Mapping[str, Tensor]):
    """The tensors of a checkpoint whose full names begin with the group's."""

    def __init__(self, tensors: Mapping[str, Tensor], group: str) -> None:
        self._tensors = tensors
        self._prefix = f"{group}/"

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        start = len(self._prefix)
        return (name[start:] for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def check_shapes(
    group: str,
    saved: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    *,
    remedy: str = "use the network that the run began with",
) -> None:
    """Raises if saved leaves are not the network's.

    Args:
        group: What they are, for the message.
        saved: Leaves of a checkpoint or of weights.
        present: Those of the network.
        remedy: What to do about it, for the message.

    Raises:
        CheckpointError: One line for each leaf that is not there, or of another shape.
    """
    lines = differences(_shapes(saved), _shapes(present), f"{group}.")
    if lines:
        raise CheckpointError("\n".join(f"{line}; {remedy}" for line in lines))


def _shapes(params: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Returns the shape of every leaf."""
    return {name: list(leaf.shape) for name, leaf in params.items()}
