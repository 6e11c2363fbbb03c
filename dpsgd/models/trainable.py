"""Which parameters are trained; all others are constants of the loss."""

import re
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dpsgd.errors import ConfigError, fault
from dpsgd.models.layers import ActivationNorm
from dpsgd.trees import Params

__all__ = ["CLASSIFIER", "freeze", "frozen_tensors", "trainable_params"]

CLASSIFIER = "classifier"
"""Name of the last layer of every network, which follows on the features."""

_FIELD = "finetune.train"
_NORMS = (ActivationNorm, nn.GroupNorm, nn.LayerNorm, _NormBase)


def freeze(model: nn.Module, train: str) -> None:
    """Leaves the chosen parameters trainable, and no others, in place.

    Args:
        model: Network, whose last layer is its module `classifier`.
        train: `all`, `classifier`, `norm_and_classifier`, or a regular expression that
            the whole name of a parameter must match.

    Raises:
        ConfigError: Nothing is chosen, an expression is not valid, or it chooses all.
    """
    names = [name for name, _ in model.named_parameters()]
    is_chosen = _choice(model, train)
    chosen = {name for name in names if is_chosen(name)}
    if not chosen:
        rule = f"is the name of no parameter of {type(model).__name__}"
        remedy = f"names are like {names[0]} and {names[-1]}"
        raise ConfigError(fault(_FIELD, train, rule, remedy))
    if len(chosen) == len(names) and train != "all":
        rule = f"chooses all {len(names)} parameters"
        raise ConfigError(fault(_FIELD, train, rule, "say all, or choose fewer"))
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(name in chosen)


def trainable_params(model: nn.Module) -> Params:
    """Returns the trainable parameters by name, detached from the module."""
    return {
        name: leaf.detach()
        for name, leaf in model.named_parameters()
        if leaf.requires_grad
    }


def frozen_tensors(model: nn.Module) -> Params:
    """Returns what a network keeps besides its trainable parameters, by name."""
    trained = trainable_params(model).keys()
    return {
        name: leaf.detach()
        for name, leaf in model.state_dict().items()
        if name not in trained
    }


def _choice(model: nn.Module, train: str) -> Callable[[str], bool]:
    """Returns what tells whether a parameter of some name is chosen."""
    if train == "all":
        return lambda name: True
    modules = [CLASSIFIER]
    if train == "norm_and_classifier":
        norms = [name for name, one in model.named_modules() if isinstance(one, _NORMS)]
        if not norms:
            rule = f"{type(model).__name__} has no normalisation layers"
            raise ConfigError(fault(_FIELD, train, rule, "take classifier"))
        modules += norms
    elif train != CLASSIFIER:
        return _expression(train)
    prefixes = tuple(f"{module}." for module in modules)
    return lambda name: name.startswith(prefixes)


def _expression(train: str) -> Callable[[str], bool]:
    """Returns the choice of a regular expression."""
    try:
        pattern = re.compile(train)
    except re.error as error:
        rule = f"is not a valid regular expression ({error})"
        remedy = r"write one such as stages\.2\..*|classifier\..*"
        raise ConfigError(fault(_FIELD, train, rule, remedy)) from error
    return lambda name: pattern.fullmatch(name) is not None
