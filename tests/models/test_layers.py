"""Layers against written-out formulas, and the draws of their parameters."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from dpsgd.kernels.weight_standardization import standardize_reference
from dpsgd.models import initialize
from dpsgd.models.layers import (
    ActivationNorm,
    Addends,
    Conv2d,
    Linear,
    Relu,
    activate,
)
from dpsgd.rng import RandomStreams


def generator(seed: int = 0) -> np.random.Generator:
    return RandomStreams.from_seed(seed).generator("init")


def drawn(layer: nn.Module, seed: int = 0) -> nn.Module:
    initialize(layer, generator(seed))
    return layer


def random(*shape: int) -> torch.Tensor:
    values = np.random.default_rng(3).standard_normal(shape)
    return torch.from_numpy(values)


def standardize(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """What a layer convolves with: (O, KH, KW, I), like its parameter."""
    return standardize_reference(weight, gain, weight.dtype)[0]


def norm(num_channels: int, num_groups: int) -> ActivationNorm:
    """A norm before its activation, so that the formula can be seen."""
    return ActivationNorm(num_channels, num_groups=num_groups, activation_first=False)


def test_standardised_weight_is_the_formula() -> None:
    weight, gain = random(4, 3, 5, 5) + 0.3, random(4)
    result = standardize(weight, gain)

    for channel in range(4):
        entries = weight[channel].flatten().tolist()
        mean = math.fsum(entries) / 75
        variance = math.fsum((entry - mean) ** 2 for entry in entries) / 75
        expected = (weight[channel] - mean) * gain[channel] / math.sqrt(variance * 75)
        torch.testing.assert_close(result[channel], expected, rtol=1e-12, atol=1e-14)


def test_standardised_weight_has_mean_0_and_variance_gain_squared_over_fan_in() -> None:
    gain = torch.tensor([1.0, 2.0, 0.0, -3.0]).double()
    result = standardize(random(4, 8, 3, 3) * 5 + 2, gain)
    variance, mean = torch.var_mean(result, dim=(1, 2, 3), correction=0)

    torch.testing.assert_close(mean, torch.zeros(4).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(variance, gain**2 / 72, rtol=1e-12, atol=0)


def test_standardisation_clamps_a_tiny_variance() -> None:
    weight = 1e-4 * random(2, 3, 3, 3)
    result = standardize(weight, torch.ones(2).double())
    centred = weight - weight.mean((1, 2, 3), keepdim=True)

    # variance * fan_in is about 3e-7, below the clamp at 1e-4.
    torch.testing.assert_close(result, centred * 100, rtol=1e-12, atol=0)
    constant = standardize(torch.ones(2, 3, 3, 3), torch.ones(2))
    assert not constant.any()


def test_convolution_is_torchs_with_standardised_weights() -> None:
    layer = drawn(Conv2d(3, 4, kernel_size=3, stride=2)).double()
    with torch.no_grad():
        layer.gain.copy_(random(4))
        layer.bias.copy_(random(4))
    x = random(2, 3, 7, 7)
    weight = standardize(layer.weight, layer.gain).permute(0, 3, 1, 2)
    expected = nn.functional.conv2d(x, weight, layer.bias, stride=2, padding=1)

    torch.testing.assert_close(layer(x).total(), expected, rtol=1e-12, atol=1e-12)
    assert layer(x).total().shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "before", "after"),
    [(8, 3, 2, 0, 1), (7, 3, 2, 1, 1), (8, 3, 1, 1, 1), (8, 1, 2, 0, 0)],
)
def test_padding_is_that_of_jax_on_request(
    size: int, kernel_size: int, stride: int, before: int, after: int
) -> None:
    layer = Conv2d(
        *(2, 3), kernel_size=kernel_size, stride=stride, stride_padding="same"
    )
    drawn(layer)
    x = random(1, 2, size, size).float()
    pads = (before, after, before, after)
    kernel = standardize(layer.weight, layer.gain).permute(0, 3, 1, 2)
    expected = F.conv2d(F.pad(x, pads), kernel, layer.bias, stride=stride)

    assert expected.shape[-1] == math.ceil(size / stride)
    torch.testing.assert_close(layer(x).total(), expected)


def test_convolution_without_standardisation_has_no_gain() -> None:
    layer = drawn(Conv2d(3, 4, kernel_size=1, standardized=False)).double()
    x = random(2, 3, 5, 5)

    assert layer.gain is None
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    weight = layer.weight.permute(0, 3, 1, 2)
    expected = nn.functional.conv2d(x, weight, layer.bias)
    torch.testing.assert_close(layer(x).total(), expected, rtol=1e-12, atol=1e-12)


def test_groups_of_channels_see_their_own_inputs_only() -> None:
    layer = drawn(Conv2d(4, 6, kernel_size=3, groups=2)).double()
    x = random(2, 4, 5, 5)
    weight = standardize(layer.weight, layer.gain).permute(0, 3, 1, 2)
    expected = nn.functional.conv2d(x, weight, layer.bias, padding=1, groups=2)

    assert layer.weight.shape == (6, 3, 3, 2)
    torch.testing.assert_close(layer(x).total(), expected, rtol=1e-12, atol=1e-12)


def test_group_norm_is_the_formula() -> None:
    layer = drawn(norm(6, 3)).double()
    with torch.no_grad():
        layer.weight.copy_(random(6))
        layer.bias.copy_(random(6) + 1)
    x = random(2, 6, 4, 4)
    grouped = x.view(2, 3, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    unit = ((grouped - mean) / (variance + 1e-5).sqrt()).view(x.shape)
    expected = unit * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    result = layer(Addends(x))
    torch.testing.assert_close(result, expected.relu(), rtol=1e-10, atol=1e-10)


def test_activation_comes_first_in_the_papers_order() -> None:
    layer = drawn(ActivationNorm(6, num_groups=3, activation_first=True)).double()
    x = random(2, 6, 4, 4)
    expected = nn.functional.group_norm(x.relu(), 3, eps=1e-5)

    result = layer(Addends(x))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    assert (result < 0).any()


def addends(num_channels: int) -> Addends:
    biases = (random(num_channels), random(num_channels) - 1)
    images = random(2, num_channels, 4, 4)
    return Addends(images, biases, images.flip(0) * 0.5)


def test_a_sum_is_that_of_its_addends() -> None:
    x = addends(3)
    biases = sum(bias.view(-1, 1, 1) for bias in x.biases)

    torch.testing.assert_close(x.total(), x.images + biases + x.residual)
    first = Addends(x.images, x.biases[:1])
    together = first.plus(Addends(x.residual, x.biases[1:]))
    torch.testing.assert_close(together.total(), x.total())


@pytest.mark.parametrize("keeps_sum", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("activation_first", [True, False, None])
def test_activations_of_one_sum_are_those_of_each(
    activation_first: bool | None, has_residual: bool, keeps_sum: bool
) -> None:
    x = addends(6) if has_residual else addends(6)._replace(residual=None)
    layers = [Relu(), Relu()]
    if activation_first is not None:
        layers = [
            ActivationNorm(6, num_groups=groups, activation_first=activation_first)
            for groups in (3, 3)
        ]
        for index, layer in enumerate(layers):
            nn.init.constant_(layer.weight, index + 2.0)
            nn.init.constant_(layer.bias, index - 1.0)
    outputs, total = activate(x, *layers, keeps_sum=keeps_sum)

    for layer, output in zip(layers, outputs, strict=True):
        torch.testing.assert_close(output, layer(Addends(x.total())))
    torch.testing.assert_close(total.total(), x.total())
    if keeps_sum:
        assert total.residual is None
        assert not total.biases


def test_group_norm_takes_its_statistics_in_float32() -> None:
    layer = drawn(norm(2, 1))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.003, 0.997]))  # not bfloat16 numbers
        layer.bias.copy_(torch.tensor([0.5009, -0.2503]))
    x = (random(1, 2, 64, 64) + 100).to(torch.bfloat16)
    result = layer(Addends(x))

    assert result.dtype == torch.bfloat16
    # Only input and output are rounded: not the parameters, nor anything between.
    assert torch.equal(result, layer(Addends(x.float())).to(torch.bfloat16))


def test_convolution_is_drawn_with_variance_one_over_fan_in() -> None:
    layer = drawn(Conv2d(64, 64, kernel_size=3))
    weight = layer.weight.detach().flatten().double().numpy()
    scaled = weight * math.sqrt(576)

    assert stats.kstest(scaled, "norm").pvalue > 1e-3
    assert stats.kstest(scaled * 1.05, "norm").pvalue < 1e-6
    assert (layer.gain == 1).all()
    assert not layer.bias.any()


def test_classifier_is_drawn_from_a_truncated_normal() -> None:
    layer = drawn(Linear(256, 500))
    scaled = layer.weight.detach().flatten().double().numpy() * math.sqrt(256)
    law = stats.truncnorm(-2, 2, scale=1 / 0.87962566)

    assert stats.kstest(scaled, law.cdf).pvalue > 1e-3
    assert stats.kstest(scaled * 1.03, law.cdf).pvalue < 1e-6
    assert abs(scaled.var() - 1) < 0.02
    assert abs(scaled).max() < 2 / 0.87962566 + 1e-5
    assert not layer.bias.any()


def test_group_norm_starts_as_the_identity() -> None:
    layer = drawn(norm(4, 2))

    assert (layer.weight == 1).all()
    assert not layer.bias.any()


def test_a_module_that_cannot_draw_its_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1=Conv2d: owns parameters and cannot draw"):
        initialize(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)), generator())
