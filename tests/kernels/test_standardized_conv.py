import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.kernels import relu_group_norm, standardized_conv2d
from dpsgd.kernels.standardized_conv import (
    standardized_weight,
    unstandardize_reference,
    unstandardize_triton,
)

Params = dict[str, Tensor]
OPERATORS = ("conv_weight_grad", "relu_group_norm", "standardized_conv")


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sends tensors of the CPU to the kernels too, which are interpreted there."""

    def switch() -> None:
        for name in OPERATORS:
            module = importlib.import_module(f"dpsgd.kernels.{name}")
            monkeypatch.setattr(module, "runs_on_triton", lambda _: True)

    return switch


def parameters() -> Params:
    generator = torch.Generator().manual_seed(0)
    return {
        "stem": torch.randn(16, 3, 3, 3, generator=generator),
        "gain": torch.rand(16, generator=generator) + 0.5,
        "bias": 0.1 * torch.randn(16, generator=generator),
        "scale": torch.randn(16, generator=generator),
        "shift": torch.randn(16, generator=generator),
        # So small that the bound of the standardisation holds for it.
        "tiny": 1e-4 * torch.randn(8, 3, 3, 16, generator=generator),
        "tiny_gain": torch.ones(8),
        "plain": torch.randn(8, 1, 1, 16, generator=generator),
        "zero": torch.zeros(8),
    }


def loss(params: Params, images: Tensor, label: Tensor) -> Tensor:
    """A stem, a norm, and a block whose shortcut is added in the convolution."""
    p = params
    h = standardized_conv2d(
        images, p["stem"], p["gain"], p["bias"], stride=1, padding=1
    )
    h = relu_group_norm(h, p["scale"], p["shift"], num_groups=4, eps=1e-5)
    shortcut = standardized_conv2d(h, p["plain"], None, p["zero"], stride=2, padding=0)
    y = standardized_conv2d(
        h,
        p["tiny"],
        p["tiny_gain"],
        p["zero"],
        stride=2,
        padding=1,
        residual=shortcut,
    )
    return F.cross_entropy(y.mean((-2, -1)), label.expand(len(images)))


def test_per_sample_gradients_by_the_operators_equal_those_of_plain_torch(
    on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    params = {name: leaf.to(kernel_device) for name, leaf in parameters().items()}
    images = torch.randn(3, 2, 3, 6, 6, device=kernel_device)
    labels = torch.tensor([0, 5, 7], device=kernel_device)
    plain = {
        name: torch.stack(
            [grad(loss)(params, images[m], labels[m])[name] for m in range(3)]
        )
        for name in params
    }
    on_kernels()
    fast = vmap(grad(loss), (None, 0, 0))(params, images, labels)

    for name, expected in plain.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(fast[name], expected, rtol=1e-4, atol=1e-5 * scale)


def test_mapping_over_parameters_is_refused_by_name(
    on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    on_kernels()
    params = {name: leaf.to(kernel_device) for name, leaf in parameters().items()}
    many = {name: torch.stack([leaf, leaf]) for name, leaf in params.items()}
    images = torch.randn(2, 3, 6, 6, device=kernel_device)

    with pytest.raises(ValueError, match="not over parameters"):
        vmap(loss, (0, None, None))(many, images, torch.tensor(0, device=kernel_device))


def test_standardized_weights_have_zero_mean_and_unit_norm() -> None:
    unit, factor, follows = standardized_weight(parameters()["stem"].double())

    torch.testing.assert_close(unit.mean((1, 2, 3)), torch.zeros(16).double())
    torch.testing.assert_close(unit.square().sum((1, 2, 3)), torch.ones(16).double())
    assert bool((factor > 0).all())
    assert bool((follows == 1).all())
    assert not standardized_weight(parameters()["tiny"])[2].any()


@pytest.mark.parametrize("run", [unstandardize_reference, unstandardize_triton])
@pytest.mark.parametrize("name", ["stem", "tiny"])
def test_the_jacobian_of_the_standardisation_is_that_of_autograd(
    run: Callable[..., Tensor], name: str, kernel_device: torch.device
) -> None:
    weight = parameters()[name].double()
    gain = (torch.arange(len(weight)) + 1.0).double()
    grads = torch.randn(2, *weight.shape).double()
    expected: list[tuple[Tensor, ...]] = []
    for one in grads:
        leaves = [weight.clone().requires_grad_(), gain.clone().requires_grad_()]
        effective = standardized_weight(leaves[0])[0] * leaves[1].view(-1, 1, 1, 1)
        expected.append(torch.autograd.grad(effective, leaves, one))
    unit, factor, follows = standardized_weight(weight)
    raw = grads.float().to(kernel_device)
    constants = [one.float().to(kernel_device) for one in (unit, factor, follows, gain)]
    gain_grads = run(raw, *constants)

    for found, index in ((raw, 0), (gain_grads, 1)):
        wanted = torch.stack([one[index] for one in expected])
        atol = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=atol)


def test_float64_stays_float64(on_kernels: Callable[[], None]) -> None:
    params = {name: leaf.double() for name, leaf in parameters().items()}
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = loss(params, images, torch.tensor(0))
    on_kernels()  # which compute in float32

    assert torch.equal(loss(params, images, torch.tensor(0)), expected)
