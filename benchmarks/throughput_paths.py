"""The ways to take a pass that are timed against each other, and the work of one."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.clipping import clipped_grad
from dpsgd.config import ModelConfig
from dpsgd.kernels import ConvGeometry
from dpsgd.kernels.dispatch import operator_modules
from dpsgd.kernels.weight_standardization import standardize_reference
from dpsgd.models import (
    build_model,
    initialize,
    layers,
    per_example_loss,
    trainable_params,
)
from dpsgd.rng import RandomStreams
from dpsgd.trees import zeros_like

sys.path.insert(0, str(Path(__file__).resolve().parent))
import opacus_passes


@dataclass(frozen=True, kw_only=True)
class Work:
    """One microbatch of one network.

    Attributes:
        model: Settings of the network, but for its type.
        examples: M.
        views: K.
        giga_macs: Multiply-adds of one view's forward pass, of which training takes
            three, at 2 FLOP each.
        side: Of the images.
        classes: Of the classifier.
    """

    model: dict[str, Any]
    examples: int
    views: int
    giga_macs: float
    side: int = 32
    classes: int = 10

    def examples_on(self, device: torch.device) -> int:
        """Returns M, or few examples on the CPU."""
        return self.examples if device.type == "cuda" else max(1, 16 // self.views)

    @property
    def is_large(self) -> bool:
        """Whether it takes a GPU, and only some of the paths."""
        return self.side > 32


WRN_16, WRN_40 = ({"depth": depth, "width": 4} for depth in (16, 40))
NORM_FREE = {"normalization": "none", "skip_gain_init": 1.0}
NF_RESNET_50 = {"name": "nf_resnet", "depth": 50, **NORM_FREE}
NFNET_F3 = {"name": "nfnet", "variant": "F3", **NORM_FREE}
WORK = {
    "wrn16-4 K=16": Work(model=WRN_16, examples=128, views=16, giga_macs=0.393),
    "wrn16-4 K=4": Work(model=WRN_16, examples=256, views=4, giga_macs=0.393),
    "wrn16-4 K=1": Work(model=WRN_16, examples=512, views=1, giga_macs=0.393),
    "wrn40-4 K=16": Work(model=WRN_40, examples=128, views=16, giga_macs=1.299),
    "nf-resnet-50 K=4": Work(
        model=NF_RESNET_50,
        examples=64,
        views=4,
        giga_macs=4.089,
        side=224,
        classes=1000,
    ),
    "nfnet-f3 K=4": Work(
        model=NFNET_F3, examples=8, views=4, giga_macs=67.94, side=320, classes=1000
    ),
}
SMALL = [name for name, work in WORK.items() if not work.is_large]
CLIPPED_SUM = {"clip_accumulate"}  # stays ours where layers are PyTorch's own


def never(_: Tensor) -> bool:
    """Takes no tensor to a kernel; unlike a mock, torch.compile can follow it."""
    return False


def channels_last_conv2d(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    geometry: ConvGeometry,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Does what `standardized_conv2d` does, in the layout that images come in.

    Its plain form makes them contiguous, which only vmap is faster with.
    """
    if gain is not None:
        weight, _ = standardize_reference(weight, gain, weight.dtype, scale=scale)
    kernel = weight.permute(0, 3, 1, 2).to(x.dtype)  # (O, I, KH, KW), channels-last
    _, stride, padding, groups = geometry
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=groups)


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Keeps layers on PyTorch's own operators; the clipped sum stays ours."""
    with contextlib.ExitStack() as stack:
        for name, module in operator_modules().items():
            if name not in CLIPPED_SUM:
                patch = mock.patch.object(module, "runs_on_triton", never)
                stack.enter_context(patch)
        yield


@contextlib.contextmanager
def ordinary_operators() -> Iterator[None]:
    """As `plain_operators`, in the layout that training without privacy wants."""
    patch = mock.patch.object(layers, "standardized_conv2d", channels_last_conv2d)
    with plain_operators(), patch:
        yield


