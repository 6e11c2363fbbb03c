"""Where the leaves of the parameters lie, and the one sum over all ranks.

A leaf is whole on every rank, or in shards of whole rows: with R rows and W ranks, each
rank in turn has the next ceil(R / W) rows while there are any, so that the last may
have fewer or none. Momenta and averages lie like their parameters.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpsgd.parallel.ranks import Ranks
from dpsgd.trees import Params, sha256

if TYPE_CHECKING:  # its import takes a second that runs without shards spare
    from torch.distributed.fsdp import FSDPModule

__all__ = ["Layout"]

# Their names since torch 2.14, where the old ones warn of their end.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@final
class Layout:
    """What each rank has of every leaf; without shards and ranks, all of it.

    Args:
        ranks: The processes.
        shapes: Whole shape of every leaf by name.
        owner: What has sharded the parameters, by `fully_shard`, under the names of
            the leaves; None if every leaf is whole on every rank.
        blocks: Its parts that are gathered one by one, with the names of their leaves.
        stays: Whether gathered parameters keep their place from step to step, as
            passes need that are recorded in a CUDA graph.
    """

    def __init__(
        self,
        ranks: Ranks,
        shapes: Mapping[str, torch.Size],
        *,
        owner: nn.Module | None = None,
        blocks: Sequence[tuple["FSDPModule", Sequence[str]]] = (),
        stays: bool = False,
    ) -> None:
        self.ranks = ranks
        self._shapes = dict(shapes)
        self._owner = owner
        self._blocks = blocks
        self._stays = stays
        self._places: Params = {}
        self._has_summed = False
        self._sharded = {
            name for name, shape in shapes.items() if owner is not None and shape
        }

    @property
    def offsets(self) -> dict[str, int]:
        """Elements of each whole leaf that lie before this rank's part of it.

        They tell the noise which of its draws are this rank's: no two ranks that hold
        different elements take the same ones.
        """
        return {
            name: self._rows(name).start * shape[1:].numel() if shape else 0
            for name, shape in self._shapes.items()
        }

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Returns this rank's part of a leaf, or of what is shaped like one.

        Args:
            name: The leaf's; anything else, and a scalar, is whole on every rank.
            whole: (rows, ...) values.
        """
        return whole[self._rows(name)] if self.divides(name, whole) else whole

    def outline(self, leaves: Params) -> Params:
        """Returns leaves of the whole shapes, without values."""
        return {
            name: torch.empty(
                self._shapes.get(name, leaf.shape), dtype=leaf.dtype, device="meta"
            )
            for name, leaf in leaves.items()
        }

    @property
    def is_sharded(self) -> bool:
        """Whether any rank has only parts of some leaves."""
        return self._owner is not None

    def divides(self, name: str, part: Tensor) -> bool:
        """Returns whether a leaf, or what belongs to one, is in parts."""
        return name in self._sharded and part.dim() > 0

    @contextmanager
    def gathered(self, params: Params) -> Iterator[Params]:
        """Gives the whole parameters, for as long as the context lasts.

        The owner gathers them block by block, and gives their memory back at the end.
        If they stay, each block is copied to its place and given back at once.

        Args:
            params: This rank's parts, those that the owner has.
        """
        if self._owner is None:
            yield params
            return
        with self.ranks.exchanging("gathering of parameters"):
            for block, names in self._blocks:
                block.unshard()
                if self._stays:
                    self._keep(names)
                    block.reshard()
            self.ranks.wait()  # whatever waits for the device next would not tell why
        whole = self._places if self._stays else self._gathered(self._sharded)
        try:
            yield {name: whole.get(name, leaf) for name, leaf in params.items()}
        finally:
            if not self._stays:
                for block, _ in self._blocks:
                    block.reshard()

    def _gathered(self, names: Collection[str]) -> Params:
        """Returns what the owner has whole at this moment."""
        assert self._owner is not None
        return {name: self._owner.get_parameter(name).detach() for name in names}

    def _keep(self, names: Sequence[str]) -> None:
        """Copies what is gathered at this moment to its place."""
        leaves = self._gathered(names)
        if names[0] not in self._places:
            self._places |= {name: torch.empty_like(leaves[name]) for name in names}
        places = [self._places[name] for name in names]
        torch._foreach_copy_(places, list(leaves.values()))

    def whole(self, leaves: Params) -> Params:
        """Returns whole leaves, such as averages, from all ranks' parts."""
        if not self._sharded:
            return leaves
        with self.ranks.exchanging("gathering of averages"):
            return {name: self._whole(name, leaf) for name, leaf in leaves.items()}

    def total(self, clipped_sum: Params) -> Params:
        r"""Returns this rank's part of the sum over all ranks: the only reduction.

        $S = \sum_r S_r$, where $S_r$ is the sum over the examples of rank r. Every
        element is reduced once a step: to all ranks if its leaf is whole on each, else
        to the one rank that has it.

        Guarantees:
            It is the sum, never the mean: neither the number of ranks nor of examples
            divides anything. As every example is in one rank's sum, clipped there, S
            has the sensitivity of a single process's sum.

        Args:
            clipped_sum: Whole leaves, the sum over this rank's share of the draw.
                Taken apart leaf by leaf, so that one of them is held twice at a time.

        Source: Abadi et al. 2016, Algorithm 1, the sum under "Add noise"
        (arXiv:1607.00133).
        """
        if self.ranks.mesh is None:
            return clipped_sum
        if not self._has_summed:  # kernels were compiled: no rank is late for that
            self.ranks.meet()
            self._has_summed = True
        with self.ranks.exchanging("sum of clipped gradients"):
            # Every rank must take the leaves in the same order.
            return {
                name: self._total(name, clipped_sum) for name in sorted(self._shapes)
            }

    def require_alike(self, params: Params) -> None:
        """Raises ConfigError if ranks differ where they hold the same leaves."""
        if self.ranks.size == 1:
            return
        alike = {name: one for name, one in params.items() if name not in self._sharded}
        self.ranks.require_same({"parameters": sha256(alike)})

    def _rows(self, name: str) -> slice:
        """Returns which rows of a leaf this rank has."""
        shape = self._shapes[name]
        if name not in self._sharded:
            return slice(0, shape[0] if shape else 1)
        most = self._most_rows(name)
        start = min(self.ranks.rank * most, shape[0])
        return slice(start, min(start + most, shape[0]))

    def _total(self, name: str, clipped_sum: Params) -> Tensor:
        """Returns this rank's part of the sum of one leaf, which leaves the dict."""
        leaf, group = clipped_sum.pop(name), self.ranks.mesh.get_group()
        if name not in self._sharded:
            dist.all_reduce(leaf, dist.ReduceOp.SUM, group)
            return leaf
        most = self._most_rows(name)
        part = leaf.new_empty(most, *leaf.shape[1:])
        whole = _padded(leaf, most * self.ranks.size)
        _reduce_scatter(part, whole, dist.ReduceOp.SUM, group)
        rows = self._rows(name)
        return part[: rows.stop - rows.start]

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """Returns a whole leaf from the parts of all ranks."""
        if name not in self._sharded:
            return part
        shape = self._shapes[name]
        most = self._most_rows(name)
        whole = part.new_empty(most * self.ranks.size, *shape[1:])
        _all_gather(whole, _padded(part, most), self.ranks.mesh.get_group())
        return whole[: shape[0]]

    def _most_rows(self, name: str) -> int:
        """Returns how many rows the first rank has of a leaf that is in shards."""
        return -(-self._shapes[name][0] // self.ranks.size)


def _padded(leaf: Tensor, num_rows: int) -> Tensor:
    """Returns a leaf with rows of zeros after its own, so many in all."""
    if missing := num_rows - len(leaf):
        return torch.cat([leaf, leaf.new_zeros(missing, *leaf.shape[1:])])
    return leaf.contiguous()
