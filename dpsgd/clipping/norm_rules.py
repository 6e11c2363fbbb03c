r"""How per-sample norms and clipped sums are taken, layer by layer: the cheapest way.

With T positions (of all views of an example), fan-in F and O outputs, one example's
weight gradient $g = \sum_t \delta_t \otimes x_t$ can be

* stored: 2TFO operations, then OF numbers are written once and read twice;
* measured: the same operations, but only sums over $g$ are kept; the clipped sum takes
  as many again, and no memory (`measured`);
* never formed: $\|g\|^2 = \sum_{t,t'} (\delta_t \cdot \delta_{t'}) (x_t \cdot x_{t'})$
  takes $2T^2(F + O)$ operations (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022,
  arXiv:2110.05679, "ghost norm"); the clipped sum is one product over all examples.

The last is for linear layers. A convolution with standardised weights needs
$\langle u, g \rangle$ of every output channel too, for which there is no such shortcut.

Guarantees:
    A norm is that of the very gradient that is added, times its factor, to float32
    rounding; where rounding could make it too small, a bound on that is added.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dpsgd.clipping.vmap import per_sample_norms
from dpsgd.kernels import clip_accumulate_
from dpsgd.kernels.conv_weight_grad import (
    conv_weight_grad,
    conv_weight_grad_moments,
    conv_weight_grad_sum,
)
from dpsgd.kernels.tape import ConvRecord, LinearRecord
from dpsgd.kernels.weight_standardization import (
    ROUNDINGS,
    unstandardize_,
    unstandardized_norms,
    unstandardized_squares,
)

__all__ = [
    "GhostLinear",
    "LayerGrads",
    "MeasuredConv",
    "RowGrads",
    "StoredConv",
    "choose_conv_rule",
]

# Storing a weight's gradient takes three passes over its bytes, at 2.5 TB/s; forming it
# once more takes two operations a position, at 330 TFLOP/s: measured on an H100. On a
# CPU storing is cheaper at any number of positions.
_POSITIONS_PER_BYTE = {"cuda": 64, "cpu": 0}


class LayerGrads(ABC):
    """The gradients of M examples with respect to some parameters.

    Attributes:
        leaves: The parameters.
    """

    leaves: tuple[Tensor, ...]

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """Returns (M,) squared norms over all leaves; at least what is added."""

    @abstractmethod
    def clipped_sums(self, factors: Tensor) -> tuple[Tensor, ...]:
        """Returns, for each leaf, the sum of gradients times a factor each.

        Args:
            factors: (M,) float32, >= 0; an example whose factor is 0 is left out.
        """

    @abstractmethod
    def stored(self) -> tuple[Tensor, ...]:
        """Returns the gradients themselves, (M, ...), float32 or wider."""


class RowGrads(LayerGrads):
    """Stored gradients of small parameters, as one row an example.

    Args:
        leaves: The parameters.
        grads: (M, ...) of each, float32 or wider.
    """

    def __init__(self, leaves: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
        self.leaves = leaves
        self._grads = grads
        rows = [grad.unsqueeze(1).flatten(1) for grad in grads]  # also of scalars
        self._rows = torch.cat(rows, dim=1)  # (M, P)

    def squared_norms(self) -> Tensor:
        """Returns the squares of the stored rows' norms."""
        return per_sample_norms({"rows": self._rows}).square()

    def clipped_sums(self, factors: Tensor) -> tuple[Tensor, ...]:
        """Returns parts of one weighted sum of rows."""
        total = torch.zeros_like(self._rows[0])
        clip_accumulate_(total, self._rows, factors)
        parts = torch.split(total, [leaf.numel() for leaf in self.leaves])
        return tuple(
            part.view_as(leaf) for part, leaf in zip(parts, self.leaves, strict=True)
        )

    def stored(self) -> tuple[Tensor, ...]:
        """Returns what was given."""
        return self._grads


class _Conv(LayerGrads):
    """A convolution, whose effective weights may follow from standardised ones.

    Args:
        record: Of the backward pass.
        num_examples: M.
    """

    def __init__(self, record: ConvRecord, num_examples: int) -> None:
        self._x = _by_example(record.x, num_examples)
        self._grad_y = _by_example(record.grad_y, num_examples)
        self._geometry = record.geometry
        self._how = record.standardization
        gains = () if self._how is None else (self._how.gain,)
        self.leaves = (record.weight, *gains)

    def stored(self) -> tuple[Tensor, ...]:
        """Returns float32 gradients of weights and gain."""
        grads = conv_weight_grad(self._x, self._grad_y, self._geometry)
        if self._how is None:
            return (grads,)
        gain_grads = unstandardize_(grads, self._how)
        return grads, gain_grads

    def _of_raw_weights(self, total: Tensor) -> tuple[Tensor, ...]:
        """Turns a sum of gradients of effective weights into sums for the leaves."""
        if self._how is None:
            return (total,)
        gain_total = unstandardize_(total[None], self._how)[0]
        return total, gain_total


