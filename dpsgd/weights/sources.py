"""Reads weights from where `model.init_from` says, and never runs code from a file."""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpsgd.checkpoint import is_ours, read_tensors
from dpsgd.config import ModelConfig
from dpsgd.errors import CheckpointError, ConfigError, UserError, fault
from dpsgd.report import RunDirectory
from dpsgd.trees import Params
from dpsgd.weights.named import is_named, read_named
from dpsgd.weights.runs import chosen_weights, guarantee_of, network_of, run_weights

__all__ = ["Weights", "read_weights"]

_FIELD = "model.init_from"
# How training scripts wrap a state dict, and what wrappers put before its names.
_WRAPPERS = ("state_dict", "model", "params")
_NAME_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Tensors by the names that their source gives them.

    Attributes:
        source: Where they are from.
        tensors: All of them.
        naming: Whose names they have: `dpsgd`, `jax`, or those of a named network.
        guarantee: What their own training data were promised, in words.
        network: Settings of the network that they are of, as far as they are known.
    """

    source: str
    tensors: Params
    naming: str = "dpsgd"
    guarantee: str = "unknown"
    network: Mapping[str, Any] = field(default_factory=dict)


def read_weights(config: ModelConfig) -> Weights:
    """Reads the weights that `model.init_from` names.

    Args:
        config: The section `model`, with `init_from` set.

    Raises:
        ConfigError: The source is of no known kind, or has no such weights.
        CheckpointError: It is missing, damaged, or holds anything but tensors.
    """
    assert config.init_from is not None
    if is_named(config.init_from):
        tensors = read_named(config.init_from, network=config.name)
        return Weights(
            source=config.init_from, tensors=tensors, naming=config.init_from
        )
    path = Path(config.init_from).expanduser()
    if path.is_dir():
        which = config.init_weights
        tensors, facts = run_weights(
            RunDirectory(path), which, field="model.init_weights"
        )
        return _ours(config, tensors, facts)
    if path.suffix not in _READERS:
        rule = "is neither a run directory nor a file of weights"
        known = ", ".join(_READERS)
        remedy = f"give a folder, a {known} file, torchvision:NAME or timm:NAME"
        raise ConfigError(fault(_FIELD, config.init_from, rule, remedy))
    with _reading(path):
        return _READERS[path.suffix](config, path)


def _ours(config: ModelConfig, tensors: Params, facts: Mapping[str, Any]) -> Weights:
    """Returns the weights of a run of ours."""
    step = facts["step"]
    return Weights(
        source=f"{config.init_from} ({step:,} steps)",
        tensors=tensors,
        guarantee=guarantee_of(facts),
        network=network_of(facts),
    )


def _read_safetensors(config: ModelConfig, path: Path) -> Weights:
    """Reads a safetensors file, of ours or of others."""
    if not is_ours(path):
        return Weights(source=str(config.init_from), tensors=load_file(path))
    tensors, facts = read_tensors(path, remedy="name a whole copy of it")
    which = config.init_weights
    chosen = chosen_weights(tensors, which, field="model.init_weights")
    return _ours(config, chosen, facts)


def _read_torch(config: ModelConfig, path: Path) -> Weights:
    """Reads a state dict that torch saved, without unpickling anything but tensors."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return Weights(source=str(config.init_from), tensors=_state_dict(content))


def _state_dict(content: Any) -> Params:
    """Returns the tensors of a state dict, out of what training scripts wrap it in."""
    while isinstance(content, Mapping):
        wrapper = next((key for key in _WRAPPERS if key in content), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError("it holds no state dict")
    tensors = {}
    for name, leaf in content.items():
        if isinstance(leaf, Tensor):
            for prefix in _NAME_PREFIXES:
                name = str(name).removeprefix(prefix)
            tensors[str(name)] = leaf
    return tensors


def _read_jax(config: ModelConfig, path: Path) -> Weights:
    """Reads arrays by their haiku names, `module/submodule/leaf`."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return Weights(source=str(config.init_from), tensors=tensors, naming="jax")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever a damaged or hostile file raises into a CheckpointError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            fault(_FIELD, path, "no such file", "check the path")
        ) from error
    except zipfile.BadZipFile as error:
        rule = "is damaged, or not the file that its name says"
        raise CheckpointError(
            fault(_FIELD, path, rule, "copy or download it again")
        ) from error
    except Exception as error:  # a parser of foreign bytes may raise anything
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        rule = f"cannot be read as tensors alone ({reason})"
        remedy = "copy it again, or save its state dict as safetensors"
        raise CheckpointError(fault(_FIELD, path, rule, remedy)) from error


_READERS: dict[str, Callable[[ModelConfig, Path], Weights]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npz": _read_jax,
}
