"""How a pass runs changes nothing but its speed."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend

from dpsgd.clipping import clipped_grad
from dpsgd.clipping.capture import (
    CapturedFunction,
    Recording,
    garbage_collected_before,
)
from dpsgd.clipping.vmap import VmapClippedGrad
from dpsgd.models import per_example_loss, trainable_params
from dpsgd.trees import Params, zeros_like


def loss_fn(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return ((x @ params["w"] + params["b"]).tanh() - y).square().sum()


def case(num_examples: int, device: str) -> tuple[Params, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_examples)
    params = {"w": torch.randn(5, 3, generator=generator), "b": torch.zeros(3)}
    x = torch.randn(num_examples, 5, generator=generator)
    y = torch.randn(num_examples, 3, generator=generator)
    params = {name: leaf.to(device) for name, leaf in params.items()}
    return params, x.to(device), y.to(device)


def test_a_compiler_that_fails_is_told_and_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise TorchDynamoException("no compiler here")

    params, x, y = case(4, "cpu")
    engine = clipped_grad(loss_fn, clipping_norm=0.5, execution="compile")
    monkeypatch.setattr(engine, "_compiled", fail)
    with pytest.warns(
        UserWarning, match=r"runtime\.execution=compile: failed \(no compiler here\)"
    ):
        grads = engine(params, x, y)
    expected = clipped_grad(loss_fn, clipping_norm=0.5)(params, x, y)

    assert isinstance(engine, VmapClippedGrad)
    assert engine.execution == "eager"
    assert torch.equal(grads.clipped_sum["w"], expected.clipped_sum["w"])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts what torch.compile traces, without the minute that code for it takes."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize("normalization", ["group_norm", "none"])
def test_a_compiled_pass_of_a_network_is_one_graph_and_warns_of_nothing(
    graphs: CompileCounterWithBackend,
    tiny_network: Callable[..., nn.Module],
    normalization: str,
) -> None:
    network = tiny_network(normalization=normalization)
    loss, params = per_example_loss(network), trainable_params(network)
    views, labels = torch.randn(2, 2, 3, 8, 8), torch.tensor([0, 2])
    engine = clipped_grad(loss, clipping_norm=0.5, execution="compile")
    for _ in range(2):  # the second has nothing left to compile
        views = views + 1
        grads = engine(params, views, labels)
    expected = clipped_grad(loss, clipping_norm=0.5)(params, views, labels)

    assert isinstance(engine, VmapClippedGrad)
    assert engine.execution == "compile"
    assert graphs.frame_count == 1
    for name, leaf in expected.clipped_sum.items():
        # Float32 sums in another order.
        torch.testing.assert_close(grads.clipped_sum[name], leaf, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_recorded_pass_equals_an_eager_one_whatever_changes() -> None:
    engine = clipped_grad(loss_fn, clipping_norm=0.5, execution="cuda_graph")
    eager = clipped_grad(loss_fn, clipping_norm=0.5)
    params, x, y = case(6, "cuda")
    for round_number in range(4):
        if round_number == 2:  # other shapes are recorded anew
            params, x, y = case(9, "cuda")
        for leaf in params.values():  # parameters change where they lie
            leaf.add_(0.1)
        mask = torch.rand(len(x), device="cuda") < 0.7
        sums, wanted = zeros_like(params), zeros_like(params)
        seen = engine.accumulate(sums, params, x + round_number, y, mask=mask)
        eager.accumulate(wanted, params, x + round_number, y, mask=mask)

        assert int(seen.num_examples) == int(mask.sum())
        for name, expected in wanted.items():
            torch.testing.assert_close(sums[name], expected, rtol=1e-5, atol=1e-6)
    assert isinstance(engine, VmapClippedGrad)
    assert engine.execution == "cuda_graph"


@pytest.mark.gpu
def test_a_recording_sees_what_changes_in_place() -> None:
    fixed, given = (torch.ones(3, device="cuda") for _ in range(2))
    double = CapturedFunction(lambda fixed, inputs: (fixed[0] * 2 + inputs[0],))

    assert double((fixed,), (given,))[0].tolist() == [3.0] * 3
    fixed.fill_(5.0)
    assert double((fixed,), (given + 1,))[0].tolist() == [12.0] * 3


class Graph:
    """Stands for a CUDA graph where there is none: what it does was done already."""

    def replay(self) -> None:
        pass


def test_two_sets_of_shapes_are_kept_until_tensors_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[int] = []

    def record(self: CapturedFunction, fixed: Any, inputs: Any) -> Recording:
        recorded.append(len(inputs[0]))
        return Recording(Graph(), tuple(one.clone() for one in inputs), inputs)

    monkeypatch.setattr(CapturedFunction, "_record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    function = CapturedFunction(lambda fixed, inputs: inputs)
    here, there = (torch.zeros(1),), (torch.zeros(1),)
    for size in (4, 2, 4, 2, 4):
        function(here, (torch.zeros(size),))
    assert recorded == [4, 2]
    for size in (4, 2):
        function(there, (torch.zeros(size),))
    assert recorded == [4, 2, 4, 2]
    for size in (3, 3, 4, 3):  # memory is not filled with shapes
        function(there, (torch.zeros(size),))
    assert recorded == [4, 2, 4, 2, 3, 4]


@pytest.mark.parametrize("is_enabled", [True, False])
def test_garbage_is_collected_before_a_recording_and_not_during_it(
    is_enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[bool] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(gc.isenabled()))
    before = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        with garbage_collected_before():
            assert not gc.isenabled()
        assert gc.isenabled() == is_enabled
        with pytest.raises(RuntimeError, match="capture"), garbage_collected_before():
            raise RuntimeError("operation failed during capture")
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert collected == [False, False]


@pytest.mark.gpu
def test_recordings_that_share_memory_do_not_disturb_each_other() -> None:
    engine = clipped_grad(loss_fn, clipping_norm=0.5, execution="cuda_graph")
    eager = clipped_grad(loss_fn, clipping_norm=0.5)
    params, x, y = case(8, "cuda")
    sums, wanted = zeros_like(params), zeros_like(params)
    for size in (8, 4, 8, 4, 4, 8):
        mask = torch.ones(size, dtype=torch.bool, device="cuda")
        engine.accumulate(sums, params, x[:size], y[:size], mask=mask)
        eager.accumulate(wanted, params, x[:size], y[:size], mask=mask)

    for name, expected in wanted.items():
        torch.testing.assert_close(sums[name], expected, rtol=1e-5, atol=1e-6)


def test_a_recording_that_fails_is_told_and_its_pass_is_added_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    class OnCuda(Tensor):
        """A mask that says it lies on CUDA, where there is none."""

        is_cuda = True

    params, x, y = case(4, "cpu")
    engine = clipped_grad(loss_fn, clipping_norm=0.5, execution="cuda_graph")
    monkeypatch.setattr(engine._run, "_recorded", fail)
    mask = torch.ones(4, dtype=torch.bool)
    sums, expected = zeros_like(params), zeros_like(params)
    with pytest.warns(UserWarning, match=r"runtime\.execution=cuda_graph: failed"):
        engine.accumulate(sums, params, x, y, mask=mask.as_subclass(OnCuda))
    clipped_grad(loss_fn, clipping_norm=0.5).accumulate(
        expected, params, x, y, mask=mask
    )

    torch.testing.assert_close(sums["w"].as_subclass(Tensor), expected["w"])
