"""The second engine: one ordinary backward pass, and norms layer by layer.

The losses of all examples are formed by vmap, as in the first engine, but autograd runs
outside of it, once, under a tape: the layers record what their weights' gradients are
made of, and each is then stored, measured or never formed, whichever is cheapest.
Parameters that no layer records are given to vmap as one copy an example, so that
autograd returns their per-sample gradients.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from dpsgd.clipping.base import LossFn, PassStatistics
from dpsgd.clipping.execution import ExampleGrads, RecordedClippedGrad
from dpsgd.clipping.norm_rules import (
    GhostLinear,
    LayerGrads,
    RowGrads,
    choose_conv_rule,
)
from dpsgd.errors import fault
from dpsgd.kernels.tape import ConvRecord, LinearRecord, Record, RowsRecord, Tape
from dpsgd.trees import Params

__all__ = ["GhostClippedGrad"]

_REMEDY = "take runtime.engine=vmap"


class _Discovery(NamedTuple):
    """What the backward pass of one example told.

    Attributes:
        unrecorded: Names of parameters for which autograd itself returns a gradient.
        images: The number of images in each record, in the order of the pass.
    """

    unrecorded: frozenset[str]
    images: tuple[int, ...]


class GhostClippedGrad(RecordedClippedGrad):
    """Takes norms without storing what is dear to store.

    Guarantees:
        Those of `ClippedGrad`. A parameter that is used in a way of which not every
        part is recorded is refused by its name.

    Args:
        loss_fn: As for `ClippedGrad`.
        **bound: As for `RecordedClippedGrad`; `compile` is not for this engine.

    Raises:
        ValueError: As for `ClippedGrad`; or `execution` is `compile`.
    """

    def __init__(self, loss_fn: LossFn, **bound: Any) -> None:
        super().__init__(loss_fn, **bound)
        if self.execution == "compile":
            rule = "the ghost engine records layers, which torch.compile cannot follow"
            raise ValueError(fault("runtime.execution", "compile", rule, _REMEDY))
        self._known: dict[tuple[str, ...], _Discovery] = {}

    def accumulate(
        self, clipped_sum: Params, params: Params, *batch: Tensor, mask: Tensor
    ) -> PassStatistics:
        """Adds one microbatch's clipped gradients to `clipped_sum` in place.

        Raises:
            ValueError: The sums are wider than the parameters: a pass is summed in
                the type of these, so what is added would not be as exact as it looks.
        """
        for name, leaf in params.items():
            if clipped_sum[name].dtype.itemsize > leaf.dtype.itemsize:
                rule = f"the ghost engine sums in {leaf.dtype}"
                dtype = clipped_sum[name].dtype
                raise ValueError(fault(f"clipped_sum.{name}", dtype, rule, _REMEDY))
        return super().accumulate(clipped_sum, params, *batch, mask=mask)

    def _example_grads(
        self, params: Params, *batch: Tensor
    ) -> tuple[ExampleGrads, Tensor]:
        """Takes the backward pass and chooses a rule for every layer."""
        names = tuple(params)
        if names not in self._known:
            self._known[names] = self._discover(params, *batch)
        known = self._known[names]
        grads, records, losses = self._backward(params, known.unrecorded, *batch)
        _check_images(params, records, known.images, num_examples=len(losses))
        rows = [
            (params[name], grad) for name, grad in grads.items() if grad is not None
        ]
        return _LayerByLayer(params, _layers(records, rows, len(losses))), losses

    def _discover(self, params: Params, *batch: Tensor) -> "_Discovery":
        """Returns what a backward pass of one example records, and what it does not.

        Raises:
            ValueError: One of them is recorded as well, or a record is of none.
        """
        one = tuple(tensor[:1] for tensor in batch)
        grads, records, _ = self._backward(params, frozenset(), *one)
        unrecorded = {name for name, grad in grads.items() if grad is not None}
        names = _names_by_address(params)
        for leaf in (leaf for record in records for leaf in _leaves_of(record)):
            name = names.get(leaf.data_ptr())
            if name is None:
                rule = "a layer's parameter is computed from others"
                shape = tuple(leaf.shape)
                raise ValueError(fault("params", shape, rule, _REMEDY))
            if name in unrecorded:
                rule = "is used outside of the layers that record it, too"
                raise ValueError(fault("params", name, rule, _REMEDY))
        return _Discovery(frozenset(unrecorded), tuple(map(_num_images, records)))

    def _backward(
        self, params: Params, expanded: frozenset[str], *batch: Tensor
    ) -> tuple[dict[str, Tensor | None], list[Record], Tensor]:
        """Returns autograd's gradients, the tape's records, and losses (M,).

        Args:
            params: Parameters.
            expanded: Names of those that vmap is given a copy of for each example.
            *batch: Examples.
        """
        shape = (len(batch[0]),)
        leaves = {
            name: leaf.detach().expand(
                (*(shape if name in expanded else ()), *leaf.shape)
            )
            for name, leaf in params.items()
        }
        in_dims = {name: 0 if name in expanded else None for name in leaves}
        with torch.enable_grad(), Tape() as tape:
            for leaf in leaves.values():
                leaf.requires_grad_()
            run = vmap(self.loss_fn, (in_dims, *(0 for _ in batch)))
            losses = run(leaves, *batch)
            grads = torch.autograd.grad(
                losses.sum(), list(leaves.values()), allow_unused=True
            )
        return dict(zip(leaves, grads, strict=True)), tape.records, losses.detach()


class _LayerByLayer:
    """The gradients of M examples, in as many forms as there are rules.

    Args:
        params: Parameters.
        layers: Gradients with respect to them; a parameter of none has none.
    """

    def __init__(self, params: Params, layers: list[LayerGrads]) -> None:
        self._names = _names_by_address(params)
        self._layers = layers

    def per_sample_norms(self) -> Tensor:
        """Returns the norms (M,) over all layers."""
        squares = [layer.squared_norms() for layer in self._layers]
        return torch.stack(squares).sum(0).sqrt()

    def add_to(self, totals: Params, factors: Tensor) -> None:
        """Adds every layer's clipped sum."""
        names: list[str] = []
        sums: list[Tensor] = []
        for layer in self._layers:
            names += [self._names[leaf.data_ptr()] for leaf in layer.leaves]
            sums += layer.clipped_sums(factors)
        torch._foreach_add_([totals[name] for name in names], sums)


