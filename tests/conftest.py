"""What all tests share: where kernels run, which tests need a GPU, a tiny network."""

import os
from collections.abc import Callable

import pytest
import torch

# Triton decides when a kernel is defined whether it is interpreted, so this stands
# before any import of dpsgd.kernels. With a GPU the kernels are compiled and run there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from dpsgd.config import ModelConfig
from dpsgd.models import build_model, initialize
from dpsgd.rng import RandomStreams

# Tensors here are tiny, and two test runs side by side must not fight over cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu`, or `gpu(count)`, where there are not as many."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for mark in item.iter_markers("gpu"):
            needed = mark.args[0] if mark.args else 1
            if found < needed:
                reason = f"needs CUDA devices: {needed}; there are {found}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_random_inputs_in_any_order() -> None:
    """Seeds what tests draw without a generator, however they are spread and sorted."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where Triton kernels run: the GPU, or the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_network() -> Callable[..., torch.nn.Module]:
    """Builds an initialised WRN-10-1 of three classes for small images."""

    def build(
        image_shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0, **settings: object
    ) -> torch.nn.Module:
        config = ModelConfig(**{"depth": 10, "width": 1, **settings})
        model = build_model(config, image_shape=image_shape, num_classes=3)
        initialize(model, RandomStreams.from_seed(seed).generator("init"))
        return model

    return build
