"""Arithmetic on `dict[str, Tensor]`, the one form that parameters take here."""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Params", "all_finite", "num_elements", "sha256", "zeros_like"]

Params = dict[str, Tensor]


def all_finite(params: Mapping[str, Tensor]) -> bool:
    """Returns whether no leaf holds inf or NaN; if so the device is waited for once.

    >>> all_finite({"weight": torch.tensor([3e38, 0.0]), "none": torch.zeros(0, 3)})
    True
    """
    norms = torch._foreach_norm(list(params.values()))
    if torch.stack(norms).isfinite().all():
        return True
    # A norm overflows where no element does: its squares do.
    return all(bool(leaf.isfinite().all()) for leaf in params.values())


def num_elements(params: Mapping[str, Tensor]) -> int:
    """Returns the number of scalars in all leaves together.

    >>> num_elements({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    8
    """
    return sum(math.prod(leaf.shape) for leaf in params.values())


def zeros_like(
    params: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Params:
    """Returns contiguous zeros in the shape, order and device of `params`."""
    zeros = {
        name: torch.empty(leaf.shape, dtype=dtype, device=leaf.device)
        for name, leaf in params.items()
    }
    if zeros:
        torch._foreach_zero_(list(zeros.values()))  # one launch, not one a leaf
    return zeros


def sha256(params: Mapping[str, Tensor]) -> str:
    """Returns a digest of names, dtypes, shapes and bytes, as 64 hexadecimal digits.

    Leaves are taken one by one, so that a mapping may read them from a disk.
    """
    digest = hashlib.sha256()
    for name in sorted(params):
        leaf = params[name].detach().cpu().contiguous()
        digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        # As bytes, for numpy has no bfloat16.
        digest.update(leaf.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
