"""The second engine gives what the first one gives, however a layer's norm is taken."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.clipping import clipped_grad, norm_rules
from dpsgd.clipping.base import ClippedGrads
from dpsgd.kernels.geometry import ConvGeometry
from dpsgd.kernels.tape import ConvRecord, LinearRecord
from dpsgd.kernels.weight_standardization import standardize_reference
from dpsgd.models import per_example_loss, trainable_params
from dpsgd.models.layers import Conv2d, Linear, Relu
from dpsgd.trees import Params

M, K, SHAPE = 5, 2, (3, 8, 8)
Network = Callable[..., nn.Module]
Loss = Callable[..., Tensor]
STORES, MEASURES = 0, 10**9


def batch(seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(M, K, *SHAPE, generator=generator)
    return views, torch.randint(3, (M,), generator=generator)


def moved(model: nn.Module, dtype: torch.dtype = torch.float32) -> Params:
    """Parameters away from where they start, so that no gradient is zero by design."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (leaf + 0.1 * torch.randn(leaf.shape, generator=generator)).to(dtype)
        for name, leaf in trainable_params(model).items()
    }


def both(
    loss_fn: Loss, params: Params, *data: Tensor, **bound: float
) -> list[ClippedGrads]:
    return [
        clipped_grad(loss_fn, clipping_norm=bound.get("bound", 1.0), engine=engine)(
            params, *data
        )
        for engine in ("vmap", "ghost")
    ]


def assert_same(first: ClippedGrads, second: ClippedGrads, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(
        first.per_sample_norms, second.per_sample_norms, rtol=rtol, atol=0
    )
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-5, atol=1e-6)
    size = max(float(leaf.abs().max()) for leaf in first.clipped_sum.values())
    for name, expected in first.clipped_sum.items():
        # A convolution's bias before a norm has almost no gradient: what is rounded
        # away of the other leaves is the measure.
        found = second.clipped_sum[name]
        torch.testing.assert_close(found, expected, rtol=10 * rtol, atol=rtol * size)


@pytest.mark.parametrize("threshold", [STORES, MEASURES], ids=["stored", "measured"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalization": "none"},
        {"order": "norm_activation"},
        {"weight_standardization": False},
    ],
    ids=lambda settings: "-".join(settings) or "paper",
)
def test_both_engines_agree_on_the_network(
    tiny_network: Network,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    threshold: int,
) -> None:
    monkeypatch.setitem(norm_rules._POSITIONS_PER_BYTE, "cpu", threshold)
    model = tiny_network(**settings)

    assert_same(*both(per_example_loss(model), moved(model), *batch()))


def test_float64_agrees_to_float64(tiny_network: Network) -> None:
    model = tiny_network(compute_dtype="float64").double()
    params = moved(model, torch.float64)
    views, labels = batch()
    loss_fn = per_example_loss(model)
    norms = []
    for engine in ("vmap", "ghost"):
        grad_fn = clipped_grad(loss_fn, clipping_norm=1e6, engine=engine)
        norms.append(grad_fn(params, views.double(), labels).per_sample_norms)

    # Norms are float32 in the end; a float32 sum of squares would be off by 1e-6.
    torch.testing.assert_close(*norms, rtol=2e-7, atol=0)


@pytest.mark.parametrize("threshold", [STORES, MEASURES], ids=["stored", "measured"])
def test_padding_and_examples_that_are_not_finite_add_nothing(
    tiny_network: Network, monkeypatch: pytest.MonkeyPatch, threshold: int
) -> None:
    monkeypatch.setitem(norm_rules._POSITIONS_PER_BYTE, "cpu", threshold)
    model = tiny_network()
    params, loss_fn = moved(model), per_example_loss(model)
    views, labels = batch()
    broken = views.clone()
    broken[1, 0, 0, 0, 0] = torch.inf
    broken[2] = torch.nan
    mask = torch.tensor([True, True, True, False, True])
    grad_fn = clipped_grad(loss_fn, clipping_norm=1.0, engine="ghost")
    grads = grad_fn(params, broken, labels, mask=mask)
    alone = grad_fn(params, views[[0, 4]], labels[[0, 4]])

    assert int(grads.num_nonfinite) == 2
    for name, expected in alone.clipped_sum.items():
        torch.testing.assert_close(
            grads.clipped_sum[name], expected, rtol=1e-4, atol=1e-6
        )


def test_the_sum_does_not_depend_on_the_microbatch(tiny_network: Network) -> None:
    model = tiny_network()
    params, loss_fn = moved(model), per_example_loss(model)
    whole, parts = (
        clipped_grad(loss_fn, clipping_norm=1.0, engine="ghost", microbatch_size=size)
        for size in (None, 2)
    )

    assert_same(whole(params, *batch()), parts(params, *batch()), rtol=1e-5)


