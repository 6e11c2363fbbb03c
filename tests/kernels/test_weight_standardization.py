"""Standardised weights by their definition, the Jacobian by autograd in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsgd.kernels import weight_standardization
from dpsgd.kernels import weight_standardization_triton as launching
from dpsgd.kernels.weight_standardization import (
    Standardization,
    standardize,
    standardize_reference,
    standardize_triton,
    unstandardize_,
    unstandardize_reference_,
    unstandardize_triton_,
    unstandardized_norms,
    unstandardized_norms_reference,
    unstandardized_norms_triton,
    unstandardized_squares,
    unstandardized_squares_reference,
    unstandardized_squares_triton,
)

# (O, KH, KW, I): a fan-in that fills its block, and others.
SHAPES = [(16, 3, 3, 3), (5, 1, 1, 16), (8, 3, 3, 20), (2, 7, 7, 3)]
EXAMPLES = [1, 3]
# Far above and far below the bound on the squared norm: at the bound rounding decides.
SCALES = [1.0, 1e-4]
RUNS = {
    "reference": (
        standardize_reference,
        unstandardize_reference_,
        unstandardized_norms_reference,
        unstandardized_squares_reference,
    ),
    "triton": (
        standardize_triton,
        unstandardize_triton_,
        unstandardized_norms_triton,
        unstandardized_squares_triton,
    ),
}


@pytest.fixture(params=list(RUNS))
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def parameters(
    shape: tuple[int, ...], scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Float32 weights that are not centred, with a gain for each row."""
    weight = (scale * (draw(*shape) + 0.3)).float()
    return weight.to(device), (draw(len(weight)).float() + 0.5).to(device)


