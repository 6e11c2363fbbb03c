"""The fused operators of layers, and their gradients, as cases of kernel_cases.py."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dpsgd.kernels import (
    Activation,
    bias_activation,
    residual_activation,
    sum_relu_group_norm,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from kernel_work import Case, Result, Work, wide

GROUPS, EPS = 16, 1e-5


def differentiable(
    forward: Callable[..., Result],
    leaves: list[Tensor],
    *,
    backward: bool,
    num_images: int,
) -> Case:
    """Returns a case of an operator, or of its gradient alone.

    Args:
        forward: Returns images (N, C, H, W).
        leaves: Its inputs, images first.
        backward: Whether the gradient is taken.
        num_images: How many tensors like the first must be read and written.
    """
    grad = torch.randn_like(leaves[0])

    def gradient(*inputs: Tensor) -> Callable[[], Result]:
        inputs = tuple(one.detach().requires_grad_() for one in inputs)
        outputs = forward(*inputs)
        grads = [grad.to(one.dtype) for one in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    num_bytes = num_images * leaves[0].nbytes
    if backward:
        return Case(gradient(*leaves), lambda: gradient(*wide(*leaves))(), num_bytes)
    return Case(lambda: forward(*leaves), lambda: forward(*wide(*leaves)), num_bytes)


def norm(
    channels: int, shrunk: int, *, adds: bool = False, backward: bool = False
) -> Callable[[Work], Case]:
    """Bias, ReLU and group normalisation; `adds` adds a residual and keeps the sum."""

    def build(work: Work) -> Case:
        x, residual = (work.images(channels, shrunk).flatten(0, 1) for _ in range(2))
        bias, scale, shift = work.normals(3, channels).unbind()
        leaves = [x, bias, scale, shift, *([residual] if adds else [])]

        def forward(x: Tensor, bias: Tensor, *rest: Tensor) -> Result:
            other = rest[2] if adds else None
            affines = ((rest[0], rest[1]),)
            outputs, total = sum_relu_group_norm(
                x, (bias,), other, affines, num_groups=GROUPS, eps=EPS
            )
            return outputs if total is None else (*outputs, total)

        tensors = 3 + 2 * adds if backward else 2 + 2 * adds
        return differentiable(forward, leaves, backward=backward, num_images=tensors)

    return build


def biased(
    channels: int, shrunk: int, kind: Activation, *, backward: bool = False
) -> Callable[[Work], Case]:
    """An activation of images and a bias."""

    def build(work: Work) -> Case:
        x, bias = work.images(channels, shrunk).flatten(0, 1), work.normals(channels)
        return differentiable(
            lambda x, bias: (bias_activation(x, bias, kind),),
            [x, bias],
            backward=backward,
            num_images=3 if backward else 2,
        )

    return build


def block_end(
    channels: int, shrunk: int, *, backward: bool = False
) -> Callable[[Work], Case]:
    """The sum of shortcut and scaled branch, and its ReLU."""

    def build(work: Work) -> Case:
        branch, shortcut = (
            work.images(channels, shrunk).flatten(0, 1) for _ in range(2)
        )
        scale = work.normals(len(branch), 1)
        leaves = [branch, shortcut, work.normals(channels), scale]

        def forward(
            branch: Tensor, shortcut: Tensor, bias: Tensor, scale: Tensor
        ) -> Result:
            return residual_activation(
                shortcut,
                branch,
                shortcut_bias=None,
                bias=bias,
                scale=scale,
                kind="relu",
            )

        return differentiable(
            forward, leaves, backward=backward, num_images=6 if backward else 4
        )

    return build
