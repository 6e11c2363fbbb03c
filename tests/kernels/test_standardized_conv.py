"""Gradients through all operators against plain torch in float64, also under vmap."""

from collections.abc import Callable

import pytest
import torch
from small_network import (
    PLAIN,
    assert_near,
    expected_grads,
    images_and_labels,
    loss,
    parameters,
    plain_conv,
)
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.kernels import ConvGeometry, standardized_conv, standardized_conv2d

GEOMETRIES = [
    ConvGeometry(3, 1, 1),
    ConvGeometry(3, 2, 1),
    ConvGeometry(1, 2),
    ConvGeometry(1),
    ConvGeometry(3, 1, 1, 2),
    ConvGeometry(7, 2, 3, 4),
]


@pytest.fixture(params=["references", "kernels"])
def implementation(
    request: pytest.FixtureRequest, on_kernels: Callable[[], None]
) -> str:
    """Whether kernels run: on a GPU they always do."""
    if request.param == "kernels":
        on_kernels()
    return str(request.param)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def convolved(
    conv: Callable[..., Tensor], tensors: list[Tensor], geometry: ConvGeometry
) -> Tensor:
    x, weight, *gain = tensors
    return conv(x, weight, gain[0] if gain else None, geometry)


@pytest.mark.usefixtures("implementation")
def test_per_sample_gradients_by_the_operators_equal_those_of_plain_torch(
    kernel_device: torch.device,
) -> None:
    params = parameters(kernel_device)
    images, labels = images_and_labels(kernel_device)

    assert_near(
        vmap(grad(loss), (None, 0, 0))(params, images, labels),
        expected_grads(params, images, labels),
    )


@pytest.mark.usefixtures("implementation")
def test_gradients_of_one_example_equal_those_of_plain_torch(
    kernel_device: torch.device,
) -> None:
    params = parameters(kernel_device)
    images, labels = images_and_labels(kernel_device)
    expected = expected_grads(params, images[1:2], labels[1:2])

    assert_near(
        grad(loss)(params, images[1], labels[1]),
        {name: rows[0] for name, rows in expected.items()},
    )


@pytest.mark.usefixtures("implementation")
def test_examples_may_share_their_images(kernel_device: torch.device) -> None:
    params = parameters(kernel_device)
    images, labels = images_and_labels(kernel_device)

    assert_near(
        vmap(grad(loss), (None, None, 0))(params, images[0], labels),
        expected_grads(params, images[:1].expand(3, -1, -1, -1, -1), labels),
    )


@pytest.mark.usefixtures("implementation")
def test_examples_may_lie_along_any_axis(kernel_device: torch.device) -> None:
    params = parameters(kernel_device)
    images, labels = images_and_labels(kernel_device)

    assert_near(
        vmap(grad(loss), (None, 2, 0))(params, images.movedim(0, 2), labels),
        expected_grads(params, images, labels),
    )


@pytest.mark.usefixtures("implementation")
def test_frozen_parameters_change_no_other_gradient(
    kernel_device: torch.device,
) -> None:
    params = parameters(kernel_device)
    images, labels = images_and_labels(kernel_device)
    frozen = {
        name: params.pop(name)
        for name in ("stem", "tiny_gain", "scale", "shortcut_bias", "last_shift")
    }

    def loss_of_rest(rest: dict[str, Tensor], *example: Tensor) -> Tensor:
        return loss({**rest, **frozen}, *example)

    found = vmap(grad(loss_of_rest), (None, 0, 0))(params, images, labels)
    expected = expected_grads({**params, **frozen}, images, labels)

    assert_near(found, {name: expected[name] for name in params})


