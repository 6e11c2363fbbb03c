"""Compiles the Triton kernels for an H100 on a machine without a GPU, and runs none.

A program of its own: Triton decides when a kernel is defined whether it is interpreted,
and in the process of the tests it is. This prints, as JSON, the names of all kernels
that the package defines, and name and shared memory of each that was compiled.
"""

import importlib
import json
import pkgutil
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dpsgd.kernels
from dpsgd.kernels import ConvGeometry, SGDStep
from dpsgd.kernels.bias_activation import (
    bias_activation_backward_triton,
    bias_activation_triton,
)
from dpsgd.kernels.clip_accumulate import clip_accumulate_triton_
from dpsgd.kernels.conv_weight_grad import (
    conv_weight_grad_moments_triton,
    conv_weight_grad_sum_triton,
    conv_weight_grad_triton,
)
from dpsgd.kernels.gaussian_noise import add_gaussian_noise_triton_
from dpsgd.kernels.make_views import make_views_triton
from dpsgd.kernels.noisy_sgd import noisy_sgd_triton_
from dpsgd.kernels.relu_group_norm import (
    relu_group_norm_backward_triton,
    relu_group_norm_triton,
)
from dpsgd.kernels.residual_activation import (
    residual_activation_backward_triton,
    residual_activation_triton,
)
from dpsgd.kernels.weight_standardization import (
    standardize_triton,
    unstandardize_triton_,
    unstandardized_norms_triton,
    unstandardized_squares_triton,
)

FLOAT, NARROW = torch.float32, torch.bfloat16


class AbsentH100:
    """What Triton asks of a driver before it launches, as an H100's would answer."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_in_place_of_launching() -> list[tuple[str, int]]:
    """Returns a list to which each launch from now on adds its kernel."""
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *inputs: Any, **options: Any) -> None:
        kernel = run(self, *inputs, **{**options, "warmup": True})
        compiled.append((self.__name__, kernel.metadata.shared))

    driver.set_active(AbsentH100())
    JITFunction.run = compile_only
    return compiled


def defined_kernels() -> list[str]:
    """Returns the names of all kernels, without the functions that they call."""
    return [
        name
        for module in pkgutil.iter_modules(dpsgd.kernels.__path__)
        for name, value in vars(
            importlib.import_module(f"dpsgd.kernels.{module.name}")
        ).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    ]


def images(*shape: int, dtype: torch.dtype = NARROW) -> Tensor:
    """Returns images (N, C, H, W) as a network has them."""
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)


def conv_weight_grads(
    num_examples: int,
    num_views: int,
    channels: tuple[int, int],
    side: int,
    geometry: ConvGeometry,
    dtype: torch.dtype = NARROW,
) -> None:
    count, out_side = num_examples * num_views, side // geometry.stride
    x = images(count, channels[0], side, side, dtype=dtype)
    grad_y = images(count, channels[1], out_side, out_side, dtype=dtype)
    x, grad_y = (one.unflatten(0, (num_examples, num_views)) for one in (x, grad_y))
    weight = conv_weight_grad_triton(x, grad_y, geometry, dtype=dtype)[0]
    conv_weight_grad_moments_triton(x, grad_y, weight.float(), geometry)
    conv_weight_grad_sum_triton(x, grad_y, torch.zeros(num_examples), geometry)


def norms(channels: int, side: int, *, is_full: bool) -> None:
    x, vector = images(2, channels, side, side), torch.zeros(channels)
    affines = ((vector, vector),) * (1 + is_full)
    residual, bias = (x, vector) if is_full else (None, None)
    outputs, _, *statistics = relu_group_norm_triton(
        x, bias, residual, affines, num_groups=16, eps=1e-5
    )
    scales = tuple(scale for scale, _ in affines)
    bias = None if is_full else vector
    relu_group_norm_backward_triton(x, bias, outputs, residual, *statistics, scales)


def activations() -> None:
    bias = torch.zeros(96)
    for kind in ("relu", "gelu"):
        y = bias_activation_triton(images(2, 96, 64, 64), bias, kind)
        bias_activation_backward_triton(y, y, bias, kind)


def residual_activations() -> None:
    bias, x = torch.zeros(96), images(2, 96, 64, 64)
    for kind, width in (("relu", 1), ("gelu", 96)):
        how = {"bias": bias, "scale": torch.zeros(2, width), "kind": kind}
        for more in (None, bias):
            residual_activation_triton(x, x, shortcut_bias=more, **how)
        for grads in ((x, x), (x, None), (None, x)):
            residual_activation_backward_triton(grads, x, x, **how)


def standardizations() -> None:
    weight = torch.zeros(64, 3, 3, 64)
    effective, how = standardize_triton(weight, torch.zeros(64), NARROW)
    unstandardize_triton_(weight[None], how)
    unstandardized_norms_triton(effective.expand(2, *weight.shape).contiguous(), how)
    unstandardized_squares_triton(torch.zeros(3, 2, 64), how)


def updates() -> None:
    total, rows = torch.zeros(5000), torch.zeros(3, 5000, dtype=NARROW)
    clip_accumulate_triton_(total, rows, torch.zeros(3))
    add_gaussian_noise_triton_(total, std=1.0, key=2**63, leaf=1)
    step = SGDStep(noise_std=1.0, noise_key=2**63, divisor=2.0, learning_rate=1.0)
    leaves = [total, total]
    for more in (None, leaves):
        noisy_sgd_triton_(
            leaves, leaves, step=step, momenta=more, averages=more, offsets=[0, 1]
        )


def views() -> None:
    for size in (None, (24, 24)):
        make_views_triton(
            torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
            torch.zeros(3, 256, dtype=NARROW),
            offsets=torch.zeros(2, 4, 2, dtype=torch.int64),
            flips=torch.zeros(2, 4, dtype=torch.bool),
            padding=4,
            size=size,
        )


def main() -> None:
    compiled = compile_in_place_of_launching()
    # The widest tiles, through descriptors; a stem, pixel by pixel; sizes of 1, which
    # Triton makes constants of the program; and float32, a step of two pixels.
    conv_weight_grads(2, 4, (128, 128), 16, ConvGeometry(3, 1, 1))
    conv_weight_grads(2, 4, (3, 64), 64, ConvGeometry(7, 2, 3))
    conv_weight_grads(1, 1, (8, 8), 1, ConvGeometry(3, 1, 1))
    conv_weight_grads(2, 3, (16, 32), 8, ConvGeometry(1, 2), FLOAT)
    norms(64, 32, is_full=True)
    norms(16, 1, is_full=False)
    activations()
    residual_activations()
    standardizations()
    updates()
    views()
    print(json.dumps({"defined": defined_kernels(), "compiled": compiled}))


if __name__ == "__main__":
    main()
