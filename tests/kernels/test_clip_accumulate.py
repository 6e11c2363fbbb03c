"""The fused sum against a loop in float64; Triton runs interpreted without a GPU."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpsgd.kernels.clip_accumulate import (
    clip_accumulate_,
    clip_accumulate_reference_,
    clip_accumulate_triton_,
)

Kernel = Callable[[Tensor, Tensor, Tensor], None]
SHAPES = [(1,), (7,), (255,), (256,), (257,), (3, 5, 3, 3), (16, 65), (0,)]
ROWS = [1, 2, 15, 16, 17, 33]


@pytest.fixture(params=["reference", "triton"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if request.param == "reference":
        return clip_accumulate_reference_
    pytest.importorskip("triton")
    return clip_accumulate_triton_


def case(
    rows: int, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + len(shape))
    total = torch.randn(shape, generator=generator)
    grads = torch.randn((rows, *shape), generator=generator)
    factors = torch.rand(rows, generator=generator)
    return total.to(device), grads.to(device), factors.to(device)


def looped(total: Tensor, grads: Tensor, factors: Tensor) -> Tensor:
    """The sum in float64, row by row, leaving out rows with factor 0."""
    result = total.double()
    for grad, factor in zip(grads, factors, strict=True):
        if factor > 0:
            result = result + factor.double() * grad.double()
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_sum_equals_the_loop(
    kernel: Kernel, kernel_device: torch.device, rows: int, shape: tuple[int, ...]
) -> None:
    total, grads, factors = case(rows, shape, kernel_device)
    factors[rows // 2] = 0.0
    expected = looped(total, grads, factors)
    kernel(total, grads, factors)

    # A float32 sum of n terms of size 1 is off by at most about n * 2^-24.
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=rows * 4e-7)


def test_a_float64_total_is_summed_in_float64(
    kernel: Kernel, kernel_device: torch.device
) -> None:
    total, grads, factors = case(33, (257,), kernel_device)
    factors[5] = 0.0
    grads[5] = math.nan
    wide = total.double()
    expected = looped(total, grads, factors)
    kernel(wide, grads, factors)
    kernel(total, grads, factors)

    # 34 terms of size 1, each off by at most 2^-53 of the sum so far.
    torch.testing.assert_close(wide, expected, rtol=0, atol=34 * 34 * 2**-53)
    assert (total.double() - expected).abs().max() > 1e-8  # float32 is seen to be off


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_factor_zero_never_reaches_the_sum(
    kernel: Kernel, kernel_device: torch.device, bad: float
) -> None:
    total, grads, factors = case(20, (300,), kernel_device)
    factors[[0, 7, 16, 19]] = 0.0
    expected = looped(total, grads, factors)
    grads[[0, 7, 16, 19]] = bad
    kernel(total, grads, factors)

    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-5)


def test_zero_factors_leave_the_total_bit_for_bit(
    kernel: Kernel, kernel_device: torch.device
) -> None:
    total, grads, factors = case(5, (11,), kernel_device)
    before = total.clone()
    kernel(total, grads, torch.zeros_like(factors))

    assert torch.equal(total, before)


def test_no_rows_leave_the_total(kernel: Kernel, kernel_device: torch.device) -> None:
    total, grads, factors = case(3, (4, 2), kernel_device)
    before = total.clone()
    kernel(total, grads[:0], factors[:0])

    assert torch.equal(total, before)


def test_bfloat16_rows_are_summed_in_float32(
    kernel: Kernel, kernel_device: torch.device
) -> None:
    # 512 ones and 1/512: a bfloat16 sum would stop at 256.
    grads = torch.ones(512, 3, dtype=torch.bfloat16, device=kernel_device)
    total = torch.full((3,), 1 / 512, device=kernel_device)
    kernel(total, grads, torch.ones(512, device=kernel_device))

    assert total.tolist() == [512 + 1 / 512] * 3


def test_nothing_outside_the_total_is_written(
    kernel: Kernel, kernel_device: torch.device
) -> None:
    memory = torch.full((300,), 7.0, device=kernel_device)
    total = memory[10:290]
    _, grads, factors = case(4, (280,), kernel_device)
    kernel(total, grads, factors)

    assert (memory[:10] == 7).all()
    assert (memory[290:] == 7).all()


def test_a_scalar_leaf_is_summed() -> None:
    total = torch.zeros(())
    clip_accumulate_(total, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))

    assert total.item() == 2.0


@pytest.mark.gpu
def test_the_public_function_uses_the_kernel_on_a_gpu() -> None:
    total, grads, factors = case(17, (1000,), torch.device("cuda"))
    expected = looped(total, grads, factors)
    clip_accumulate_(total, grads, factors)

    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-5)
