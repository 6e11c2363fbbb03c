"""Refuses networks for which one example's gradient is not one example's alone."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from dpsgd.errors import ConfigError

__all__ = ["check_model"]

# Instance normalisation first: torch derives it from batch normalisation.
_REFUSED: tuple[tuple[type, str, str], ...] = (
    (
        _BatchNorm,
        "normalises with statistics of other examples, so no bound on one example's "
        "gradient bounds its influence",
        "use GroupNorm, or freeze public statistics with eval()",
    ),
    (
        _DropoutNd,
        "draws from a random stream that is not the run's, so a resumed run differs",
        "remove it, or switch it off with eval()",
    ),
    (LazyModuleMixin, "has no parameters before its first batch", "give its sizes"),
)

_ROUNDING = 0.05


def check_model(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Raises if a network mixes examples or keeps running statistics.

    Batch normalisation and dropout in evaluation mode are accepted: the one uses fixed
    statistics, which must be public, and the other does nothing.

    Args:
        model: Network in the mode in which it will be trained, which maps (K, C, H, W)
            to (K, classes).
        image_shape: (C, H, W) of one image.

    Raises:
        ConfigError: A module is refused, by its name and with a remedy; or a forward
            pass changed a tensor that the model keeps, or mixed two images; one line
            for each.
    """
    faults = [line for item in model.named_modules() for line in _faults(*item)]
    faults = faults or _seen_in_a_forward_pass(model, image_shape)
    if faults:
        raise ConfigError("\n".join(faults))


def _faults(name: str, module: nn.Module) -> list[str]:
    """Returns why a module is refused, by its type."""
    label = f"{name or 'model'}={type(module).__name__}"
    if _is_fixed(module):
        return []
    if isinstance(module, _InstanceNorm) and not isinstance(module, LazyModuleMixin):
        if not module.track_running_stats:
            return []
        rule = "keeps running statistics of private examples outside the mechanism"
        return [f"{label}: {rule}; set track_running_stats=False"]
    return [
        f"{label}: {rule}; {remedy}"
        for kind, rule, remedy in _REFUSED
        if isinstance(module, kind)
    ]


def _is_fixed(module: nn.Module) -> bool:
    """Returns whether evaluation mode makes a constant map of what would be refused."""
    if isinstance(module, LazyModuleMixin) or module.training:
        return False
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return module.running_mean is not None
    return isinstance(module, _DropoutNd)


def _seen_in_a_forward_pass(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> list[str]:
    """Returns a fault for every tensor that a pass changes, and for mixed images."""
    before = dict(_kept_tensors(model))
    images = torch.linspace(-1, 1, 2 * math.prod(image_shape)).view(2, *image_shape)
    trial = copy.deepcopy(model)
    with torch.no_grad():
        together, alone = trial(images)[0], trial(images[:1])[0]
    after = dict(_kept_tensors(trial))
    faults = [
        f"{name}=tensor: is written by a forward pass, so it carries private examples "
        "outside the mechanism; remove the running statistic"
        for name, tensor in after.items()
        if name not in before or not _equal(before[name], tensor)
    ]
    # Rounding may depend on the batch, in bfloat16 by some per cent.
    margin = _ROUNDING * float(alone.abs().max().nan_to_num())
    if not faults and not torch.allclose(
        together, alone, rtol=0, atol=margin, equal_nan=True
    ):
        faults = [
            f"model={type(model).__name__}: the output for an image depends on the "
            "others of its batch; normalise each image by itself"
        ]
    return faults


def _kept_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields buffers, and tensors that modules keep as plain attributes."""
    yield from model.named_buffers()
    for module_name, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{module_name}.{name}".lstrip("."), value


def _equal(one: Tensor, other: Tensor) -> bool:
    """Returns whether tensors are the same, NaN included."""
    return torch.equal(one.nan_to_num(), other.nan_to_num())
