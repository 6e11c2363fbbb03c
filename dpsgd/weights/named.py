"""Published networks by name, and how their tensors are called in ours."""

from collections.abc import Callable, Mapping
from typing import Any

from dpsgd.errors import CheckpointError, ConfigError, fault
from dpsgd.trees import Params
from dpsgd.weights.jax import from_jax_wide_resnet
from dpsgd.weights.timm import from_timm_nfnet

__all__ = ["NAME_MAPS", "is_named", "network_of_named", "read_named", "renamed"]

_FIELD = "model.init_from"
_LIBRARIES = ("torchvision", "timm")
_NFNETS = {f"timm:dm_nfnet_f{size}": f"F{size}" for size in range(7)}

NAME_MAPS: dict[tuple[str, str], Callable[[Params], Params]] = {
    ("jax", "wide_resnet"): from_jax_wide_resnet,
    **{(name, "nfnet"): from_timm_nfnet for name in _NFNETS},
}
"""By (naming, our network): turns its tensors into ours, names and layout. Keys are
`jax`, `torchvision:NAME` or `timm:NAME`; what is not here does not fit."""


def is_named(init_from: str) -> bool:
    """Returns whether weights are those of a library's network, not a path."""
    library, colon, _ = init_from.partition(":")
    return bool(colon) and library in _LIBRARIES


def network_of_named(naming: str) -> dict[str, Any]:
    """Returns the settings, as far as they are known, of the network with some naming.

    Args:
        naming: As for `renamed`.
    """
    if naming == "jax":
        return {"stride_padding": "same"}
    if naming in _NFNETS:
        return {"stride_padding": "same", "variant": _NFNETS[naming]}
    return {}


def renamed(tensors: Params, *, naming: str, network: str) -> Params:
    """Returns tensors under our names, in our layout.

    Args:
        tensors: By the names of their source.
        naming: Whose names they are.
        network: Our network, `model.name`.

    Raises:
        ConfigError: None of the tensors has a counterpart in the network.
    """
    if naming == "dpsgd":
        return tensors
    return _map_of(naming, network)(tensors)


def read_named(init_from: str, *, network: str) -> Params:
    """Downloads the weights of a library's network, unless they are cached.

    Args:
        init_from: `torchvision:NAME` or `timm:NAME`; a torchvision name may end in
            `.WEIGHTS`, as in `torchvision:resnet50.IMAGENET1K_V2`.
        network: Our network, `model.name`, which must have counterparts.

    Raises:
        ConfigError: The library or the name is unknown, or does not fit the network.
        CheckpointError: The download failed.
    """
    _map_of(init_from, network)  # before anything is downloaded
    library, _, name = init_from.partition(":")
    read = {"torchvision": _read_torchvision, "timm": _read_timm}[library]
    try:
        return dict(read(name))
    except ImportError as error:
        rule = f"needs the package {library}"
        remedy = f"pip install {library}"
        raise ConfigError(fault(_FIELD, init_from, rule, remedy)) from error
    except (ValueError, KeyError) as error:
        rule = f"{library} knows no such weights ({error})"
        raise ConfigError(fault(_FIELD, init_from, rule, "check the name")) from error
    except (OSError, RuntimeError) as error:
        rule = f"cannot be had ({' '.join(str(error).split())})"
        remedy = "download it elsewhere and give the file"
        raise CheckpointError(fault(_FIELD, init_from, rule, remedy)) from error


def _map_of(naming: str, network: str) -> Callable[[Params], Params]:
    """Returns what turns one naming into ours."""
    found = NAME_MAPS.get((naming, network))
    if found is None:
        fitting = [source for source, ours in NAME_MAPS if ours == network]
        known = f"known for it: {', '.join(fitting)}" if fitting else "none is known"
        rule = f"no tensor of it has a counterpart in {network}"
        raise ConfigError(fault(_FIELD, naming, rule, known))
    return found


def _read_torchvision(name: str) -> Mapping[str, Any]:
    """Returns a state dict of torchvision."""
    from torchvision.models import get_model_weights

    network, _, which = name.partition(".")
    weights = get_model_weights(network)
    chosen = weights[which] if which else weights["DEFAULT"]
    return dict(chosen.get_state_dict(weights_only=True, check_hash=True))


def _read_timm(name: str) -> Mapping[str, Any]:
    """Returns a state dict of timm, which loads weights alone."""
    import timm

    state: Mapping[str, Any] = timm.create_model(name, pretrained=True).state_dict()
    return state
