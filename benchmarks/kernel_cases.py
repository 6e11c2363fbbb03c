"""The fused operators at work, each with its result in float64 and its least work."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dpsgd.kernels import (
    ConvGeometry,
    SGDStep,
    add_gaussian_noise_,
    clip_accumulate_,
    make_views,
    noisy_sgd_,
)
from dpsgd.kernels.conv_weight_grad import (
    conv_weight_grad,
    conv_weight_grad_moments,
    conv_weight_grad_moments_reference,
    conv_weight_grad_reference,
    conv_weight_grad_sum,
    conv_weight_grad_sum_reference,
)
from dpsgd.kernels.gaussian_noise import philox_4x32
from dpsgd.kernels.make_views import make_views_reference
from dpsgd.kernels.weight_standardization import (
    Standardization,
    standardize,
    unstandardize_,
    unstandardized_norms,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from kernel_work import Case, Result, Work, nbytes, wide
from layer_cases import biased, block_end, norm

KEY = 0x9D39247E33776D41
PADDING = 4


def gaussian_noise(work: Work) -> Case:
    """Noise on one tensor as long as all parameters."""
    total = torch.cat([leaf.flatten() for leaf in work.parameters()])

    def run() -> Result:
        add_gaussian_noise_(total, std=1.0, key=KEY, leaf=0)
        return (total,)

    return Case(
        run, lambda: (total.double() + exact_noise(total, 0),), 2 * total.nbytes
    )


def exact_noise(like: Tensor, leaf: int) -> Tensor:
    """Returns float64 normals of the same uniforms."""
    quad = torch.arange(-(-like.numel() // 4), device=like.device)
    words = philox_4x32(quad, leaf=leaf, key=KEY)
    first, second, third, fourth = ((word.double() + 0.5) / 2**32 for word in words)
    found = []
    for radius, angle in ((first, second), (third, fourth)):
        polar = torch.polar((-2 * radius.log()).sqrt(), 2 * torch.pi * angle)
        found += [polar.real, polar.imag]
    return torch.stack(found, dim=1).flatten()[: like.numel()].view(like.shape)


def noisy_sgd(work: Work) -> Case:
    """Noise, SGD with momentum, and average over all leaves."""
    params, sums, momenta, averages = (work.parameters() for _ in range(4))
    numbers = SGDStep(
        noise_std=1.0,
        noise_key=KEY,
        divisor=64.0,
        learning_rate=0.5,
        momentum=0.9,
        ema_weight=0.1,
    )

    def run() -> Result:
        noisy_sgd_(params, sums, step=numbers, momenta=momenta, averages=averages)
        return (*params, *averages)

    def exact() -> Result:
        new_params, new_averages = [], []
        for leaf, group in enumerate(zip(params, sums, momenta, averages, strict=True)):
            param, total, momentum, average = wide(*group)
            grad = (total + exact_noise(total, leaf)) / 64 + 0.9 * momentum
            new_params.append(param - 0.5 * grad)
            new_averages.append(0.9 * average + 0.1 * new_params[-1])
        return (*new_params, *new_averages)

    return Case(run, exact, 8 * nbytes(*params))


def views(work: Work) -> Case:
    """Views of a microbatch of images with three channels."""
    shape = (work.examples, 3, work.side, work.side)
    images = torch.randint(256, shape, device=work.device, dtype=torch.uint8)
    places = (work.examples, work.views)
    how = {
        "offsets": torch.randint(2 * PADDING + 1, (*places, 2), device=work.device),
        "flips": torch.rand(places, device=work.device) < 0.5,
    }
    levels = work.normals(3, 256)
    made = images.numel() * work.views * work.dtype.itemsize
    return Case(
        lambda: (make_views(images, levels.to(work.dtype), padding=PADDING, **how),),
        lambda: (
            make_views_reference(images, levels.double(), padding=PADDING, **how),
        ),
        images.nbytes + made,
    )


def clipping(work: Work) -> Case:
    """The clipped sum of the per-sample gradients of all leaves."""
    totals = work.parameters()
    grads = [work.normals(work.examples, *leaf.shape) for leaf in totals]
    factors = torch.rand(work.examples, device=work.device)

    def run() -> Result:
        for total, rows in zip(totals, grads, strict=True):
            clip_accumulate_(total, rows, factors)
        return tuple(totals)

    def exact() -> Result:
        return tuple(
            total.double() + torch.einsum("m,m...->...", *wide(factors, rows))
            for total, rows in zip(totals, grads, strict=True)
        )

    return Case(run, exact, nbytes(*grads) + 2 * nbytes(*totals))


def standardization(work: Work, channels: int) -> tuple[Tensor, Standardization]:
    """Returns gradients of a 3x3 convolution, and how its weights are standardised."""
    weight = work.normals(channels, 3, 3, channels)
    _, how = standardize(
        weight, torch.ones(channels, device=work.device), torch.float32
    )
    # The gain undoes the factor, so that gradients stay of one size when repeated.
    how = how._replace(gain=1 / how.factor)
    return work.normals(work.examples, *weight.shape), how


def unstandardize(channels: int) -> Callable[[Work], Case]:
    """The Jacobian of weight standardisation, on the gradients of a 3x3 convolution."""

    def build(work: Work) -> Case:
        grads, how = standardization(work, channels)

        def exact() -> Result:
            rows = grads.double()
            return unstandardize_(rows, Standardization(*wide(*how))), rows

        return Case(
            lambda: (unstandardize_(grads, how), grads), exact, 2 * grads.nbytes
        )

    return build


def norms(channels: int) -> Callable[[Work], Case]:
    """Norms of the gradients of raw weights, which are not made."""

    def build(work: Work) -> Case:
        grads, how = standardization(work, channels)

        def run(rows: Tensor, *how: Tensor) -> Result:
            return (unstandardized_norms(rows, Standardization(*how)),)

        return Case(
            lambda: run(grads, *how), lambda: run(*wide(grads, *how)), grads.nbytes
        )

    return build


# What is done with a per-sample weight gradient: operator, reference, extra argument,
# whether the gradients are written.
KEPT = {
    "stored": (conv_weight_grad, conv_weight_grad_reference),
    "moments": (conv_weight_grad_moments, conv_weight_grad_moments_reference),
    "summed": (conv_weight_grad_sum, conv_weight_grad_sum_reference),
}


def weight_grad(
    in_channels: int,
    out_channels: int,
    shrunk: int,
    *,
    side: int = 3,
    stride: int = 1,
    kept: str = "stored",
) -> Callable[[Work], Case]:
    """Per-sample gradients of the weights of a convolution."""
    operator, reference = KEPT[kept]

    def build(work: Work) -> Case:
        geometry = ConvGeometry(side, stride, side // 2)
        weight = work.normals(out_channels, side, side, in_channels)
        inputs = [
            work.images(in_channels, shrunk),
            work.images(out_channels, shrunk * stride),
        ]
        if kept != "stored":
            factors = torch.rand(work.examples, device=work.device)
            inputs.append(weight if kept == "moments" else factors)
        num_bytes = nbytes(*inputs[:2])
        if kept == "stored":
            num_bytes += work.examples * weight.nbytes
        return Case(
            lambda: (operator(*inputs, geometry),),
            lambda: (reference(*wide(*inputs), geometry),),
            num_bytes,
            2 * inputs[1].numel() * weight[0].numel(),
        )

    return build


CASES: dict[str, Callable[[Work], Case]] = {
    "noise": gaussian_noise,
    "noise + SGD + average": noisy_sgd,
    "views": views,
    "clip and accumulate": clipping,
    "unstandardize, 64 channels": unstandardize(64),
    "unstandardize, 256 channels": unstandardize(256),
    "norms, 256 channels": norms(256),
    "weight gradient, 3 to 16 at 32": weight_grad(3, 16, 1),
    "weight gradient, 64 to 64 at 32": weight_grad(64, 64, 1),
    "weight gradient, 64 to 128, stride 2": weight_grad(64, 128, 1, stride=2),
    "weight gradient, 64 to 128, 1x1, stride 2": weight_grad(
        64, 128, 1, side=1, stride=2
    ),
    "weight gradient, 128 to 128 at 16": weight_grad(128, 128, 2),
    "weight gradient, 256 to 256 at 8": weight_grad(256, 256, 4),
    "its moments, 64 to 64 at 32": weight_grad(64, 64, 1, kept="moments"),
    "its moments, 256 to 256 at 8": weight_grad(256, 256, 4, kept="moments"),
    "its sum, 64 to 64 at 32": weight_grad(64, 64, 1, kept="summed"),
    "its sum, 256 to 256 at 8": weight_grad(256, 256, 4, kept="summed"),
    "norm, 64 at 32": norm(64, 1),
    "norm, 128 at 16": norm(128, 2),
    "norm, 256 at 8": norm(256, 4),
    "norm of a sum, 64 at 32": norm(64, 1, adds=True),
    "norm backward, 64 at 32": norm(64, 1, backward=True),
    "norm backward, 128 at 16": norm(128, 2, backward=True),
    "norm backward, 256 at 8": norm(256, 4, backward=True),
    "norm of a sum backward, 64 at 32": norm(64, 1, adds=True, backward=True),
    "bias + ReLU, 64 at 32": biased(64, 1, "relu"),
    "bias + ReLU backward, 64 at 32": biased(64, 1, "relu", backward=True),
    "bias + GELU backward, 256 at 8": biased(256, 4, "gelu", backward=True),
    "end of a block, 64 at 32": block_end(64, 1),
    "end of a block backward, 64 at 32": block_end(64, 1, backward=True),
}
