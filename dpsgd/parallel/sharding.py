"""Parameters in shards: FSDP2 owns them, block by block.

| | whole on a rank | in shards of 1/W |
|--|--|--|
| at rest | frozen tensors, scalars | parameters, momenta, average |
| in the passes of a step | parameters, sum of clipped gradients | |
| in the sum over ranks | sum of clipped gradients, one leaf more | |
| in noise, update, average | | sum of clipped gradients |
| in an evaluation | the weights that are measured | |

So the peak of a step is two float32 copies of the parameters beside the shards and the
pass itself. Where passes are recorded, which read parameters at one address, the whole
copy stays there at all times, and while it is filled one block is held twice. The
network that computes is a plain one whose trainable parameters have no memory of their
own: per-sample gradients go through torch.func, which does not know sharded parameters.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.parallel.layout import Layout
from dpsgd.parallel.ranks import Ranks
from dpsgd.trees import Params, sha256

__all__ = ["laid_out"]


def laid_out(
    model: nn.Module, ranks: Ranks, parallel: str, *, stays: bool = False
) -> tuple[Layout, Params]:
    """Returns where the trainable parameters lie from now on, and this rank's part.

    Args:
        model: Network, the same on every rank, on the device. Where parameters are
            sharded it loses the values of the trainable ones.
        ranks: The processes.
        parallel: `none`, `ddp` or `fsdp`; the last shards if there is a process group.
        stays: As for `Layout`.

    Raises:
        ConfigError: Ranks have networks of different values.
    """
    if ranks.size > 1:
        ranks.require_same({"network": sha256(model.state_dict())})
    trained = {
        name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad
    }
    shapes = {name: leaf.shape for name, leaf in trained.items()}
    if parallel != "fsdp" or ranks.mesh is None:
        return Layout(ranks, shapes), {
            name: leaf.detach().clone(memory_format=torch.contiguous_format)
            for name, leaf in trained.items()
        }
    owner, blocks = _sharded(model, ranks)
    for name in trained:
        _empty(model, name)
    leaves = dict(owner.named_parameters())
    params = {name: _local(leaves[name].detach()) for name in trained}
    layout = Layout(ranks, shapes, owner=owner, blocks=blocks, stays=stays)
    return layout, params


def _local(leaf: Tensor) -> Tensor:
    """Returns this rank's part of a leaf: a view of what its owner has."""
    from torch.distributed.tensor import DTensor

    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def _sharded(
    model: nn.Module, ranks: Ranks
) -> tuple[nn.Module, list[tuple[Any, list[str]]]]:
    """Returns a network that keeps the trainable parameters in shards, and only that.

    Its parameters are views of the shards, so that an update of them in place is seen
    when they are gathered. Beside it, its blocks and the names of what each has.
    """
    from torch.distributed.fsdp import fully_shard

    owner = copy.deepcopy(model)
    for leaf in owner.parameters():
        leaf.data = leaf.data.contiguous()
    ignored = {
        leaf for leaf in owner.parameters() if not leaf.requires_grad or leaf.dim() == 0
    }
    names = {
        leaf: name for name, leaf in owner.named_parameters() if leaf not in ignored
    }
    blocks = []
    for module in (*_blocks(owner), owner):
        own = [names.pop(leaf) for leaf in [*module.parameters()] if leaf in names]
        if own:
            fully_shard(module, mesh=ranks.mesh, ignored_params=ignored)
            blocks.append((module, own))
    return owner, blocks


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields what networks here repeat: the members of their lists of modules."""
    lists = (nn.Sequential, nn.ModuleList)
    for child in module.children():
        if isinstance(module, lists) and not isinstance(child, lists):
            yield child
        else:
            yield from _blocks(child)


def _empty(model: nn.Module, name: str) -> None:
    """Takes the values of a parameter away."""
    module, _, own_name = name.rpartition(".")
    holder = model.get_submodule(module)
    old = holder.get_parameter(own_name)
    setattr(holder, own_name, nn.Parameter(torch.empty_like(old, device="meta")))
