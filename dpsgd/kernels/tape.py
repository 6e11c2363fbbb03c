"""Records what the gradients of parameters are made of, in place of forming them.

In a backward pass under a tape, the operators of this room hand over what the gradient
of each example is made of, and give autograd none for their parameters: whoever holds
the tape decides how norms are taken, before or without any gradient being stored.
"""

from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from dpsgd.kernels.geometry import ConvGeometry
from dpsgd.kernels.weight_standardization import Standardization

__all__ = [
    "ConvRecord",
    "LinearRecord",
    "Record",
    "RowsRecord",
    "Tape",
    "active_tape",
    "leaf_grad",
]


class ConvRecord(NamedTuple):
    """A convolution whose weights' gradient is still to be formed.

    Attributes:
        weight: (O, KH, KW, I / groups) parameter.
        x: (N, I, H, W) inputs, the images of all examples one after the other.
        grad_y: (N, O, HO, WO) gradients of the outputs.
        geometry: Of the convolution.
        standardization: Of the weights; None takes them as they are.
    """

    weight: Tensor
    x: Tensor
    grad_y: Tensor
    geometry: ConvGeometry
    standardization: Standardization | None


class LinearRecord(NamedTuple):
    """A linear layer whose weights' gradient is still to be formed.

    Attributes:
        weight: (O, I) parameter.
        x: (N, I) inputs, float32 or wider.
        grad_y: (N, O) gradients of the outputs, float32 or wider.
    """

    weight: Tensor
    x: Tensor
    grad_y: Tensor


class RowsRecord(NamedTuple):
    """A parameter of few elements, with its gradient for every image.

    Attributes:
        leaf: (C,) parameter.
        grads: (N, C) gradients, float32 or wider.
    """

    leaf: Tensor
    grads: Tensor


Record = ConvRecord | LinearRecord | RowsRecord


class Tape:
    """Collects the records of one backward pass, as a context; they do not nest.

    Attributes:
        records: What was recorded, in the order of the backward pass.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __enter__(self) -> "Tape":
        """Lets operators record here."""
        global _active
        assert _active is None, "a pass under a tape began within another"
        _active = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the recording, also after an error."""
        global _active
        _active = None


# Not a context variable: autograd runs backward passes of CUDA in threads of its own.
_active: Tape | None = None


def active_tape() -> Tape | None:
    """Returns the tape that operators must record on, or None."""
    return _active


def leaf_grad(leaf: Tensor, rows: Tensor) -> Tensor | None:
    """Returns the gradient of a small parameter from those of all images.

    Args:
        leaf: (C,) parameter.
        rows: (N, C) its gradient for every image.

    Returns:
        (C,), or None where it is not trained, or a tape records the rows instead.
    """
    if not leaf.requires_grad:
        return None
    tape = active_tape()
    if tape is None:
        return rows.sum(0)
    tape.records.append(RowsRecord(leaf, rows))
    return None
