"""Networks whose examples mix, or leave traces, are refused by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dpsgd.errors import ConfigError
from dpsgd.models import check_model

SHAPE = (4, 8, 8)


class InPlaceAverage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.average.lerp_(x.mean((0, 2, 3)), 0.1)
        return x - self.average.view(-1, 1, 1)


class ReplacedAverage(InPlaceAverage):
    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.mean((0, 2, 3))
        return x - self.average.view(-1, 1, 1)


class ConstantBuffer(nn.Module):
    def __init__(self, value: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((4, 1, 1), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.BatchNorm2d(4), "statistics of other examples"),
        (nn.BatchNorm1d(4), "statistics of other examples"),
        (nn.BatchNorm2d(4, track_running_stats=False), "statistics of other examples"),
        (nn.SyncBatchNorm(4), "statistics of other examples"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "keeps running statistics"),
        (nn.Dropout(0.1), "random stream that is not the run's"),
        (nn.Dropout2d(0.1), "random stream that is not the run's"),
        (nn.AlphaDropout(0.1), "random stream that is not the run's"),
        (nn.LazyLinear(3), "no parameters before its first batch"),
        (nn.LazyConv2d(3, 1), "no parameters before its first batch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_module_is_refused_with_its_name(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(module))
    name = type(module).__name__

    with pytest.raises(ConfigError, match=f"^1.0={name}: .*{reason}.*; "):
        check_model(model, SHAPE)
    with pytest.raises(ConfigError, match=f"^model={name}: "):
        check_model(module, SHAPE)


@pytest.mark.parametrize(
    "module",
    [
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(SHAPE),
        nn.Conv2d(4, 4, 3),
        ConstantBuffer(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_that_treats_each_example_alone_is_accepted(module: nn.Module) -> None:
    check_model(nn.Sequential(module, nn.ReLU()), SHAPE)


def test_a_buffer_written_in_place_is_refused_and_stays() -> None:
    model = nn.Sequential(InPlaceAverage())

    with pytest.raises(
        ConfigError, match=r"^0\.average=tensor: is written by a forward"
    ):
        check_model(model, SHAPE)
    assert not model[0].average.any()


def test_a_buffer_that_is_replaced_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^0\.average=tensor: is written by a forward"
    ):
        check_model(nn.Sequential(ReplacedAverage()), SHAPE)


def test_a_constant_buffer_may_hold_nan() -> None:
    check_model(ConstantBuffer(float("nan")), SHAPE)


def test_all_faults_are_told_at_once() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())

    with pytest.raises(ConfigError, match=r"0=BatchNorm2d: .*\n2=Dropout: "):
        check_model(model, SHAPE)


def test_a_network_of_this_package_is_accepted(
    tiny_network: Callable[..., nn.Module],
) -> None:
    check_model(tiny_network(SHAPE), SHAPE)
    check_model(tiny_network(SHAPE, compute_dtype="bfloat16"), SHAPE)


class Attribute(nn.Module):
    """Keeps a running mean where no buffer is."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.zeros(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.mean((0, 2, 3), keepdim=True)[0]
        return x


class Centred(nn.Module):
    """Subtracts the mean over the images of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_running_statistic_in_a_plain_attribute_is_refused() -> None:
    model = nn.Sequential(Attribute(), nn.Flatten(), nn.Linear(48, 2))

    with pytest.raises(
        ConfigError, match=r"^0\.average=tensor: is written by a forward"
    ):
        check_model(model, (3, 4, 4))
    assert not model[0].average.any()


def test_a_module_that_mixes_images_is_refused() -> None:
    model = nn.Sequential(Centred(), nn.Flatten(), nn.Linear(48, 2))

    with pytest.raises(ConfigError, match="depends on the others of its batch"):
        check_model(model, (3, 4, 4))