def private(execution: str, engine: str = "vmap") -> Callable[..., Callable[[], Any]]:
    """Returns what builds a private pass."""

    def build(model, images, labels):
        params = trainable_params(model)
        total = zeros_like(params)
        mask = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        grad_fn = clipped_grad(
            per_example_loss(model),
            clipping_norm=1.0,
            engine=engine,
            execution=execution,
        )
        return lambda: grad_fn.accumulate(total, params, images, labels, mask=mask)

    return build


def non_private(**compiler: Any) -> Callable[..., Callable[[], Any]]:
    """Returns what builds an ordinary forward and backward pass.

    Args:
        **compiler: Options of torch.compile; none leaves the pass eager.
    """

    def build(model, images, labels):
        params = list(model.parameters())
        images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        labels = labels.repeat_interleave(images.shape[0] // len(labels))

        def loss(images, labels):
            return F.cross_entropy(model(images), labels)

        if compiler:
            loss = torch.compile(loss, **compiler)
        return lambda: torch.autograd.grad(loss(images, labels), params)

    return build


def network(work: Work, dtype: str) -> nn.Module:
    """Returns our network."""
    config = ModelConfig(**work.model, compute_dtype=dtype)
    shape = (3, work.side, work.side)
    model = build_model(config, image_shape=shape, num_classes=work.classes)
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    return model


def plain_network(work: Work, dtype: str) -> nn.Module:
    """Returns the Wide-ResNet that Opacus can take."""
    del dtype  # float32, of which autocast makes what it is
    return opacus_passes.plain_wide_resnet(
        work.model["depth"], 4, in_channels=3, num_classes=work.classes
    )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to take a pass.

    Attributes:
        build: Returns a pass of a network, images (M, K, ...) and labels (M,).
        network: Builds the network of a work, in a type.
        operators: Returns the context in which it is built and taken.
        views: The only number of views that it can take; None takes any.
    """

    build: Callable[..., Callable[[], Any]]
    network: Callable[[Work, str], nn.Module] = network
    operators: Callable[[], contextlib.AbstractContextManager[None]] = (
        contextlib.nullcontext
    )
    views: int | None = None

    def takes(self, work: Work) -> bool:
        """Returns whether it is measured on a work."""
        if work.is_large and self.network is plain_network:
            return False
        return self.views in (None, work.views)


def _ordinary(**compiler: Any) -> Contender:
    return Contender(build=non_private(**compiler), operators=ordinary_operators)


def _plain(execution: str) -> Contender:
    return Contender(build=private(execution), operators=plain_operators)


COMPILED = "non-private, torch.compile"
PATHS: dict[str, Contender] = {
    "non-private, eager": _ordinary(),
    COMPILED: _ordinary(fullgraph=True),
    f"{COMPILED}, CUDA graphs": _ordinary(fullgraph=True, mode="reduce-overhead"),
    "Opacus, hooks": Contender(build=opacus_passes.hooks, network=plain_network),
    "Opacus, ghost": Contender(
        build=opacus_passes.ghost, network=plain_network, views=1
    ),
    "vmap(grad), eager": _plain("eager"),
    "vmap(grad), torch.compile": _plain("compile"),
    "dpsgd vmap, eager": Contender(build=private("eager")),
    "dpsgd vmap, CUDA graph": Contender(build=private("cuda_graph")),
    "dpsgd ghost, eager": Contender(build=private("eager", "ghost")),
    "dpsgd ghost, CUDA graph": Contender(build=private("cuda_graph", "ghost")),
}


def prepared(work: Work, path: str, device: torch.device) -> Callable[[], Any]:
    """Returns a pass of a path, in bfloat16 on CUDA and float32 on the CPU."""
    num_examples, num_views = work.examples_on(device), work.views
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = PATHS[path].network(work, dtype).to(device)
    shape = (num_examples, num_views, 3, work.side, work.side)
    images = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
    images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    images = images.unflatten(0, shape[:2])  # as the loader lays them out
    labels = torch.randint(work.classes, (num_examples,), device=device)
    return PATHS[path].build(model, images, labels)
