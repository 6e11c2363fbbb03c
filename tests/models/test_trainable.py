"""What is chosen is trained, and nothing else has a gradient."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.clipping import Engine, clipped_grad, measure_microbatch
from dpsgd.config import ModelConfig
from dpsgd.errors import ConfigError
from dpsgd.models import (
    CLASSIFIER,
    MODELS,
    build_model,
    check_model,
    freeze,
    frozen_tensors,
    per_example_loss,
    trainable_params,
)

Network = Callable[..., nn.Module]
CLASSIFIER_NAMES = {"classifier.weight", "classifier.bias"}


def chosen(model: nn.Module, train: str) -> set[str]:
    freeze(model, train)
    return set(trainable_params(model))


def test_what_is_named_is_trained_and_the_rest_is_frozen(tiny_network: Network) -> None:
    model = tiny_network()
    everything = {name for name, _ in model.named_parameters()}

    assert chosen(model, "all") == everything
    assert chosen(model, "classifier") == CLASSIFIER_NAMES
    norms = {"head_activation.weight", "head_activation.bias"}
    norms |= {name for name in everything if "residual.0." in name}
    norms |= {name for name in everything if "residual.2." in name}
    norms |= {name for name in everything if "shortcut.0." in name}
    assert chosen(model, "norm_and_classifier") == norms | CLASSIFIER_NAMES
    last = {name for name in everything if name.startswith("stages.2.")}
    assert chosen(model, r"stages\.2\..*|classifier\..*") == last | CLASSIFIER_NAMES
    assert set(frozen_tensors(model)) == everything - last - CLASSIFIER_NAMES


@pytest.mark.parametrize(
    ("train", "rule"),
    [
        ("stages", "is the name of no parameter of WideResNet; names are like stem.w"),
        (r"layer4\..*", "is the name of no parameter"),
        (".*", "chooses all .* parameters; say all, or choose fewer"),
        ("stages.(", "is not a valid regular expression"),
    ],
)
def test_a_choice_of_nothing_or_of_everything_is_refused(
    tiny_network: Network, train: str, rule: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^finetune\.train=.*: {rule}"):
        freeze(tiny_network(), train)


def test_norms_are_not_chosen_where_there_are_none(tiny_network: Network) -> None:
    with pytest.raises(ConfigError, match="has no normalisation layers; take classif"):
        freeze(tiny_network(normalization="none"), "norm_and_classifier")


@pytest.mark.parametrize("name", MODELS)
def test_the_classifier_of_every_network_is_its_last_layer(name: str) -> None:
    settings = {
        "convnet": {"depth": 2},
        "wide_resnet": {"depth": 10},
        "nf_resnet": {"depth": 50, "normalization": "none"},
        "nfnet": {"variant": "F0", "normalization": "none"},
    }
    config = ModelConfig(name=name, **settings[name])
    seen = []
    with torch.device("meta"):
        model = build_model(config, image_shape=(1, 32, 32), num_classes=3)
        layer = model.get_submodule(CLASSIFIER)
        layer.register_forward_hook(lambda *args: seen.append(args[-1]))
        logits = model(torch.rand(2, 1, 32, 32))

    assert seen == [logits]


@pytest.mark.parametrize("engine", ["vmap", "ghost"])
@pytest.mark.parametrize(
    "train", ["classifier", r"stages\.2\..*", "norm_and_classifier"]
)
def test_frozen_parameters_have_no_part_in_gradient_and_norm(
    tiny_network: Network, train: str, engine: Engine
) -> None:
    model = tiny_network()
    views, labels = torch.rand(4, 2, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    freeze(model, train)
    params = trainable_params(model)
    loss_fn = per_example_loss(model)
    grads = clipped_grad(loss_fn, clipping_norm=1e6, engine=engine)(
        params, views, labels
    )

    assert grads.clipped_sum.keys() == params.keys()
    for index, norm in enumerate(grads.per_sample_norms):
        loss = per_example_loss(model)
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        alone = torch.autograd.grad(
            loss(leaves, views[index], labels[index]), list(leaves.values())
        )
        expected = torch.cat([leaf.flatten() for leaf in alone]).norm()
        # The ghost engine adds a bound on its rounding.
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)


def test_frozen_parameters_take_memory_but_no_gradients() -> None:
    def memory(train: str) -> tuple[int, int]:
        with torch.device("meta"):
            config = ModelConfig(depth=10, width=4)
            model = build_model(config, image_shape=(3, 8, 8), num_classes=10)
        freeze(model, train)
        found = measure_microbatch(
            model, image_shape=(3, 8, 8), num_views=1, engine="ghost"
        )
        return found.fixed, found.per_example

    (fixed, per_example), (less_fixed, less) = memory("all"), memory("classifier")
    gradient = fixed // 5
    assert gradient < less_fixed < 1.1 * gradient
    assert per_example - less == pytest.approx(gradient, rel=0.01)


class Normalised(nn.Module):
    """A convolution, batch normalisation and dropout, then the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.relu(self.norm(self.conv(x))))
        return self.classifier(x.flatten(1))  # type: ignore[no-any-return]


def test_batch_norm_in_evaluation_mode_treats_each_example_alone() -> None:
    torch.manual_seed(0)
    model = Normalised()
    model(4 * torch.rand(32, 3, 8, 8))  # public statistics
    check_model(model.eval(), (3, 8, 8))
    freeze(model, "norm_and_classifier")
    params, before = trainable_params(model), copy.deepcopy(model.state_dict())
    assert params.keys() == {"norm.weight", "norm.bias", *CLASSIFIER_NAMES}
    views, labels = torch.rand(3, 2, 3, 8, 8), torch.tensor([0, 1, 2])
    engine = clipped_grad(per_example_loss(model), clipping_norm=1.0)
    together = engine(params, views, labels).clipped_sum
    apart = [engine(params, views[i : i + 1], labels[i : i + 1]) for i in range(3)]

    for name, total in together.items():
        torch.testing.assert_close(total, sum(one.clipped_sum[name] for one in apart))
    for name, leaf in model.state_dict().items():
        assert torch.equal(leaf, before[name]), name


@pytest.mark.parametrize("mode", ["training", "without statistics"])
def test_batch_norm_that_looks_at_the_batch_is_refused(mode: str) -> None:
    model = Normalised().eval()
    if mode == "training":
        model.norm.train()
    else:
        model.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()

    with pytest.raises(ConfigError, match=r"^norm=BatchNorm2d: normalises with .*eval"):
        check_model(model, (3, 8, 8))


def test_batch_norm_that_is_trained_again_is_refused_where_it_hides() -> None:
    """The one module is told, although its parent is in evaluation mode."""

    class Waking(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            self.norm.train()
            return super().forward(x)

    with pytest.raises(ConfigError, match="is written by a forward pass"):
        check_model(Waking().eval(), (3, 8, 8))


def test_parameters_that_are_not_given_are_the_networks_own(
    tiny_network: Network,
) -> None:
    model = tiny_network()
    images = torch.rand(2, 3, 8, 8)
    freeze(model, "classifier")
    params = {name: 2 * leaf for name, leaf in trainable_params(model).items()}

    torch.testing.assert_close(
        functional_call(model, params, (images,)), 2 * model(images)
    )
