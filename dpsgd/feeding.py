"""What a draw of the training set is turned into: views, or features of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dpsgd.config import Config
from dpsgd.data import (
    Dataset,
    LoadViews,
    Share,
    UserViewLoader,
    ViewLoader,
    num_decode_workers,
)
from dpsgd.features import FeatureCache, FeatureLoader
from dpsgd.models import Network
from dpsgd.planning import Plan
from dpsgd.rng import RandomStreams

__all__ = ["Feed", "feed_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """The training set, and what stands for the views of its examples.

    Attributes:
        config: Settings.
        dataset: Training set.
        cache: Features that stand for views; None makes views.
    """

    config: Config
    dataset: Dataset
    cache: FeatureCache | None

    @property
    def features(self) -> str | None:
        """Identity of the cached features that stand for views, if any do."""
        return self.cache.identity if self.cache is not None else None

    @property
    def decoder(self) -> str | None:
        """What turns encoded images into pixels, if they are not held."""
        return self.dataset.decoder

    def loader(
        self, plan: Plan, model: Network, *, streams: RandomStreams, share: Share
    ) -> LoadViews:
        """Returns what turns draws into the arguments of the loss.

        Args:
            plan: Plan of the run.
            model: Its network, on the device.
            streams: Its random streams.
            share: Which of so many drawn units this process works on.

        Raises:
            CheckpointError: The cached features are not of this network and data.
        """
        workers = num_decode_workers(self.config.runtime.decode_workers)
        dataset = self.dataset.placed(plan.device, num_workers=workers)
        if self.cache is not None:
            return FeatureLoader(
                self.cache.load(model, dataset, self.config),
                self.dataset.labels,
                microbatch_size=plan.microbatch_size,
                device=plan.device,
                share=share,
            )
        make_loader: Callable[..., LoadViews] = ViewLoader
        if plan.mechanism.unit == "user":
            most = self.config.privacy.max_examples_per_user
            assert most is not None  # the loader of settings sees to it
            make_loader = partial(UserViewLoader, max_examples=most)
        return make_loader(
            dataset,
            config=self.config.data,
            streams=streams,
            microbatch_size=plan.microbatch_size,
            padded_to=self._smaller_microbatch(plan),
            draws_per_view=model.draws_per_view,
            dtype=getattr(torch, self.config.model.compute_dtype),
            device=plan.device,
            share=share,
        )

    def _smaller_microbatch(self, plan: Plan) -> int | None:
        """Returns a size that the last microbatch of a draw may have as well."""
        # A draw ends, on average, half a microbatch early. Two sizes are worth
        # recording, and tuning a GPU's kernels for; but for secure noise no example's
        # gradient may depend on how many are drawn.
        on_gpu = plan.device.type == "cuda"
        has_two = on_gpu and plan.execution != "compile"
        if not has_two or self.config.privacy.noise != "standard":
            return None
        return math.ceil(plan.microbatch_size / 2)


def feed_of(config: Config, dataset: Dataset) -> Feed:
    """Returns what feeds a run.

    Args:
        config: Settings.
        dataset: Training set.

    Raises:
        CheckpointError: The file of cached features is damaged or not one of ours.
    """
    path = config.runtime.feature_cache
    cache = FeatureCache(Path(path).expanduser()) if path is not None else None
    return Feed(config=config, dataset=dataset, cache=cache)
