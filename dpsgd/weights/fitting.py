"""Fits weights to a network, and says what became of every tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import nn

from dpsgd.config import Config
from dpsgd.errors import ConfigError, fault
from dpsgd.models import CLASSIFIER
from dpsgd.trees import Params, sha256
from dpsgd.weights.named import network_of_named, renamed
from dpsgd.weights.sources import Weights

__all__ = ["Initialization", "fit"]

_FIELD = "model.init_from"
_REMEDY = "give weights of this very network"
_MOST_LINES = 5
# Settings under which a network computes the same from the same tensors, or from all of
# them but the classifier; what others decide need not show in the shapes of tensors.
_NOT_DECIDING = (
    "skip_gain_init",
    "stochastic_depth",
    "num_classes",
    "compute_dtype",
    "init_from",
    "init_weights",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Initialization:
    """What a network starts from.

    Attributes:
        source: Where the weights are from.
        guarantee: What their own training data were promised, in words.
        sha256: Of the tensors that were loaded.
        loaded: Names of the parameters that have their values.
        reinitialized: Names of the classifier's parameters that have not.
        classifier: How those begin: `initialize`, `zero` or `load`.
        unused: Names of tensors of the source that the network has no use for.
        tensors: The values to load, empty where a checkpoint has them already.
    """

    source: str
    guarantee: str
    sha256: str
    loaded: tuple[str, ...]
    reinitialized: tuple[str, ...]
    classifier: str
    unused: tuple[str, ...]
    tensors: Params = field(default_factory=dict, repr=False, compare=False)

    def apply(self, model: nn.Module) -> None:
        """Gives a network whose parameters are drawn the values, in place."""
        own = model.state_dict()
        with torch.no_grad():
            for name, leaf in self.tensors.items():
                own[name].copy_(leaf)
            if self.classifier == "zero":
                for name in self.reinitialized:
                    own[name].zero_()

    def rows(self) -> list[tuple[str, str]]:
        """Returns what a plan shows, as (name, value) in words."""
        began = {"zero": " (zero)"}.get(self.classifier, "")
        return [
            ("weights from", f"{self.source}; public by declaration"),
            ("their data", f"NOT covered by epsilon; own guarantee: {self.guarantee}"),
            ("loaded", _listed(self.loaded)),
            ("re-initialised", _listed(self.reinitialized) + began),
            ("unused", _listed(self.unused)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the tensors as JSON values."""
        names = [one.name for one in fields(self) if one.name != "tensors"]
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Returns what `to_dict` described."""
        names = ("loaded", "reinitialized", "unused")
        return cls(**{**state, **{name: tuple(state[name]) for name in names}})


def fit(weights: Weights, model: nn.Module, config: Config) -> Initialization:
    """Finds a tensor for every parameter of a network, or says why there is none.

    Args:
        weights: What to start from.
        model: Network, its parameters on any device, frozen as they will be.
        config: Settings, of which `model` and `finetune` are used.

    Raises:
        ConfigError: The weights are of another network, differ from it in the shape of
            any tensor outside the classifier, or hold inf or NaN; or the classifier
            would be re-initialised and frozen.
    """
    _check_network(weights, config)
    given = renamed(weights.tensors, naming=weights.naming, network=config.model.name)
    own = model.state_dict()
    drawn = _drawn_names(model, config)
    loaded = {name: given[name] for name in own if name in given and name not in drawn}
    unused = [name for name in given if name not in loaded]
    misfits = _misfits(own, given, drawn) + _left_over(model, unused, drawn)
    misfits += _not_finite(loaded)
    if misfits:
        lines = [fault(_FIELD, weights.source, *one) for one in misfits[:_MOST_LINES]]
        if len(misfits) > _MOST_LINES:
            rule = f"{len(misfits) - _MOST_LINES} more tensors do not fit"
            lines.append(fault(_FIELD, weights.source, rule, _REMEDY))
        raise ConfigError("\n".join(lines))
    tensors = {name: leaf.to(torch.float32) for name, leaf in loaded.items()}
    return Initialization(
        source=weights.source,
        guarantee=weights.guarantee,
        sha256=sha256(tensors),
        loaded=tuple(loaded),
        reinitialized=tuple(drawn),
        classifier=config.finetune.classifier,
        unused=tuple(unused),
        tensors=tensors,
    )


def _check_network(weights: Weights, config: Config) -> None:
    """Raises if the weights are known to be of a network that computes otherwise."""
    wanted = {
        one.name: getattr(config.model, one.name)
        for one in fields(config.model)
        if one.name not in _NOT_DECIDING
    }
    network = {**weights.network, **network_of_named(weights.naming)}
    lines = [
        fault(f"model.{name}", wanted[name], f"the weights are of {value}", _REMEDY)
        for name, value in network.items()
        if name in wanted and wanted[name] != value
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _drawn_names(model: nn.Module, config: Config) -> list[str]:
    """Returns the names of the parameters that do not start from the weights."""
    if config.finetune.classifier == "load":
        return []
    drawn = {
        name: leaf
        for name, leaf in model.named_parameters()
        if name.startswith(f"{CLASSIFIER}.")
    }
    frozen = [name for name, leaf in drawn.items() if not leaf.requires_grad]
    if frozen:
        rule = f"leaves {frozen[0]} frozen, which is drawn anew"
        remedy = r"let it match classifier\..*, or set finetune.classifier=load"
        raise ConfigError(fault("finetune.train", config.finetune.train, rule, remedy))
    return list(drawn)


def _misfits(own: Params, given: Params, drawn: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (rule, remedy) for every parameter without a tensor of its shape."""
    found = []
    for name in sorted(own.keys() - set(drawn)):
        mine = list(own[name].shape)
        theirs = list(given[name].shape) if name in given else "no such tensor"
        if theirs != mine:
            remedy = _REMEDY
            if name.startswith(f"{CLASSIFIER}."):
                remedy = "set finetune.classifier=initialize for other classes"
            found.append((f"{name} is {mine} here and {theirs} there", remedy))
    return found


def _left_over(
    model: nn.Module, unused: Iterable[str], drawn: Iterable[str]
) -> list[tuple[str, str]]:
    """Returns (rule, remedy) for every unused tensor of a deeper network than ours."""
    parts = {name for name, _ in model.named_children()}
    return [
        (f"{name} has no place in the network", _REMEDY)
        for name in unused
        if name.partition(".")[0] in parts and name not in drawn
    ]


def _not_finite(tensors: Params) -> list[tuple[str, str]]:
    """Returns (rule, remedy) for every tensor that holds inf or NaN."""
    return [
        (f"{name} holds inf or NaN", "give sound weights")
        for name, leaf in tensors.items()
        if not bool(torch.isfinite(leaf).all())
    ]


def _listed(names: tuple[str, ...]) -> str:
    """Returns names in words, those of one module together.

    >>> _listed(("stem.weight", "stem.bias", "scale"))
    '3: stem.{weight,bias} scale'
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    words = []
    for module, leaves in modules.items():
        inside = leaves[0] if len(leaves) == 1 else f"{{{','.join(leaves)}}}"
        words.append(f"{module}.{inside}".lstrip("."))
    return f"{len(names)}: {' '.join(words)}" if names else "none"


def _plain(value: Any) -> Any:
    """Returns a tuple as the list that JSON has."""
    return list(value) if isinstance(value, tuple) else value
