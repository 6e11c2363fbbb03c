"""How much work fused operators are given, and what is known of it beforehand."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpsgd.config import ModelConfig
from dpsgd.models import build_model, trainable_params

Result = tuple[Tensor, ...]


class Work(NamedTuple):
    """How much work: a WRN-16-4 pass on CUDA, a trial of the same shape elsewhere."""

    examples: int
    views: int
    width: int
    side: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def normals(self, *shape: int) -> Tensor:
        """Returns float32 normals."""
        return torch.randn(shape, device=self.device)

    def images(self, channels: int, shrunk: int) -> Tensor:
        """Returns activations (M, K, C, H, W), each image channels-last."""
        side = self.side // shrunk
        shape = (self.examples, self.views, side, side, channels)
        return self.normals(*shape).to(self.dtype).permute(0, 1, 4, 2, 3)

    def parameters(self) -> list[Tensor]:
        """Returns leaves of the network, by name."""
        config = ModelConfig(depth=16, width=self.width)
        model = build_model(config, image_shape=(3, 32, 32), num_classes=10)
        leaves = sorted(trainable_params(model).items())
        return [self.normals(*leaf.shape) for _, leaf in leaves]


class Case(NamedTuple):
    """An operator at work.

    Attributes:
        run: Does the work once and returns what it made; it may change its inputs.
        exact: Returns the same in float64; called before `run`, which it must not use.
        num_bytes: Least number of bytes to read and write.
        num_flops: Two for each multiplication with an addition.
    """

    run: Callable[[], Result]
    exact: Callable[[], Result]
    num_bytes: int
    num_flops: int = 0


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
