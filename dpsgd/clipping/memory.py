"""How much memory a microbatch takes, counted without running it.

The forward pass runs on the meta device, where tensors have shapes and no storage, and
what autograd would keep for the backward pass is added up.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.clipping.base import Engine
from dpsgd.kernels.tape import Tape
from dpsgd.trees import num_elements

__all__ = ["MicrobatchMemory", "measure_microbatch"]

_FLOAT32_BYTES = 4


class _Peak(NamedTuple):
    """What an example takes at the peak of a pass.

    Attributes:
        share: Of what autograd would keep, with the operators of the device.
        copies: Of a gradient in float32.
    """

    share: float
    copies: int


# Bounds, measured. CPU: small networks and NF-ResNet-50, which take 0.4 to 1 times that
# with each; under vmap operators give gradients in another layout, and copies of them.
# CUDA: H100, WRN-16-4 in bfloat16 with vmap (0.86 of the share). Ghost, which stores no
# gradient that vmap does not, is counted like it there.
_PEAKS: dict[tuple[str, Engine | None], _Peak] = {
    ("cpu", "vmap"): _Peak(3.0, 4),
    ("cpu", "ghost"): _Peak(2.0, 1),
    ("cpu", None): _Peak(2.0, 0),
    ("cuda", "vmap"): _Peak(1.15, 1),
    ("cuda", "ghost"): _Peak(1.15, 1),
    ("cuda", None): _Peak(1.15, 0),
}


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
    engine: Engine | None,
    device: str = "cpu",
) -> MicrobatchMemory:
    """Bounds the memory of passes from above: they take 0.4 to 1 times as much.

    A megabyte of the CPU kernels' own is not counted.

    Args:
        model: Network whose parameters are on the meta device. Frozen ones have no
            gradients; the activations that a backward pass would need are counted
            all the same, because a forward pass holds some of them.
        image_shape: (C, H, W) of one image, or whatever else the model is given.
        num_views: Views K of each example.
        engine: What bounds the gradients; None where no example's is stored.
        device: Type of the device that is planned for, `cpu` or `cuda`.
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
    peak = _PEAKS[device, engine]
    per_example = int(peak.share * (two - one)) + peak.copies * grads
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
