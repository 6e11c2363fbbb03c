"""How much memory a microbatch takes, counted without running it.

The forward pass runs on the meta device, where tensors have shapes and no storage, and
what autograd would keep for the backward pass is added up.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.kernels.tape import Tape
from dpsgd.trees import num_elements

__all__ = ["MicrobatchMemory", "measure_microbatch"]

_FLOAT32_BYTES = 4
# What a pass takes at its peak, over what autograd would keep with the operators that
# run on the device. Measured: CPU, small networks (0.6 to 0.8 of 1.9); H100, WRN-16-4
# in bfloat16 (0.86 of 1.15).
_CPU_SHARE, _CUDA_SHARE = 1.9, 1.15
# Copies of the per-sample gradients: plain operators give some in another layout.
_CPU_COPIES, _CUDA_COPIES = 2, 1


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
    model: nn.Module,
    *,
    image_shape: tuple[int, ...],
    num_views: int,
    device: str = "cpu",
    per_sample: bool = True,
) -> MicrobatchMemory:
    """Counts the memory of the vmap engine, or of a pass without privacy.

    Args:
        model: Network whose parameters are on the meta device. Frozen ones have no
            gradients; the activations that a backward pass would need are counted
            all the same, because a forward pass holds some of them.
        image_shape: (C, H, W) of one image, or whatever else the model is given.
        num_views: Views K of each example.
        device: Type of the device that is planned for, `cpu` or `cuda`.
        per_sample: Whether every example has a gradient of its own.
    """
    leaves = dict(model.named_parameters())
    params = {name: leaf.detach() for name, leaf in leaves.items()}
    # Under a tape operators are those that run on CUDA, without copies in float32.
    with Tape() if device == "cuda" else nullcontext():
        one, two = (
            _saved_bytes(model, params, (count * num_views, *image_shape))
            for count in (1, 2)
        )
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = _FLOAT32_BYTES * num_elements(trained)
    frozen = _FLOAT32_BYTES * num_elements(params) - grads
    share, copies = _CPU_SHARE, _CPU_COPIES
    if device == "cuda":
        share, copies = _CUDA_SHARE, _CUDA_COPIES
    per_example = int(share * (two - one)) + per_sample * copies * grads
    return MicrobatchMemory(fixed=5 * grads + frozen, per_example=per_example)


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
