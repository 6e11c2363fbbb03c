"""How much memory a microbatch takes, counted without running it.

The forward pass runs on the meta device, where tensors have shapes and no storage, and
what autograd would keep for the backward pass is added up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.trees import num_elements

__all__ = ["MicrobatchMemory", "measure_microbatch"]

_FLOAT32_BYTES = 4
# Gradients of activations and temporaries beside the saved activations, as measured
# without compilation on an H100 (WRN-16-4, 128 examples of 16 views: 19.5 GiB; compiled
# it is 7.0 GiB).
_TRANSIENT_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class MicrobatchMemory:
    """Bytes that training takes on the device.

    Attributes:
        fixed: Whatever the microbatch size: parameters, average, optimiser, sums.
        per_example: For each example of the microbatch, all its views.
    """

    fixed: int
    per_example: int

    def total(self, microbatch_size: int) -> int:
        """Returns the bytes that a microbatch of this size needs."""
        return self.fixed + microbatch_size * self.per_example

    def largest_fitting(self, available: int) -> int:
        """Returns the most examples that fit in `available` bytes, 0 if none does."""
        return max(0, (available - self.fixed) // self.per_example)


def measure_microbatch(
    model: nn.Module, *, image_shape: tuple[int, int, int], num_views: int
) -> MicrobatchMemory:
    """Counts the memory of the vmap engine.

    Args:
        model: Network whose parameters are on the meta device.
        image_shape: (C, H, W) of one image.
        num_views: Views K of each example.
    """
    params = {name: leaf.detach() for name, leaf in model.named_parameters()}
    one, two = (
        _saved_bytes(model, params, (count * num_views, *image_shape))
        for count in (1, 2)
    )
    grads = _FLOAT32_BYTES * num_elements(params)
    activations = int((two - one) * (1 + _TRANSIENT_SHARE))
    # vmap gives some gradients in another layout, and they are copied once.
    return MicrobatchMemory(fixed=5 * grads, per_example=activations + 2 * grads)


def _saved_bytes(
    model: nn.Module, params: dict[str, Tensor], shape: tuple[int, ...]
) -> int:
    """Returns the bytes of tensors that a backward pass would need."""
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
        kept.append(tensor)  # an address is unique only while its owner lives
        return tensor

    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = functional_call(model, leaves, (torch.empty(shape, device="meta"),))
        logits.sum()
    return sum(seen.values())
