import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels.conv_weight_grad import (
    conv_weight_grad_reference,
    conv_weight_grad_triton,
)

# (M, K, I, O, side of the image, side of the kernel, stride)
SHAPES = [
    (2, 3, 3, 16, 7, 3, 1),  # the stem: three channels, odd image
    (1, 2, 20, 33, 8, 3, 2),  # one example, channels that fill no tile
    (3, 1, 16, 8, 5, 1, 2),  # one view, a projection
    (2, 2, 72, 24, 6, 1, 1),  # more than one tile of channels
    (1, 1, 5, 5, 9, 3, 1),
]


def case(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, dict[str, int], Tensor, Tensor]:
    """Inputs, and both gradients by one float64 backward pass an example."""
    num_examples, num_views, in_channels, out_channels, size, side, stride = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(
        num_examples, num_views, in_channels, size, size, generator=generator
    ).to(dtype)
    weight = torch.randn(
        out_channels, in_channels, side, side, generator=generator
    ).double()
    bias = torch.zeros(out_channels, dtype=torch.float64)
    weights, biases = [], []
    grad_y = None
    for example in range(num_examples):
        weight.requires_grad_(), bias.requires_grad_()
        images = x[example].double()
        y = F.conv2d(images, weight, bias, stride=stride, padding=side // 2)
        if grad_y is None:
            grad_y = torch.randn(num_examples, *y.shape, generator=generator).to(dtype)
        grads = torch.autograd.grad(y, (weight, bias), grad_y[example].double())
        weights.append(grads[0].permute(0, 2, 3, 1))  # (O, KH, KW, I)
        biases.append(grads[1])
    options = {"kernel_size": side, "stride": stride, "padding": side // 2}
    assert grad_y is not None
    expected = torch.stack(weights), torch.stack(biases)
    return x.to(device), grad_y.to(device), options, *expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_gradient_of_each_example(shape: tuple[int, ...]) -> None:
    x, grad_y, options, weights, biases = case(shape, torch.device("cpu"))
    found = conv_weight_grad_reference(x, grad_y, **options)

    assert found[0].shape == weights.shape
    torch.testing.assert_close(found[0].double(), weights, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1].double(), biases, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_gradient_of_each_example(
    shape: tuple[int, ...], kernel_device: torch.device
) -> None:
    x, grad_y, options, weights, biases = case(shape, kernel_device)
    found = conv_weight_grad_triton(x, grad_y, **options)

    torch.testing.assert_close(found[0].cpu().double(), weights, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1].cpu().double(), biases, rtol=1e-5, atol=1e-4)


def test_the_kernel_takes_channels_last_images_without_a_copy(
    kernel_device: torch.device,
) -> None:
    x, grad_y, options, weights, _ = case(SHAPES[1], kernel_device)
    x, grad_y = (
        one.flatten(0, 1)
        .contiguous(memory_format=torch.channels_last)
        .unflatten(0, one.shape[:2])
        for one in (x, grad_y)
    )
    found = conv_weight_grad_triton(x, grad_y, **options)

    torch.testing.assert_close(found[0].cpu().double(), weights, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(4, 16, 64, 64, 32, 3, 1), (4, 16, 64, 128, 32, 3, 2), (4, 16, 3, 16, 32, 3, 1)],
    ids=str,
)
def test_bfloat16_products_are_summed_in_float32(shape: tuple[int, ...]) -> None:
    device = torch.device("cuda")
    x, grad_y, options, weights, biases = case(shape, device, torch.bfloat16)
    found = conv_weight_grad_triton(x, grad_y, **options)

    # Inputs are exact in float64, so what is left is the sum over positions, which the
    # matrix unit forms with slightly less than float32's 24 bits. In bfloat16 it would
    # be off by 4e-3.
    for one, expected in zip(found, (weights, biases), strict=True):
        error = (one.cpu().double() - expected).norm() / expected.norm()
        assert one.dtype == torch.float32
        assert error < 1e-4
