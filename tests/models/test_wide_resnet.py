"""The network is the paper's: its size, its order of layers, its types."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.config import ModelConfig
from dpsgd.errors import ConfigError
from dpsgd.models import (
    build_model,
    initialize,
    per_example_loss,
    trainable_params,
)
from dpsgd.models.layers import ActivationNorm, Addends, Conv2d, Linear
from dpsgd.rng import RandomStreams
from dpsgd.trees import num_elements

CIFAR = (3, 32, 32)
Network = Callable[..., nn.Module]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("depth", "width", "num_classes", "expected"),
    [
        (16, 4, 10, 2_753_818),
        (40, 4, 10, 8_961_306),
        (28, 10, 10, 36_500_378),
        (28, 10, 100, 36_558_068),
    ],
)
def test_number_of_parameters_is_the_papers(
    depth: int, width: int, num_classes: int, expected: int
) -> None:
    config = ModelConfig(depth=depth, width=width)
    with torch.device("meta"):
        model = build_model(config, image_shape=CIFAR, num_classes=num_classes)

    assert num_elements(dict(model.named_parameters())) == expected
    assert num_elements(trainable_params(model)) == expected


def by_the_recipe(params: dict[str, Tensor], x: Tensor, *, blocks: int) -> Tensor:
    """The Wide-ResNet written out with torch's functions."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = params[f"{name}.weight"].permute(0, 3, 1, 2)  # (O, I, KH, KW)
        variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        squared_norm = variance * weight[0].numel()
        gain = params[f"{name}.gain"].view(-1, 1, 1, 1)
        weight = (weight - mean) * gain * squared_norm.clamp(min=1e-4).rsqrt()
        bias = params[f"{name}.bias"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, bias, stride=stride, padding=padding)

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return F.group_norm(F.relu(x), 16, weight, bias, 1e-5)

    x = conv("stem", x)
    for stage, stage_stride in enumerate((1, 2, 2)):
        for index in range(blocks):
            block = f"stages.{stage}.{index}"
            stride = stage_stride if index == 0 else 1
            out = norm(f"{block}.residual.0", x)
            out = conv(f"{block}.residual.1", out, stride)
            out = norm(f"{block}.residual.2", out)
            out = conv(f"{block}.last", out)
            if index == 0:
                x = norm(f"{block}.shortcut.0", x)
                x = conv(f"{block}.shortcut.1", x, stride)
            x = x + out
    x = norm("head_activation", x).mean((2, 3))
    return F.linear(x, params["classifier.weight"], params["classifier.bias"])


@pytest.mark.parametrize(("depth", "blocks"), [(10, 1), (16, 2)])
def test_network_is_the_recipe_written_out(
    tiny_network: Network, depth: int, blocks: int
) -> None:
    model = tiny_network(depth=depth, width=2, compute_dtype="float64").double()
    params = trainable_params(model)
    for index, leaf in enumerate(params.values()):  # nothing stays at 0 or 1
        leaf += 0.3 * images(*leaf.shape, seed=index)
    x = images(2, 3, 8, 8).double()
    expected = by_the_recipe(params, x, blocks=blocks)

    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_layers_run_in_the_papers_order(tiny_network: Network) -> None:
    model = tiny_network(depth=16)
    for leaf in model.parameters():  # biases and gains that would show elsewhere
        leaf.data += 0.1 * torch.randn(leaf.shape)
    x = images(2, 3, 8, 8)
    y = model.stem(x).total()
    for stage in model.stages:
        for block in stage:
            norm, first, second_norm = block.residual
            beside = y
            if block.shortcut:
                own_norm, project = block.shortcut
                beside = project(own_norm(Addends(y))).total()
            y = block.last(second_norm(first(norm(Addends(y))))).total() + beside
    y = model.head_activation(Addends(y)).mean((-2, -1))

    torch.testing.assert_close(model(x), model.classifier(y), rtol=1e-4, atol=1e-5)


def test_only_the_first_block_of_each_stage_projects(tiny_network: Network) -> None:
    model = tiny_network(depth=22)

    for stage in model.stages:
        first, *others = stage
        assert isinstance(first.shortcut[1], Conv2d)
        assert first.shortcut[1].weight.shape[1:3] == (1, 1)
        assert len(others) == 2
        assert not any(block.shortcut for block in others)


def test_settings_replace_or_remove_layers(tiny_network: Network) -> None:
    plain = tiny_network(normalization="none", weight_standardization=False)
    swapped = tiny_network(order="norm_activation")

    norms = [one for one in plain.modules() if isinstance(one, ActivationNorm)]
    assert not norms
    assert not [name for name, _ in plain.named_parameters() if "gain" in name]
    assert not swapped.head_activation.activation_first


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 8, 8), (3, 32, 32)])
def test_network_takes_images_of_any_size(
    tiny_network: Network, shape: tuple[int, int, int]
) -> None:
    logits = tiny_network(shape)(images(2, *shape))

    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