def by_definition(weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Effective weights and whether the bound is exceeded, in the type of `weight`."""
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    squared_norm = centred.square().sum((1, 2, 3), keepdim=True)
    unit = centred / squared_norm.clamp(min=1e-4).sqrt()
    return unit * gain.view(-1, 1, 1, 1), squared_norm.flatten() >= 1e-4


def by_autograd(weight: Tensor, gain: Tensor, grads: Tensor) -> list[Tensor]:
    """Gradients of raw weights and gain, one backward pass an example."""
    leaves = [one.double().cpu().requires_grad_() for one in (weight, gain)]
    effective, _ = by_definition(*leaves)
    pairs = [
        torch.autograd.grad(effective, leaves, grad, retain_graph=True)
        for grad in grads.double().cpu()
    ]
    return [torch.stack(one) for one in zip(*pairs, strict=True)]


def squared_norms(raw: Tensor, of_gain: Tensor) -> Tensor:
    """Squares (M,) of the norms over weights and gain together."""
    return raw.flatten(1).square().sum(1) + of_gain.square().sum(1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Compares float32 sums of up to 180 terms, some of which cancel, with float64."""
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_effective_weights_are_those_of_the_definition(
    shape: tuple[int, ...], scale: float, name: str, kernel_device: torch.device
) -> None:
    weight, gain = parameters(shape, scale, kernel_device)
    effective, how = RUNS[name][0](weight, gain, torch.float32)
    expected, follows = by_definition(weight.cpu().double(), gain.cpu().double())

    assert follows.tolist() == [scale == 1.0] * len(weight)
    assert_near(effective, expected)
    assert_near(how.unit * gain.view(-1, 1, 1, 1), expected)
    assert torch.equal(how.follows.cpu().bool(), follows)
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    assert_near(centred * how.factor.view(-1, 1, 1, 1), how.unit.cpu().double())
    assert how.gain is gain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_units_have_zero_mean_and_unit_norm(
    shape: tuple[int, ...], name: str, kernel_device: torch.device
) -> None:
    weight, gain = parameters(shape, 1.0, kernel_device)
    unit = RUNS[name][0](weight, gain, torch.float32)[1].unit.cpu()

    rows = len(weight)
    torch.testing.assert_close(unit.mean((1, 2, 3)), torch.zeros(rows))
    torch.testing.assert_close(unit.square().sum((1, 2, 3)), torch.ones(rows))


def test_effective_weights_take_the_type_of_the_arithmetic(
    name: str, kernel_device: torch.device
) -> None:
    weight, gain = parameters(SHAPES[0], 1.0, kernel_device)
    wide, _ = RUNS[name][0](weight, gain, torch.float32)
    narrow, how = RUNS[name][0](weight, gain, torch.float16)

    assert torch.equal(narrow, wide.to(torch.float16))
    assert {one.dtype for one in how} == {torch.float32}


@pytest.mark.parametrize("num_examples", EXAMPLES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_jacobian_is_that_of_autograd(
    shape: tuple[int, ...],
    scale: float,
    num_examples: int,
    name: str,
    kernel_device: torch.device,
) -> None:
    weight, gain = parameters(shape, scale, kernel_device)
    _, how = RUNS[name][0](weight, gain, torch.float32)
    grads = draw(num_examples, *shape).float().to(kernel_device)
    raw_expected, gain_expected = by_autograd(weight, gain, grads)
    squares = squared_norms(raw_expected, gain_expected)

    before = grads.clone()
    assert_near(RUNS[name][2](grads, how), squares)
    assert torch.equal(grads, before)
    assert_near(RUNS[name][1](grads, how), gain_expected)
    assert_near(grads, raw_expected)


def moments_of(grads: Tensor, how: Standardization) -> Tensor:
    """Sums (3, M, O) over each row, as a kernel that stores no gradient leaves them."""
    parts = [grads.square(), grads, grads * how.unit]
    return torch.stack([part.flatten(2).sum(2) for part in parts])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_follow_from_moments(
    shape: tuple[int, ...], scale: float, name: str, kernel_device: torch.device
) -> None:
    weight, gain = parameters(shape, scale, kernel_device)
    _, how = RUNS[name][0](weight, gain, torch.float32)
    grads = draw(3, *shape).float().to(kernel_device)
    raw_expected, gain_expected = by_autograd(weight, gain, grads)
    squares = squared_norms(raw_expected, gain_expected)

    assert_near(RUNS[name][3](moments_of(grads, how), how), squares)


def test_norms_of_terms_that_cancel_are_not_too_small(
    name: str, kernel_device: torch.device
) -> None:
    # Gradients that are nearly constant: what the Jacobian leaves is their rounding.
    weight, gain = parameters(SHAPES[2], 1.0, kernel_device)
    _, how = RUNS[name][0](weight, gain, torch.float32)
    grads = (100 + 1e-3 * draw(3, *SHAPES[2])).float().to(kernel_device)
    raw_expected, gain_expected = by_autograd(weight, gain, grads)
    squares = squared_norms(raw_expected, gain_expected)

    found = RUNS[name][3](moments_of(grads, how), how).cpu()
    assert (found >= squares).all()
    if name == "triton":
        assert (RUNS[name][2](grads, how).cpu() >= squares).all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_moments_that_are_not_finite_give_such_a_norm(
    bad: float, name: str, kernel_device: torch.device
) -> None:
    weight, gain = parameters(SHAPES[0], 1.0, kernel_device)
    _, how = RUNS[name][0](weight, gain, torch.float32)
    moments = moments_of(draw(3, *SHAPES[0]).float().to(kernel_device), how)
    moments[0, 1, 0] = bad

    found = RUNS[name][3](moments, how)
    assert found.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("scale", SCALES)
def test_a_constant_multiplies_the_weights_and_all_that_follows_from_them(
    scale: float, name: str, kernel_device: torch.device
) -> None:
    constant, shape = 1.7, SHAPES[2]
    weight, gain = parameters(shape, scale, kernel_device)
    plain, _ = RUNS[name][0](weight, gain, torch.float32)
    effective, how = RUNS[name][0](weight, gain, torch.float32, scale=constant)
    grads = draw(2, *shape).float().to(kernel_device)
    # The loss sees constant * weights, so weights see the gradient times the constant.
    raw_expected, gain_expected = by_autograd(weight, gain, constant * grads)
    squares = squared_norms(raw_expected, gain_expected)

    assert_near(effective, constant * plain.cpu().double())
    assert_near(RUNS[name][3](moments_of(grads, how), how), squares)
    assert_near(RUNS[name][2](grads, how), squares)
    assert_near(RUNS[name][1](grads, how), gain_expected)
    assert_near(grads, raw_expected)


@pytest.mark.parametrize("elements", [64, 256])
def test_a_program_holds_some_of_the_examples(
    elements: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(launching, "_ELEMENTS", elements)
    monkeypatch.setattr(launching, "_TILE", elements)
    weight, gain = parameters(SHAPES[1], 1.0, kernel_device)
    _, how = standardize_reference(weight, gain, torch.float32)
    grads = draw(5, *SHAPES[1]).float().to(kernel_device)
    raw_expected, gain_expected = by_autograd(weight, gain, grads)
    squares = squared_norms(raw_expected, gain_expected)

    assert_near(unstandardized_norms_triton(grads, how), squares)
    assert_near(unstandardize_triton_(grads, how), gain_expected)
    assert_near(grads, raw_expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_narrow_gradients_are_those_of_what_is_stored(
    dtype: torch.dtype, name: str, kernel_device: torch.device
) -> None:
    weight, gain = parameters(SHAPES[2], 1.0, kernel_device)
    _, how = RUNS[name][0](weight, gain, torch.float32)
    grads = draw(3, *SHAPES[2]).to(kernel_device, dtype)
    found = RUNS[name][2](grads, how)
    wide = grads.float()
    along = unstandardize_reference_(wide, how)
    expected = wide.flatten(1).square().sum(1) + along.square().sum(1)

    assert found.dtype == torch.float32
    # 1500 squares summed in another order; a narrow sum would be off by 1e-3.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_example_never_reaches_another_and_its_norm_is_not_finite(
    bad: float, name: str, kernel_device: torch.device
) -> None:
    weight, gain = parameters(SHAPES[0], 1.0, kernel_device)
    _, how = RUNS[name][0](weight, gain, torch.float32)
    grads = draw(3, *SHAPES[0]).float().to(kernel_device)
    raw_expected, gain_expected = by_autograd(weight, gain, grads)
    grads[1, 0, 0, 0, 0] = bad
    with np.errstate(invalid="ignore"):  # inf - inf, of which the interpreter warns
        norms = RUNS[name][2](grads, how)
        gain_grads = RUNS[name][1](grads, how)

    assert norms.isfinite().tolist() == [True, False, True]
    assert_near(gain_grads[::2], gain_expected[::2])
    assert_near(grads[::2], raw_expected[::2])


def test_float64_stays_float64_where_kernels_run(
    on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    weight, gain = (one.double() for one in parameters(SHAPES[0], 1.0, kernel_device))
    grads = draw(2, *SHAPES[0]).to(kernel_device)
    raw_expected, gain_expected = by_autograd(weight, gain, grads)
    squares = squared_norms(raw_expected, gain_expected)
    on_kernels()
    effective, how = standardize(weight, gain, torch.float64)
    norms = unstandardized_norms(grads, how)
    measured = unstandardized_squares(moments_of(grads, how), how)
    gain_grads = unstandardize_(grads, how)

    expected = by_definition(weight.cpu(), gain.cpu())[0]
    for found, wanted in [
        (effective, expected),
        (norms, squares),
        (measured, squares),
        (gain_grads, gain_expected),
        (grads, raw_expected),
    ]:
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-11, atol=1e-12)


def test_float32_runs_the_kernels(
    on_kernels: Callable[[], None],
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_kernels()
    called = []
    for run in RUNS["triton"]:

        def record(
            *inputs: object, run: Callable[..., object] = run, **options: object
        ) -> object:
            called.append(run)
            return run(*inputs, **options)

        monkeypatch.setattr(weight_standardization, run.__name__, record)
    weight, gain = parameters(SHAPES[1], 1.0, kernel_device)
    _, how = standardize(weight, gain, torch.float32)
    assert isinstance(how, Standardization)
    grads = draw(2, *SHAPES[1]).float().to(kernel_device)
    unstandardized_norms(grads, how)
    unstandardized_squares(moments_of(grads, how), how)
    unstandardize_(grads, how)

    assert called == [
        standardize_triton,
        unstandardized_norms_triton,
        unstandardized_squares_triton,
        unstandardize_triton_,
    ]