class Twice(nn.Module):
    """A convolution and a classifier, each used twice, the second on more positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2d(3, 4, kernel_size=3)
        self.conv = Conv2d(4, 4, kernel_size=3, groups=2)
        self.activation = Relu()
        self.head = Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x))
        x = self.activation(self.conv(x))
        x = self.activation(self.conv(x))
        return self.head(self.head(x.mean((-2, -1))).relu())


def test_layers_used_twice_have_the_norm_of_their_sum() -> None:
    model = Twice()
    for layer in (model.stem, model.conv, model.head):
        for leaf in layer.parameters():
            nn.init.normal_(leaf, std=0.3)

    assert_same(*both(per_example_loss(model), trainable_params(model), *batch()))


def test_parameters_that_no_layer_records_are_expanded(tiny_network: Network) -> None:
    model = tiny_network()
    params = {**moved(model), "tone": torch.ones(3, 1, 1), "unused": torch.ones(2)}
    loss_fn = per_example_loss(model)

    def toned(params: Params, views: Tensor, label: Tensor) -> Tensor:
        rest = {name: leaf for name, leaf in params.items() if name in model_names}
        return loss_fn(rest, views * params["tone"], label)

    model_names = set(trainable_params(model))
    first, second = both(toned, params, *batch())

    assert_same(first, second)
    assert second.clipped_sum["tone"].abs().max() > 0
    assert not second.clipped_sum["unused"].any()


def test_a_scalar_that_no_layer_records_is_expanded(tiny_network: Network) -> None:
    model = tiny_network()
    params = {**moved(model), "tone": torch.tensor(1.5)}
    loss_fn = per_example_loss(model)

    def toned(params: Params, views: Tensor, label: Tensor) -> Tensor:
        rest = {name: leaf for name, leaf in params.items() if name != "tone"}
        return loss_fn(rest, views * params["tone"], label)

    first, second = both(toned, params, *batch())

    assert_same(first, second)
    assert second.clipped_sum["tone"].shape == ()


def test_a_parameter_used_beside_its_layer_is_refused_by_name(
    tiny_network: Network,
) -> None:
    model = tiny_network()
    loss_fn = per_example_loss(model)

    def decayed(params: Params, views: Tensor, label: Tensor) -> Tensor:
        penalty = params["stem.weight"].square().sum()
        return loss_fn(params, views, label) + penalty

    grad_fn = clipped_grad(decayed, clipping_norm=1.0, engine="ghost")
    with pytest.raises(ValueError, match=r"params=stem\.weight: .*engine=vmap"):
        grad_fn(moved(model), *batch())


def test_a_layer_whose_parameter_is_computed_is_refused(tiny_network: Network) -> None:
    model = tiny_network()
    loss_fn = per_example_loss(model)

    def scaled(params: Params, views: Tensor, label: Tensor) -> Tensor:
        computed = {**params, "stem.weight": params["stem.weight"] * 2}
        return loss_fn(computed, views, label)

    grad_fn = clipped_grad(scaled, clipping_norm=1.0, engine="ghost")
    with pytest.raises(ValueError, match="is computed from others; take"):
        grad_fn(moved(model), *batch())


@pytest.mark.parametrize("width", [1, M])
def test_a_layer_that_runs_once_for_all_examples_is_refused(
    tiny_network: Network, width: int
) -> None:
    model = tiny_network()
    loss_fn = per_example_loss(model)
    # As many public images as examples would divide evenly among them.
    public = torch.randn(width, *SHAPE)

    def guided(params: Params, views: Tensor, label: Tensor) -> Tensor:
        return loss_fn(params, views, label) + loss_fn(params, public, label * 0)

    grad_fn = clipped_grad(guided, clipping_norm=1.0, engine="ghost")
    with pytest.raises(ValueError, match=r"params=\S+: .*depend on the example"):
        grad_fn(moved(model), *batch())


def test_frozen_parameters_are_constants(tiny_network: Network) -> None:
    model = tiny_network()
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(name.startswith(("classifier", "head")))
    params = trainable_params(model)

    assert len(params) == 4
    assert_same(*both(per_example_loss(model), params, *batch()))


@pytest.mark.parametrize("kept", ["weight", "gain", "bias"])
def test_parts_of_a_layer_may_be_frozen(tiny_network: Network, kept: str) -> None:
    model = tiny_network()
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(name.endswith(kept))

    assert_same(*both(per_example_loss(model), moved(model), *batch()))


def test_it_is_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"runtime\.execution=compile: .*ghost"):
        clipped_grad(
            lambda params: params["w"].sum(),
            clipping_norm=1.0,
            engine="ghost",
            execution="compile",
        )


def aligned_with_unit_weights() -> ConvRecord:
    """One example whose gradient is almost a multiple of the unit weights."""
    layer = Conv2d(2, 3, kernel_size=1)
    rows = torch.tensor([[1.0, -1.0], [-0.5, 1.5], [2.0, 0.5]])
    layer.weight = nn.Parameter(rows[:, None, None])  # (O, 1, 1, I)
    nn.init.ones_(layer.gain)
    _, how = standardize_reference(
        layer.weight.detach(), layer.gain.detach(), torch.float32
    )
    x = how.unit[:1, 0, 0, :, None, None].clone()  # (1, I, 1, 1)
    return ConvRecord(
        layer.weight, x, torch.full((1, 3, 1, 1), 1e3), ConvGeometry(1), how
    )


def test_a_measured_norm_is_not_below_the_norm_of_what_is_added() -> None:
    record = aligned_with_unit_weights()
    measured, stored = (
        rule(record, 1).squared_norms()
        for rule in (norm_rules.MeasuredConv, norm_rules.StoredConv)
    )
    exact = sum(
        part.double().square().sum()
        for part in norm_rules.StoredConv(record, 1).stored()
    )

    # With one input pixel along u, 1 and u span the inputs: what is projected cancels.
    assert float(measured) >= float(exact) * (1 - 1e-6)
    assert float(stored) >= float(exact) * (1 - 1e-6)
    torch.testing.assert_close(float(measured), float(exact), rtol=1e-3, atol=0)


def test_a_ghost_norm_is_not_below_the_norm_of_what_is_added() -> None:
    x = torch.randn(1, 3)
    x = torch.cat([x, -x * (1 - 1e-4)])  # two views that cancel but for 1e-4
    record = LinearRecord(nn.Parameter(torch.zeros(2, 3)), x, torch.ones(2, 2))
    rule = norm_rules.GhostLinear(record, 1)
    (added,) = rule.clipped_sums(torch.ones(1))

    assert float(rule.squared_norms()) >= float(added.double().square().sum())


@pytest.mark.parametrize("exponent", [-24, -21, 0, 18])
def test_a_ghost_norm_is_right_where_gram_matrices_would_not_fit(exponent: int) -> None:
    x, grad_y = torch.randn(2, 4, 5) * 10.0**exponent, torch.randn(2, 4, 3)
    grad_y *= 10.0 ** -(exponent + 3)  # gradients of about 1e-3
    x[0, 1], grad_y[1, 2] = 0, 0
    record = LinearRecord(torch.zeros(3, 5), x.flatten(0, 1), grad_y.flatten(0, 1))
    found = norm_rules.GhostLinear(record, 2).squared_norms()

    expected = torch.einsum("mko,mki->moi", grad_y.double(), x.double())
    squares = expected.square().sum((1, 2))
    torch.testing.assert_close(found.double(), squares, rtol=1e-4, atol=0)
    assert (found.double() >= squares).all()


def test_stored_gradients_are_rounded_before_they_are_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 5, generator=generator).bfloat16()
    grad_y = torch.randn(4, 6, 5, 5, generator=generator).bfloat16()
    weight = nn.Parameter(torch.zeros(6, 3, 3, 3))
    rule = norm_rules.StoredConv(
        ConvRecord(weight, x, grad_y, ConvGeometry(3, 1, 1), None), 2
    )
    (added,) = rule.clipped_sums(torch.tensor([1.0, 0.0]))

    torch.testing.assert_close(
        float(rule.squared_norms()[0]),
        float(added.double().square().sum()),
        rtol=1e-5,
        atol=0,
    )


def test_an_ordinary_loss_without_our_layers_is_expanded_whole() -> None:
    def loss_fn(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, params, (x,)), y)

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    params = trainable_params(model)

    assert_same(*both(loss_fn, params, torch.randn(6, 4), torch.randn(6, 2), bound=0.1))


def test_sums_wider_than_the_parameters_are_refused(tiny_network: Network) -> None:
    model = tiny_network()
    params, (views, labels) = moved(model), batch()
    sums = {name: torch.zeros_like(leaf).double() for name, leaf in params.items()}
    mask = torch.ones(M, dtype=torch.bool)
    grad_fn = clipped_grad(per_example_loss(model), clipping_norm=1.0, engine="ghost")

    with pytest.raises(ValueError, match="float64: the ghost engine sums in"):
        grad_fn.accumulate(sums, params, views, labels, mask=mask)
