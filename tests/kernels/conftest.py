"""What tests of differentiable operators share: a switch from references to kernels."""

from collections.abc import Callable

import pytest
import torch

from dpsgd.kernels.dispatch import operator_modules


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sends tensors of the CPU to the kernels too, which are interpreted there."""

    def switch() -> None:
        pytest.importorskip("triton")
        for module in operator_modules().values():
            monkeypatch.setattr(module, "runs_on_triton", lambda _: True)

    return switch


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps cuDNN from rounding float32 inputs of convolutions to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
