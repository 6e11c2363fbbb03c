"""Blocks without normalisation: variances, gradients, stochastic depth."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd import kernels
from dpsgd.clipping import clipped_grad, norm_rules
from dpsgd.models import check_model, initialize, per_example_loss, trainable_params
from dpsgd.models.nf_resnet import nf_resnet_design
from dpsgd.models.nfnet import nfnet_design
from dpsgd.models.norm_free import (
    GELU,
    RELU,
    NormFreeBlock,
    NormFreeNetwork,
    ScaledActivation,
    expected_variances,
)
from dpsgd.rng import RandomStreams
from dpsgd.trees import Params

# Small, with all that the large ones have: groups, strides, both kinds of shortcut.
DESIGNS = {
    "nf_resnet": replace(
        nf_resnet_design(50), depths=(2, 1), widths=(8, 16), stem=((4, 7, 2),)
    ),
    "nfnet": replace(
        nfnet_design("F0"),
        depths=(1, 2),
        widths=(8, 16),
        stem=((4, 3, 2), (6, 3, 1)),
        group_width=2,
        head_channels=12,
    ),
}
M, K, SIDE, CLASSES = 3, 2, 15, 5  # an odd side, where ways of padding differ


def network(name: str, *, seed: int = 0, **settings: Any) -> NormFreeNetwork:
    """A small network away from its first values, so that every gradient shows."""
    settings = {"skip_gain_init": 1.0, **settings}
    model = NormFreeNetwork(
        DESIGNS[name], in_channels=3, num_classes=CLASSES, **settings
    )
    initialize(model, RandomStreams.from_seed(seed).generator("init"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf += 0.1 * torch.randn(leaf.shape, generator=generator)
    return model


def batch() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    views = torch.randn(M, K, 3, SIDE, SIDE, generator=generator)
    return views, torch.randint(CLASSES, (M,), generator=generator)


# (M, K, blocks): at RATE the blocks are left out below 0, 0.3 and 0.6.
RATE = 0.9
UNIFORMS = torch.tensor(
    [
        [[0.0, 0.5, 0.5], [0.0, 0.1, 0.7]],
        [[0.9, 0.9, 0.9], [0.1, 0.1, 0.1]],
        [[0.5, 0.4, 0.9], [0.5, 0.29, 0.61]],
    ]
)


def by_the_recipe(
    name: str, params: Params, x: Tensor, *, uniforms: Tensor, rate: float
) -> Tensor:
    """The networks written out with torch's functions, no constant folded."""
    design = DESIGNS[name]

    def activation(x: Tensor) -> Tensor:
        if name == "nf_resnet":
            return 1.7139588594436646 * F.relu(x)
        return 1.7015043497085571 * F.gelu(x, approximate="tanh")

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = params[f"{name}.weight"].permute(0, 3, 1, 2)  # (O, I, KH, KW)
        variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        scale = (variance * weight[0].numel()).clamp(min=1e-4).rsqrt()
        weight = (weight - mean) * scale * params[f"{name}.gain"].view(-1, 1, 1, 1)
        groups, padding = x.shape[1] // weight.shape[1], weight.shape[-1] // 2
        return F.conv2d(x, weight, params[f"{name}.bias"], stride, padding, 1, groups)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])

    for index, (_, _, stride) in enumerate(design.stem):
        x = conv(f"stem.{index}", x if index == 0 else activation(x), stride)
    if name == "nf_resnet":
        x = F.max_pool2d(x, 3, 2, 1)
    variance, index, num_blocks = 1.0, 0, sum(design.depths)
    for stage, depth in enumerate(design.depths):
        for position in range(depth):
            block = f"stages.{stage}.{position}"
            stride = 2 if stage > 0 and position == 0 else 1
            out = activation(x) / variance**0.5
            shortcut = x
            if position == 0:
                shortcut, step = out, stride
                if name == "nfnet" and stride == 2:
                    pool = {"ceil_mode": True, "count_include_pad": False}
                    shortcut, step = F.avg_pool2d(out, 2, 2, **pool), 1
                shortcut = conv(f"{block}.projection", shortcut, step)
                variance = 1.0
            out = conv(f"{block}.branch.0", out)
            out = conv(f"{block}.branch.1", activation(out), stride)
            for later in range(2, design.num_spatial + 2):
                out = conv(f"{block}.branch.{later}", activation(out))
            if name == "nfnet":
                hidden = linear(f"{block}.squeeze_excite.reduce", out.mean((2, 3)))
                gate = torch.sigmoid(
                    linear(f"{block}.squeeze_excite.expand", F.relu(hidden))
                )
                out = 2 * gate[:, :, None, None] * out
            kept = uniforms[:, index] >= rate * index / num_blocks
            out = out * kept[:, None, None, None] * params[f"{block}.skip_gain.value"]
            x = out * 0.2 + shortcut
            variance, index = variance + 0.2**2, index + 1
    if name == "nfnet":
        x = conv("head_conv", x)
    return linear("classifier", activation(x).mean((2, 3)))