def _names_by_address(params: Params) -> dict[int, str]:
    """Returns names by where parameters lie, which is how layers know them."""
    return {leaf.data_ptr(): name for name, leaf in params.items()}


def _leaves_of(record: Record) -> tuple[Tensor, ...]:
    """Returns the parameters of a record that are trained."""
    if isinstance(record, RowsRecord):
        return (record.leaf,)
    leaves: tuple[Tensor, ...] = (record.weight,)
    if isinstance(record, ConvRecord) and record.standardization is not None:
        leaves = (record.weight, record.standardization.gain)
    return tuple(leaf for leaf in leaves if leaf.requires_grad)


def _num_images(record: Record) -> int:
    """Returns N, of how many images a record is made."""
    return len(record.grads if isinstance(record, RowsRecord) else record.x)


def _check_images(
    params: Params,
    records: list[Record],
    images: tuple[int, ...],
    *,
    num_examples: int,
) -> None:
    """Checks that every record holds the images of each example apart.

    A layer whose inputs do not depend on the example runs once for all, and its
    gradients come summed over examples: no per-sample norm is left in them.

    Args:
        params: Parameters.
        records: Of the backward pass of all examples.
        images: The number in each record of one example's pass.
        num_examples: M.

    Raises:
        ValueError: A record holds other than M times the images of one example.
    """
    if len(records) != len(images):
        rule = f"must be as many layers as of one example, {len(images)}"
        raise ValueError(fault("num_records", len(records), rule, _REMEDY))
    names = _names_by_address(params)
    for record, one in zip(records, images, strict=True):
        if _num_images(record) == one * num_examples:
            continue
        for leaf in _leaves_of(record):
            rule = "is used by a layer whose inputs do not depend on the example"
            raise ValueError(fault("params", names[leaf.data_ptr()], rule, _REMEDY))


def _layers(
    records: list[Record], rows: list[tuple[Tensor, Tensor]], num_examples: int
) -> list[LayerGrads]:
    """Returns a rule for every layer, and one for all small parameters together.

    Args:
        records: Of the backward pass.
        rows: Parameters and their gradients (M, ...), as autograd returned them.
        num_examples: M.
    """
    uses = Counter(leaf.data_ptr() for record in records for leaf in _leaves_of(record))
    layers: list[LayerGrads] = []
    small = [record for record in records if isinstance(record, RowsRecord)]
    rows = rows + _summed_over_views(small, num_examples)
    for record in records:
        if isinstance(record, RowsRecord):
            continue
        rule: LayerGrads
        if isinstance(record, LinearRecord):
            rule = GhostLinear(record, num_examples)
        else:
            rule = choose_conv_rule(record, num_examples)
        if all(uses[leaf.data_ptr()] == 1 for leaf in rule.leaves):
            layers.append(rule)
        else:  # the norm of a sum, or of a part, is not made of the norms of layers
            pairs = zip(rule.leaves, rule.stored(), strict=True)
            rows += [(leaf, grads) for leaf, grads in pairs if leaf.requires_grad]
    if rows:
        layers.append(_row_grads(rows))
    return layers


def _summed_over_views(
    records: list[RowsRecord], num_examples: int
) -> list[tuple[Tensor, Tensor]]:
    """Returns parameters and their gradients (M, ...), in one sum for all."""
    if not records:
        return []
    widths = [record.leaf.numel() for record in records]
    images = torch.cat([record.grads for record in records], dim=1)  # (N, P)
    examples = images.view(num_examples, -1, images.shape[1]).sum(1)  # (M, P)
    parts = torch.split(examples, widths, dim=1)
    return [(record.leaf, part) for record, part in zip(records, parts, strict=True)]


def _row_grads(rows: list[tuple[Tensor, Tensor]]) -> RowGrads:
    """Returns stored gradients, those of one parameter added up."""
    leaves: dict[int, Tensor] = {}
    grads: dict[int, Tensor] = {}
    for leaf, grad in rows:
        address = leaf.data_ptr()
        leaves[address] = leaf
        grads[address] = grads[address] + grad if address in grads else grad
    return RowGrads(tuple(leaves.values()), tuple(grads.values()))