def test_an_image_does_not_influence_another(tiny_network: Network) -> None:
    model, x = tiny_network(), images(3, 3, 8, 8)
    other = x.clone()
    other[1] = float("nan")

    assert torch.equal(model(x)[[0, 2]], model(other)[[0, 2]])


def dtype_of(output: Tensor | Addends) -> torch.dtype:
    return output.images.dtype if isinstance(output, Addends) else output.dtype


@pytest.mark.parametrize(
    ("compute_dtype", "logits"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.float32),
        ("float64", torch.float64),
    ],
)
def test_compute_type_is_that_of_activations_only(
    tiny_network: Network, compute_dtype: str, logits: torch.dtype
) -> None:
    model, seen = tiny_network(compute_dtype=compute_dtype), set()
    for layer in model.modules():
        if isinstance(layer, Conv2d | ActivationNorm):
            layer.register_forward_hook(lambda *args: seen.add(dtype_of(args[-1])))
    head = []
    model.classifier.register_forward_hook(lambda *args: head.append(args[1][0].dtype))
    result = model(images(2, 3, 8, 8))

    assert seen == {getattr(torch, compute_dtype)}
    assert head == [logits]  # the mean over positions is as wide as the classifier
    assert result.dtype == logits
    assert {leaf.dtype for leaf in model.parameters()} == {torch.float32}


def test_bfloat16_is_close_to_float32(tiny_network: Network) -> None:
    x = images(4, 3, 8, 8)
    wide, narrow = (
        tiny_network(compute_dtype=kind)(x) for kind in ("float32", "bfloat16")
    )

    # Ten layers of 8-bit rounding, on logits of size 1.
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0.1)
    assert not torch.equal(narrow, wide)


def test_initialisation_follows_from_the_generator_alone(tiny_network: Network) -> None:
    first = trainable_params(tiny_network())
    torch.manual_seed(1)
    again, other = (
        trainable_params(tiny_network()),
        trainable_params(tiny_network(seed=1)),
    )

    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    convolutions_and_classifier = 1 + 3 * 3 + 1
    assert len(changed) == convolutions_and_classifier


def test_every_layer_draws_other_values(tiny_network: Network) -> None:
    params = trainable_params(tiny_network())
    first = params["stages.0.0.residual.1.weight"]
    second = params["stages.0.0.last.weight"]

    assert first.shape == second.shape
    assert not torch.equal(first, second)


@pytest.mark.parametrize("depth", [1, 4, 9, 11, 18])
def test_another_depth_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.depth={depth}: must be 6n \+ 4"):
        build_model(ModelConfig(depth=depth), image_shape=CIFAR, num_classes=10)


@pytest.mark.parametrize("groups", [3, 5, 17, 32])
def test_groups_that_do_not_divide_the_channels_are_refused(groups: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.groups={groups}: must divide"):
        build_model(ModelConfig(groups=groups), image_shape=CIFAR, num_classes=10)


def test_groups_do_not_matter_without_normalisation(tiny_network: Network) -> None:
    assert (
        tiny_network(groups=5, normalization="none")(images(1, 3, 8, 8))
        .isfinite()
        .all()
    )


def test_both_faults_are_told_at_once() -> None:
    config = ModelConfig(depth=11, groups=3)
    with pytest.raises(ConfigError, match=r"model\.depth=11.*\nmodel\.groups=3"):
        build_model(config, image_shape=CIFAR, num_classes=10)


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"did you mean `wide_resnet`\?"):
        build_model(ModelConfig(name="wide_resnt"), image_shape=CIFAR, num_classes=10)
    with pytest.raises(ConfigError, match=r"unknown model; known are .*wide_resnet"):
        build_model(ModelConfig(name="zzz"), image_shape=CIFAR, num_classes=10)


def test_loss_of_an_example_is_the_mean_over_its_views(tiny_network: Network) -> None:
    model, views = tiny_network(), images(4, 3, 8, 8)
    loss_fn, params = per_example_loss(model), trainable_params(model)
    label = torch.tensor(1)
    each = torch.stack([loss_fn(params, view[None], label) for view in views])

    assert each.std() > 1e-3
    torch.testing.assert_close(loss_fn(params, views, label), each.mean())
    expected = F.cross_entropy(model(views[:1]), label[None])
    torch.testing.assert_close(each[0], expected)


def test_trainable_params_leave_out_what_is_frozen(tiny_network: Network) -> None:
    model = tiny_network()
    model.stem.requires_grad_(False)
    params = trainable_params(model)

    assert not [name for name in params if name.startswith("stem")]
    assert not any(leaf.requires_grad for leaf in params.values())


def test_classifier_of_another_type_of_network_can_be_drawn() -> None:
    model = nn.Sequential(nn.Flatten(), Linear(4, 2))
    initialize(model, RandomStreams.from_seed(0).generator("init"))

    assert model(torch.ones(3, 1, 2, 2)).shape == (3, 2)
