"""Fused operators, one a file: a Triton kernel beside its PyTorch reference.

Each public function launches its kernel on CUDA and runs its reference on the CPU, or,
for the norm, a path of its own that is kept in the cache.
`TRITON_INTERPRET=1` runs the kernels on a CPU too.
"""

from dpsgd.kernels.activations import Activation, activation
from dpsgd.kernels.bias_activation import bias_activation
from dpsgd.kernels.clip_accumulate import clip_accumulate_
from dpsgd.kernels.fused_norm import group_norm, sum_relu_group_norm
from dpsgd.kernels.gaussian_noise import add_gaussian_noise_
from dpsgd.kernels.geometry import ConvGeometry
from dpsgd.kernels.linear import linear
from dpsgd.kernels.make_views import make_views
from dpsgd.kernels.noisy_sgd import SGDStep, noisy_sgd_
from dpsgd.kernels.position_mean import position_mean
from dpsgd.kernels.residual_activation import residual_activation
from dpsgd.kernels.standardized_conv import standardized_conv2d

__all__ = [
    "Activation",
    "ConvGeometry",
    "SGDStep",
    "activation",
    "add_gaussian_noise_",
    "bias_activation",
    "clip_accumulate_",
    "group_norm",
    "linear",
    "make_views",
    "noisy_sgd_",
    "position_mean",
    "residual_activation",
    "standardized_conv2d",
    "sum_relu_group_norm",
]
