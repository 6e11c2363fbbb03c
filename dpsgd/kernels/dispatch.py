"""Which implementation of an operator runs, and what its vmap rule takes."""

import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["fold", "operator_modules", "require_unbatched", "runs_on_triton"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def runs_on_triton(tensor: Tensor) -> bool:
    """Returns whether the Triton kernel takes this tensor, or else the reference.

    Kernels take what lies on CUDA. torch.compile is given the reference, which it
    fuses by itself.
    """
    return tensor.is_cuda and _HAS_TRITON and not torch.compiler.is_compiling()


def operator_modules() -> dict[str, ModuleType]:
    """Returns every module that asks `runs_on_triton`, by name.

    Whoever forces one implementation, as tests and benchmarks do, replaces the function
    in all of them: a list written by hand would leave a new operator as it is.
    """
    names = [one.name for one in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = {name: importlib.import_module(f"dpsgd.kernels.{name}") for name in names}
    return {
        name: module
        for name, module in modules.items()
        if module.__name__ != __name__ and hasattr(module, "runs_on_triton")
    }


def require_unbatched(operator: str, in_dims: tuple[Any, ...]) -> None:
    """Raises ValueError where vmap maps over parameters, for which there is no rule.

    Args:
        operator: Its name.
        in_dims: What vmap says of the arguments that must not be mapped over.
    """
    if any(dim is not None for dim in in_dims if not isinstance(dim, tuple)):
        raise ValueError(f"{operator}: vmap may map over images, not over parameters")


def fold(tensor: Tensor, dim: int | None, num_examples: int) -> Tensor:
    """Returns the images of all examples as those of one batch.

    Args:
        tensor: Images of one example, (K, ...) apart from the mapped axis.
        dim: Axis of the examples; None if every example has the same images.
        num_examples: M.

    Returns:
        (M * K, ...).
    """
    if dim is None:
        return tensor.expand(num_examples, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)