@pytest.fixture(params=list(DESIGNS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_network_is_the_recipe_written_out(name: str) -> None:
    settings = {"stochastic_depth": RATE, "compute_dtype": torch.float64}
    model = network(name, **settings).double()
    params, x = trainable_params(model), batch()[0].flatten(0, 1).double()
    uniforms = UNIFORMS.flatten(0, 1)
    dropped, plain = (
        by_the_recipe(name, params, x, uniforms=one, rate=RATE)
        for one in (uniforms, torch.ones_like(uniforms))
    )

    torch.testing.assert_close(model(x, uniforms), dropped, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x), plain, rtol=1e-10, atol=1e-10)
    differs = [not torch.allclose(*pair) for pair in zip(plain, dropped, strict=True)]
    assert differs == [True, True, False, True, False, True]


@pytest.mark.parametrize("threshold", [0, 10**9], ids=["stored", "measured"])
def test_both_engines_agree_with_the_loop_over_examples(
    name: str, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(norm_rules._POSITIONS_PER_BYTE, "cpu", threshold)
    settings = {"stochastic_depth": RATE, "compute_dtype": torch.float64}
    model = network(name, **settings).double()
    params = trainable_params(model)
    views, labels = batch()
    views = views.double()
    loss_fn, bound = per_example_loss(model), 0.5
    leaves = {leaf: one.requires_grad_() for leaf, one in params.items()}
    expected = {leaf: torch.zeros_like(one) for leaf, one in params.items()}
    norms = []
    for example in zip(views, labels, UNIFORMS, strict=True):
        loss = loss_fn(leaves, *example)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        norms.append(float(norm))
        for leaf, grad in zip(leaves, grads, strict=True):
            expected[leaf] += grad * min(1.0, bound / float(norm))
    params = {leaf: one.detach() for leaf, one in params.items()}

    assert all(one.abs().max() > 0 for one in expected.values())
    for engine in ("vmap", "ghost"):
        grad_fn = clipped_grad(loss_fn, clipping_norm=bound, engine=engine)
        found = grad_fn(params, views, labels, UNIFORMS)
        # Norms and factors are float32.
        torch.testing.assert_close(
            found.per_sample_norms, torch.tensor(norms), rtol=1e-6, atol=0
        )
        for leaf, one in expected.items():
            torch.testing.assert_close(
                found.clipped_sum[leaf].double(), one, rtol=1e-5, atol=1e-7
            )


def test_float32_engines_agree(name: str) -> None:
    model = network(name)
    params, loss_fn = trainable_params(model), per_example_loss(model)
    first, second = (
        clipped_grad(loss_fn, clipping_norm=0.5, engine=engine)(params, *batch())
        for engine in ("vmap", "ghost")
    )

    torch.testing.assert_close(first.losses, second.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        first.per_sample_norms, second.per_sample_norms, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_compute_type_is_that_of_activations_only(
    name: str, compute_dtype: torch.dtype
) -> None:
    model = network(name, compute_dtype=compute_dtype)
    seen = set()
    for block in (one for one in model.modules() if isinstance(one, NormFreeBlock)):
        block.register_forward_hook(
            lambda *args: seen.update(one.dtype for one in args[-1])
        )
    x = batch()[0][0]
    logits = model(x)

    assert seen == {compute_dtype}
    assert logits.dtype == torch.float32
    # A dozen layers of 8-bit rounding, on logits of size 1.
    torch.testing.assert_close(logits, network(name)(x), rtol=0, atol=0.05)


def test_an_image_does_not_influence_another(name: str) -> None:
    model, x = network(name), batch()[0][0]
    other = torch.stack([x[0], torch.full_like(x[1], torch.nan)])

    assert torch.equal(model(x)[0], model(other)[0])
    check_model(model, (3, SIDE, SIDE))


def test_parameters_begin_as_published(name: str) -> None:
    model = NormFreeNetwork(
        DESIGNS[name], in_channels=3, num_classes=1000, skip_gain_init=0.5
    )
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    params = trainable_params(model)

    for leaf, one in params.items():
        if leaf.endswith("bias"):
            assert not one.any(), leaf
        if leaf.endswith("gain"):
            assert (one == 1).all(), leaf
    gains = [one for leaf, one in params.items() if leaf.endswith("skip_gain.value")]
    assert [float(one) for one in gains] == [0.5] * sum(DESIGNS[name].depths)
    # 12,000 draws or more: their deviation is within 3 % of its own in four of it.
    weight = params["classifier.weight"]
    torch.testing.assert_close(float(weight.std()), 0.01, rtol=0.03, atol=0)
    assert weight.abs().max() > 0.025  # not truncated


def test_with_skip_gains_of_zero_a_network_is_its_shortcuts(name: str) -> None:
    model, x = network(name), batch()[0][0]
    for block in (one for one in model.modules() if isinstance(one, NormFreeBlock)):
        block.skip_gain.value.data.zero_()
    before = model(x)
    for block in (one for one in model.modules() if isinstance(one, NormFreeBlock)):
        block.branch[0].weight.data.normal_()

    assert torch.equal(model(x), before)


@pytest.mark.parametrize("activation", [RELU, GELU], ids=["relu", "gelu"])
def test_scaled_activations_give_unit_normals_unit_variance(
    activation: ScaledActivation,
) -> None:
    x = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    density /= density.sum()
    y = activation.constant * kernels.activation(x, activation.kind)
    mean = (density * y).sum()

    # The published constants are of 2e5 random draws.
    variance = float((density * (y - mean).square()).sum())
    torch.testing.assert_close(variance, 1.0, rtol=0.01, atol=0)


def test_variances_are_reset_by_every_stage_and_visible() -> None:
    model = network("nf_resnet")
    blocks = [one for one in model.modules() if isinstance(one, NormFreeBlock)]

    assert [block.alpha for block in blocks] == [0.2] * 3
    found = [block.expected_variance for block in blocks]
    assert found == pytest.approx([1.04, 1.08, 1.04])
    assert [block.beta**-2 for block in blocks] == pytest.approx([1.0, 1.04, 1.08])
    assert expected_variances((2, 1), alpha=0.2) == (
        pytest.approx((1.04, 1.08)),
        pytest.approx((1.04,)),
    )


def variances(model: NormFreeNetwork, x: Tensor) -> list[tuple[float, float]]:
    """Predicted and found variance of each block's output, mean over channels."""
    found: list[tuple[float, float]] = []
    for block in (one for one in model.modules() if isinstance(one, NormFreeBlock)):
        block.register_forward_hook(
            lambda block, _, y: found.append(
                (block.expected_variance, float(y[0].var((0, 2, 3)).mean()))
            )
        )
    with torch.no_grad():
        model(x)
    return found


def test_variance_is_the_predicted_one_through_an_nf_resnet_50() -> None:
    model = NormFreeNetwork(
        nf_resnet_design(50), in_channels=3, num_classes=10, skip_gain_init=1.0
    )
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    generator = torch.Generator().manual_seed(0)
    # Zeros around images take variance away; below 128 pixels a fifth of it at the end.
    found = variances(model, torch.randn(2, 3, 128, 128, generator=generator))

    assert len(found) == 16
    for predicted, variance in found:
        assert variance == pytest.approx(predicted, rel=0.2)


def test_each_block_of_an_nfnet_keeps_the_predicted_variance() -> None:
    design = replace(
        nfnet_design("F0"), widths=(64, 64, 128, 128), group_width=16, head_channels=8
    )
    model = NormFreeNetwork(design, in_channels=3, num_classes=10, skip_gain_init=1.0)
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    generator = torch.Generator().manual_seed(0)
    for block in (one for one in model.modules() if isinstance(one, NormFreeBlock)):
        channels = block.branch[0].weight.shape[-1]
        x = torch.randn(4, channels, 8, 8, generator=generator) / block.beta
        # Pixels equal in fours, which the average pooling of shortcuts preserves.
        x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        with torch.no_grad():
            y, _ = block(x, kernels.activation(x, "gelu"), None)
            variance = float(y.var((0, 2, 3)).mean())

        assert variance == pytest.approx(block.expected_variance, rel=0.2)