class StoredConv(_Conv):
    """Stores the gradients of the effective weights, in the type of the inputs.

    They are rounded before their norm is taken, so what is added has that norm.
    """

    def __init__(self, record: ConvRecord, num_examples: int) -> None:
        super().__init__(record, num_examples)
        self._grads = conv_weight_grad(
            self._x, self._grad_y, self._geometry, dtype=self._x.dtype
        )

    def squared_norms(self) -> Tensor:
        """Returns squared norms after the Jacobian, which is applied on the fly."""
        if self._how is None:
            return per_sample_norms({"weight": self._grads}).square()
        return unstandardized_norms(self._grads, self._how)

    def clipped_sums(self, factors: Tensor) -> tuple[Tensor, ...]:
        """Adds up, then applies the Jacobian once."""
        wide = torch.promote_types(self._grads.dtype, torch.float32)
        total = torch.zeros_like(self._grads[0], dtype=wide)
        clip_accumulate_(total, self._grads, factors)
        return self._of_raw_weights(total)


class MeasuredConv(_Conv):
    """Forms the gradients twice, and stores none: once measured, once added up."""

    def squared_norms(self) -> Tensor:
        """Returns squared norms from sums over each row, with a bound on rounding."""
        how = self._how
        direction = self.leaves[0] if how is None else how.unit
        moments = conv_weight_grad_moments(
            self._x, self._grad_y, direction, self._geometry
        )  # (3, M, O)
        if how is None:
            return moments[0].sum(1)
        return unstandardized_squares(moments, how)

    def clipped_sums(self, factors: Tensor) -> tuple[Tensor, ...]:
        """Forms the sum in one pass, then applies the Jacobian once."""
        total = conv_weight_grad_sum(self._x, self._grad_y, factors, self._geometry)
        return self._of_raw_weights(total)


class GhostLinear(LayerGrads):
    """Norms from two Gram matrices, the sum from one product over all examples.

    Args:
        record: Of the backward pass.
        num_examples: M.
    """

    def __init__(self, record: LinearRecord, num_examples: int) -> None:
        self.leaves = (record.weight,)
        self._x = _by_example(record.x, num_examples)  # (M, K, I)
        self._grad_y = _by_example(record.grad_y, num_examples)  # (M, K, O)

    def squared_norms(self) -> Tensor:
        """Returns squared norms, with a bound on the rounding of terms that cancel."""
        # Rows near 1: Gram matrices of tiny x and huge grad_y would be 0 and inf.
        (x, sizes_x), (grad_y, sizes_y) = map(_near_one, (self._x, self._grad_y))
        sizes = sizes_x * sizes_y  # (M, K, 1)
        terms = (x @ x.mT) * (grad_y @ grad_y.mT) * sizes * sizes.mT  # (M, K, K)
        eps = torch.finfo(terms.dtype).eps
        bound = ROUNDINGS * eps * terms.abs().sum((1, 2))
        squares: Tensor = terms.sum((1, 2)).clamp(min=0) + bound
        return squares

    def clipped_sums(self, factors: Tensor) -> tuple[Tensor, ...]:
        """Returns one product of reweighted gradients and inputs."""
        kept = (factors > 0)[:, None, None]
        weighted = torch.where(kept, self._grad_y * factors[:, None, None], 0.0)
        inputs = torch.where(kept, self._x, 0.0)
        return (torch.einsum("mko,mki->oi", weighted, inputs),)

    def stored(self) -> tuple[Tensor, ...]:
        """Returns (M, O, I)."""
        return (torch.einsum("mko,mki->moi", self._grad_y, self._x),)


def _near_one(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows (..., I) over powers of two, exactly, and those (..., 1)."""
    largest = rows.abs().amax(-1, keepdim=True)
    exponents = torch.frexp(largest.float()).exponent.clamp(-126, 126)
    ones = torch.ones_like(largest)
    return rows * torch.ldexp(ones, -exponents), torch.ldexp(ones, exponents)


def _by_example(images: Tensor, num_examples: int) -> Tensor:
    """Returns (M, K, ...) images of (M * K, ...)."""
    return images.view(num_examples, -1, *images.shape[1:])


def choose_conv_rule(record: ConvRecord, num_examples: int) -> LayerGrads:
    """Returns the cheaper of storing and measuring a convolution's gradients.

    Args:
        record: Of the backward pass.
        num_examples: M.
    """
    positions = record.grad_y[:, 0].numel() // num_examples
    least = _POSITIONS_PER_BYTE[record.x.device.type] * record.x.element_size()
    if positions < least:
        return MeasuredConv(record, num_examples)
    return StoredConv(record, num_examples)
