"""The estimate of memory: linear, monotone, and never the sign of the wrong thing."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpsgd.clipping import (
    Engine,
    MicrobatchMemory,
    clipped_grad,
    measure_microbatch,
)
from dpsgd.config import ModelConfig
from dpsgd.models import build_model, per_example_loss, trainable_params
from dpsgd.models.layers import Conv2d
from dpsgd.non_private import SummedGrad
from dpsgd.trees import num_elements, zeros_like

Network = Callable[..., nn.Module]


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive at once that are made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, operator, types, args=(), kwargs=None
    ):
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address: int) -> None:
        self._now -= self._alive.pop(address, 0)


def measured(
    *, width: int = 1, size: int = 8, num_views: int = 2, engine: Engine = "ghost"
) -> MicrobatchMemory:
    config = ModelConfig(depth=10, width=width)
    shape = (3, size, size)
    with torch.device("meta"):
        model = build_model(config, image_shape=shape, num_classes=10)
    return measure_microbatch(
        model, image_shape=shape, num_views=num_views, engine=engine
    )


def test_memory_grows_linearly_with_the_microbatch() -> None:
    memory = MicrobatchMemory(fixed=1_000, per_example=30)

    assert [memory.total(size) for size in (0, 1, 10)] == [1_000, 1_030, 1_300]


@pytest.mark.parametrize("available", [0, 999, 1_000, 1_029, 1_030, 1_059, 10**9])
def test_the_largest_microbatch_fits_and_one_more_does_not(available: int) -> None:
    memory = MicrobatchMemory(fixed=1_000, per_example=30)
    largest = memory.largest_fitting(available)

    assert largest >= 0
    assert largest == 0 or memory.total(largest) <= available
    assert memory.total(largest + 1) > available


def test_memory_grows_with_views_size_and_width() -> None:
    base, more_views = measured(), measured(num_views=4)
    gradient = base.fixed // 5

    # Activations double with the views; the gradient of an example stays.
    twice = 2 * (base.per_example - gradient) + gradient
    assert more_views.per_example == pytest.approx(twice, rel=0.01)
    assert more_views.fixed == base.fixed
    larger = measured(size=16).per_example - gradient
    assert larger > 2 * (base.per_example - gradient)
    assert measured(width=2).per_example > 1.5 * base.per_example


def test_an_example_takes_at_least_its_gradient_and_its_activations() -> None:
    with torch.device("meta"):
        model = build_model(
            ModelConfig(depth=10, width=1), image_shape=(3, 8, 8), num_classes=10
        )
    gradient = 4 * num_elements(trainable_params(model))
    # The input of the stem and of each block, of each of two views, in float32.
    activations = 2 * 4 * (3 + 16 + 16 + 32 // 4 + 64 // 16) * 64

    assert measured().per_example > gradient + activations
    assert measured().fixed >= 4 * gradient  # parameters, average, sum, momentum


def peak_bytes(
    model: nn.Module, num_examples: int, num_views: int, engine: Engine | None
) -> int:
    views = torch.zeros(num_examples, num_views, 3, 16, 16)
    labels = torch.zeros(num_examples, dtype=torch.long)
    mask = torch.ones(num_examples, dtype=torch.bool)
    loss_fn = per_example_loss(model)
    engine_fn = SummedGrad(loss_fn)
    if engine is not None:
        engine_fn = clipped_grad(loss_fn, clipping_norm=1.0, engine=engine)
    params = trainable_params(model)
    sums = zeros_like(params)
    with PeakBytes() as memory:
        engine_fn.accumulate(sums, params, views, labels, mask=mask)
    return memory.peak


@pytest.mark.parametrize("engine", ["vmap", "ghost", None])
@pytest.mark.parametrize("num_views", [1, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "norm_activation"},
        {"normalization": "none", "weight_standardization": False},
        {"name": "convnet", "depth": 4, "normalization": "none"},
    ],
    ids=["paper", "norm_first", "plain", "convnet"],
)
def test_a_pass_takes_no_more_than_foreseen_and_not_much_less(
    tiny_network: Network,
    settings: dict[str, Any],
    num_views: int,
    engine: Engine | None,
) -> None:
    model = tiny_network((3, 16, 16), **settings)
    few, many = (peak_bytes(model, size, num_views, engine) for size in (8, 24))
    foreseen = measure_microbatch(
        model.to("meta"), image_shape=(3, 16, 16), num_views=num_views, engine=engine
    )

    assert 0.35 < (many - few) / 16 / foreseen.per_example < 1
    assert many < foreseen.total(24) + 2**20  # what the kernels take for themselves


@pytest.mark.parametrize(
    ("views", "examples", "gib"),
    [(16, 128, 5.8), (16, 64, 3.0), (4, 256, 4.6), (1, 256, 3.2)],
)
def test_what_an_h100_took_is_foreseen(views: int, examples: int, gib: float) -> None:
    config = ModelConfig(depth=16, width=4, compute_dtype="bfloat16")
    with torch.device("meta"):
        model = build_model(config, image_shape=(3, 32, 32), num_classes=10)
    memory = measure_microbatch(
        model,
        image_shape=(3, 32, 32),
        num_views=views,
        engine="vmap",
        device="cuda",
    )

    assert gib <= memory.total(examples) / 2**30 <= 1.2 * gib


def test_networks_without_norms_are_not_taken_to_save_copies() -> None:
    shape = (3, 64, 64)
    config = ModelConfig(
        name="nf_resnet", depth=50, normalization="none", compute_dtype="bfloat16"
    )
    with torch.device("meta"):
        model = build_model(config, image_shape=shape, num_classes=10)
    gradient = 4 * num_elements(trainable_params(model))
    kept: list[torch.Tensor] = []  # inputs of convolutions, and what skip gains scale
    for name, layer in model.named_modules():
        if isinstance(layer, Conv2d) and not name.endswith("projection"):
            layer.register_forward_hook(lambda *args: kept.append(args[1][0]))
        if isinstance(layer, Conv2d) and name.endswith("branch.2"):
            layer.register_forward_hook(lambda *args: kept.append(args[2].images))
    model(torch.empty((1, *shape), device="meta"))
    num_bytes = sum(one.nbytes for one in kept)
    memory = measure_microbatch(
        model, image_shape=shape, num_views=4, engine="vmap", device="cuda"
    )

    assert memory.per_example > gradient + 4 * num_bytes
