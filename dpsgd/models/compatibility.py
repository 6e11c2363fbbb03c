"""Refuses networks for which one example's gradient is not one example's alone."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
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
        "use GroupNorm",
    ),
    (
        _DropoutNd,
        "draws from a random stream that is not the run's, so a resumed run differs",
        "remove it",
    ),
    (LazyModuleMixin, "has no parameters before its first batch", "give its sizes"),
)


def check_model(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Raises if a network mixes examples or keeps running statistics.

    Args:
        model: Network in training mode, which maps (K, C, H, W) to (K, classes).
        image_shape: (C, H, W) of one image.

    Raises:
        ConfigError: A module is refused, by its name and with a remedy; or a forward
            pass wrote to a buffer; one line for each.
    """
    faults = [line for item in model.named_modules() for line in _faults(*item)]
    faults = faults or _written_buffers(model, image_shape)
    if faults:
        raise ConfigError("\n".join(faults))


def _faults(name: str, module: nn.Module) -> list[str]:
    """Returns why a module is refused, by its type."""
    label = f"{name or 'model'}={type(module).__name__}"
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


def _written_buffers(model: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Returns a fault for every buffer that one forward pass changes."""
    before: dict[str, Tensor] = dict(model.named_buffers())
    if not before:
        return []
    clones = {name: buffer.clone() for name, buffer in before.items()}
    images = torch.linspace(-1, 1, 2 * torch.Size(image_shape).numel())
    # A buffer that is replaced, not written, is replaced in this dict.
    state = {**dict(model.named_parameters()), **clones}
    with torch.no_grad():
        functional_call(model, state, (images.view(2, *image_shape),))
    return [
        f"{name}=buffer: is written by a forward pass, so it carries private examples "
        "outside the mechanism; remove the running statistic"
        for name, buffer in before.items()
        if not torch.equal(buffer.nan_to_num(), state[name].nan_to_num())
    ]