@pytest.mark.parametrize("has_gain", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.usefixtures("implementation")
def test_a_convolution_and_its_gradients_are_those_of_plain_torch(
    geometry: ConvGeometry, has_gain: bool, kernel_device: torch.device
) -> None:
    side, groups = geometry.kernel_size, geometry.groups
    x = draw(3, 8, 6, 8)
    leaves = [x, draw(12, side, side, 8 // groups), draw(12)][: 2 + has_gain]
    wide = [one.double().requires_grad_() for one in leaves]
    ours = [one.to(kernel_device).requires_grad_() for one in leaves]
    y = convolved(standardized_conv2d, ours, geometry)
    expected = convolved(plain_conv, wide, geometry)
    grad_y = torch.randn_like(y)
    names = ["x", "weight", "gain"][: len(leaves)]

    assert_near({"y": y}, {"y": expected.detach()})
    assert_near(
        dict(zip(names, torch.autograd.grad(y, ours, grad_y), strict=True)),
        dict(
            zip(
                names,
                torch.autograd.grad(expected, wide, grad_y.cpu().double()),
                strict=True,
            )
        ),
    )


@pytest.mark.usefixtures("implementation")
def test_a_constant_is_folded_into_the_weights(kernel_device: torch.device) -> None:
    geometry, constant = ConvGeometry(3, 2, 1), 1.7
    leaves = [draw(3, 8, 6, 8), draw(12, 3, 3, 8), draw(12)]
    wide = [one.double().requires_grad_() for one in leaves]
    ours = [one.to(kernel_device).requires_grad_() for one in leaves]
    x, weight, gain = ours
    y = standardized_conv2d(x, weight, gain, geometry, scale=constant)
    expected = constant * convolved(plain_conv, wide, geometry)
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, ours, grad_y)
    expected_grads = torch.autograd.grad(expected, wide, grad_y.cpu().double())

    assert_near({"y": y}, {"y": expected.detach()})
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert_near({"grad": found}, {"grad": wanted})


def test_frozen_weights_take_no_backward_pass_of_their_own(
    on_kernels: Callable[[], None],
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_kernels()
    monkeypatch.setattr(standardized_conv, "conv_weight_grad", None)  # not to be called
    x, weight, gain = (
        one.to(kernel_device) for one in (draw(2, 8, 4, 4), draw(4, 1, 1, 8), draw(4))
    )
    x.requires_grad_()
    standardized_conv2d(x, weight, gain, ConvGeometry(1)).sum().backward()

    assert x.grad is not None
    assert weight.grad is None
    assert gain.grad is None


def test_a_gain_may_be_trained_alone(
    on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    on_kernels()
    x, weight, gain = (draw(2, 8, 4, 4), draw(4, 1, 1, 8), draw(4))
    wide = gain.double().requires_grad_()
    plain_conv(x.double(), weight.double(), wide, ConvGeometry(1)).sum().backward()
    x, weight, gain = (one.to(kernel_device) for one in (x, weight, gain))
    gain.requires_grad_()
    standardized_conv2d(x, weight, gain, ConvGeometry(1)).sum().backward()

    assert weight.grad is None
    assert gain.grad is not None
    assert wide.grad is not None
    assert_near({"gain": gain.grad}, {"gain": wide.grad})


@pytest.mark.usefixtures("implementation")
def test_images_choose_the_type_of_the_arithmetic(kernel_device: torch.device) -> None:
    x, weight, gain = (
        one.to(kernel_device) for one in (draw(2, 8, 4, 4), draw(4, 3, 3, 8), draw(4))
    )
    geometry = ConvGeometry(3, 1, 1)
    narrow = standardized_conv2d(x.bfloat16(), weight, gain, geometry)
    wide = standardized_conv2d(x, weight, gain, geometry)

    assert narrow.dtype == torch.bfloat16
    # Images, weights and outputs are rounded to 8 bits, or cut off by the interpreter.
    error = (narrow.float() - wide).norm() / wide.norm()
    assert error < 2**-7


def test_mapping_over_parameters_is_refused_by_name(
    on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    on_kernels()
    images, labels = images_and_labels(kernel_device)
    params = parameters(kernel_device)
    many = {name: torch.stack([leaf, leaf]) for name, leaf in params.items()}

    with pytest.raises(ValueError, match="images, not over parameters"):
        vmap(loss, (0, None, None))(many, images[0], labels[0])


def test_float64_stays_float64_where_kernels_run(
    on_kernels: Callable[[], None],
) -> None:
    params = {
        name: leaf.double() for name, leaf in parameters(torch.device("cpu")).items()
    }
    images, labels = images_and_labels(torch.device("cpu"))
    images = images.double()
    on_kernels()  # which compute in float32
    found = loss(params, images[0], labels[0])

    # A few hundred roundings of 1e-16 each.
    expected = loss(params, images[0], labels[0], PLAIN)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
