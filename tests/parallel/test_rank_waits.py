"""How long a rank on a GPU waits for others: by a clock of ours, told without a GPU."""

from typing import Any

import pytest
import torch
from torch import nn

from dpsgd.errors import RankError
from dpsgd.parallel import Layout, Ranks

LIMIT = 25  # seconds, less than what torchrun leaves to a rank


class Device:
    """A clock that sleeping moves on, and events that come at their times."""

    def __init__(self, *times: float) -> None:
        self.now = 0.0
        self._times = iter(times)

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)

    def monotonic(self) -> float:
        return self.now

    def event(self) -> Any:
        time = next(self._times)
        return type("Event", (), {"query": lambda _: self.now >= time})()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a rank of two on a GPU that is not here, whose events come at `times`."""

    def on(*times: float) -> tuple[Ranks, Device]:
        device = Device(*times)
        monkeypatch.setattr("dpsgd.parallel.ranks.time", device)
        monkeypatch.setattr("dpsgd.parallel.ranks._recorded_event", device.event)
        return Ranks(size=2, device=torch.device("cuda")), device

    return on


class Block:
    """A part of a network that is gathered, as FSDP's are."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def unshard(self) -> None:
        self.calls.append("unshard")

    def reshard(self) -> None:
        self.calls.append("reshard")


def test_the_clock_runs_once_a_rank_has_done_its_own(ranks: Any) -> None:
    passes, exchange = 600.0, 600.0 + LIMIT - 1
    one, device = ranks(passes, exchange)
    with one.exchanging("sum"):
        one.wait()

    assert device.now == pytest.approx(exchange, abs=0.1)


def test_a_rank_that_never_comes_is_told_in_time(ranks: Any) -> None:
    passes = 600.0
    one, device = ranks(passes, float("inf"))
    with (
        pytest.raises(RankError, match=rf"another one in the sum .*in {LIMIT} s"),
        one.exchanging("sum"),
    ):
        one.wait()

    assert device.now == pytest.approx(passes + LIMIT, abs=0.1)


@pytest.mark.parametrize("stays", [True, False])
def test_a_lost_rank_is_told_before_passes_need_what_it_has(
    ranks: Any, stays: bool
) -> None:
    one, device = ranks(*(0.0, float("inf")))
    owner, block = nn.Linear(2, 3, bias=False), Block()
    shapes = {"weight": owner.weight.shape}
    blocks: Any = [(block, ["weight"])]
    layout = Layout(one, shapes, owner=owner, blocks=blocks, stays=stays)
    with (
        pytest.raises(RankError, match="in the gathering of parameters"),
        layout.gathered({"weight": owner.weight.detach()[:2]}),
    ):
        pytest.fail("no pass may be taken")

    assert device.now == pytest.approx(LIMIT, abs=0.1)
    assert block.calls == (["unshard", "reshard"] if stays else ["unshard"])


@pytest.mark.parametrize("stays", [True, False])
def test_what_is_gathered_is_used_whole_and_given_back(ranks: Any, stays: bool) -> None:
    one, _ = ranks(0.0, 0.0)
    owner, block = nn.Linear(2, 3, bias=False), Block()
    shapes = {"weight": owner.weight.shape}
    blocks: Any = [(block, ["weight"])]
    layout = Layout(one, shapes, owner=owner, blocks=blocks, stays=stays)
    with layout.gathered({"weight": owner.weight.detach()[:2]}) as whole:
        torch.testing.assert_close(whole["weight"], owner.weight.detach())
        is_copy = whole["weight"].data_ptr() != owner.weight.data_ptr()
        assert is_copy is stays

    assert block.calls == ["unshard", "reshard"]
