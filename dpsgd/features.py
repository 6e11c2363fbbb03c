"""Features of a frozen network: computed once, kept in a file, drawn like examples.

A file holds the features of every view of every training example, so it is as private
as the examples. It belongs to one data set, one set of weights and one way of making
views, and is refused for any other.
"""

import copy
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsgd.checkpoint import read_tensors, write_tensors
from dpsgd.config import (
    Config,
    DataConfig,
    ModelConfig,
    config_to_dict,
    with_later_settings,
)
from dpsgd.data import (
    Dataset,
    Share,
    ViewLoader,
    everything,
    has_room,
    microbatches,
    upload,
)
from dpsgd.errors import CheckpointError, fault, writable
from dpsgd.models import CLASSIFIER, frozen_tensors
from dpsgd.rng import RandomStreams
from dpsgd.trees import Params, sha256

__all__ = ["FeatureCache", "FeatureLoader"]

_FIELD = "runtime.feature_cache"
_FORMAT = 2  # 1 had views by row
_VIEWS_PER_PASS = 512
# By the words of a message: a section, and its settings that change no feature of the
# same data, which a fingerprint tells, and the same weights.
_SECTIONS: Final[dict[str, tuple[type, tuple[str, ...]]]] = {
    "views": (
        DataConfig,
        (
            *("source", "name", "root", "train", "test"),
            *("image_column", "label_column", "user_column", "group_column"),
            *("num_examples", "num_users", "eval_image_size", "fixed_views"),
        ),
    ),
    "network": (ModelConfig, ("init_from", "init_weights", "num_classes")),
}


class FeatureCache:
    """The file of one set of features, read if it is there.

    Attributes:
        identity: Drawn anew for every computation: features with equal ones are equal
            to the last bit.

    Args:
        path: Where the file is, or will be.

    Raises:
        CheckpointError: There is a file, and it is damaged or not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved: tuple[Params, dict[str, Any]] | None = None
        self.identity: str = secrets.token_hex(16)
        with _writing(path):
            is_there = path.exists()
        if is_there:
            try:
                self._saved = read_tensors(path)
                self.identity = self._saved[1]["identity"]
            except (CheckpointError, KeyError) as error:
                rule = "holds no features, or is damaged"
                remedy = "delete it, and it is made anew, or name another"
                raise CheckpointError(fault(_FIELD, path, rule, remedy)) from error

    def load(self, model: nn.Module, dataset: Dataset, config: Config) -> Tensor:
        """Returns the (N, K, F) features of all views of all examples, on the CPU.

        They are computed and written if the file was not there, once it is known that
        it can be.

        Args:
            model: Network, frozen but for its classifier, on the device to compute on.
            dataset: Training examples.
            config: Settings, of which those of views and network are used.

        Raises:
            CheckpointError: The file is of other data, weights, views or network, or
                cannot be written.
        """
        facts = _facts(model, dataset, config)
        if self._saved is None:
            self._try_place()
            features = _computed(model, dataset, config)
            self._write(features, {**facts, "identity": self.identity})
            return features
        tensors, saved = self._saved
        others = [name for name in facts if _comparable(name, saved) != facts[name]]
        if others:
            rule = f"holds features of other {', '.join(others)}"
            remedy = "name another file, and they are computed into it"
            raise CheckpointError(fault(_FIELD, self._path, rule, remedy))
        return tensors["features"]

    def _try_place(self) -> None:
        """Makes the folder, and a file in it for a moment."""
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._part.touch()
            self._part.unlink()

    def _write(self, features: Tensor, facts: dict[str, Any]) -> None:
        """Writes the file whole, even while another process writes it too."""
        write_tensors(self._part, {"features": features}, facts)
        with _writing(self._path):
            self._part.replace(self._path)

    @property
    def _part(self) -> Path:
        """The file while this process writes it."""
        return self._path.with_name(f"{self._path.name}.{os.getpid()}")


class FeatureLoader:
    """Stands for `ViewLoader` where features are drawn in place of views.

    Args:
        features: (N, K, F) of all views of all examples.
        labels: (N,).
        microbatch_size: Examples M of every microbatch; the last one is padded.
        device: Where they are used; they are kept there if there is ample room.
        share: Which of so many drawn examples this process works on.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        microbatch_size: int,
        device: torch.device,
        share: Share = everything,
    ) -> None:
        home = device if has_room(device, features.nbytes) else features.device
        self._features = features.to(home)
        self._labels = labels.to(home)
        self._microbatch_size = microbatch_size
        self._device = device
        self._share = share

    def __call__(
        self, draw: NDArray[np.int64], step: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields features (M, K, F), labels (M,) and mask (M,), False for padding.

        Args:
            draw: Rows of the drawn examples, each once.
            step: Step number; an example has the same views in every step.
        """
        del step
        own = draw[self._share(len(draw))]
        for part in microbatches(own, self._microbatch_size):
            rows = upload(torch.from_numpy(part.rows), self._features.device)
            features = upload(self._features[rows], self._device)
            labels = upload(self._labels[rows], self._device)
            yield features, labels, upload(torch.from_numpy(part.mask), self._device)


def _writing(path: Path) -> AbstractContextManager[None]:
    """Turns what a folder that is none, or locked, raises into a CheckpointError."""
    remedy = "give access to it, or name another file"
    return writable(_FIELD, path, remedy=remedy, kind=CheckpointError)


def _computed(model: nn.Module, dataset: Dataset, config: Config) -> Tensor:
    """Returns the features of the very views that a run without the cache makes."""
    trunk = copy.deepcopy(model)
    setattr(trunk, CLASSIFIER, nn.Identity())
    views_per_example = config.data.augmentation_multiplicity
    load_views = ViewLoader(
        dataset,
        config=config.data,
        streams=RandomStreams.from_seed(None),  # unused: the views are fixed
        microbatch_size=max(1, _VIEWS_PER_PASS // views_per_example),
        dtype=getattr(torch, config.model.compute_dtype),
        device=next(trunk.parameters()).device,
    )
    parts = []
    with torch.no_grad():
        for views, _, mask in load_views(np.arange(len(dataset)), 0):
            features = trunk(views.flatten(0, 1))  # (MK, F)
            features = features.unflatten(0, views.shape[:2])
            parts.append(features[mask].float().cpu())
    return torch.cat(parts)


def _facts(model: nn.Module, dataset: Dataset, config: Config) -> dict[str, Any]:
    """Returns what the features depend on, under the words of a message."""
    settings = config_to_dict(config)
    facts = {
        "format": _FORMAT,
        "data": dataset.fingerprint(),
        "weights": sha256(frozen_tensors(model)),
        "views": settings["data"],
        "network": settings["model"],
    }
    return {name: _comparable(name, facts) for name in facts}


def _comparable(name: str, facts: Mapping[str, Any]) -> Any:
    """Returns a fact, of settings those that may change a feature.

    A file that is older than a setting was written when there was only its default.
    """
    value = facts.get(name)
    if name not in _SECTIONS or value is None:
        return value
    section, free = _SECTIONS[name]
    settings = with_later_settings(value, section)
    return {key: settings[key] for key in settings if key not in free}
