"""From a draw of examples to microbatches of views on the device."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.config import DataConfig
from dpsgd.data.augmentation import draw_views, make_views
from dpsgd.data.dataset import ImageDataset
from dpsgd.data.sampling import microbatches
from dpsgd.rng import RandomStreams

__all__ = ["ViewLoader"]


class ViewLoader:
    """Makes the K views of every drawn example, one microbatch at a time.

    Args:
        dataset: Training examples, on any device.
        config: Augmentation, its multiplicity, and normalisation constants.
        streams: Streams of the run, of which `augmentation` is used.
        microbatch_size: Examples M of every microbatch; the last one is padded.
        dtype: Type of the views.
        device: Where views are made.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        config: DataConfig,
        streams: RandomStreams,
        microbatch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._streams = streams
        self._microbatch_size = microbatch_size
        self._dtype = dtype
        self._device = device

    def __call__(
        self, draw: NDArray[np.int64], step: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields views (M, K, C, H, W), labels (M,) and mask (M,), False for padding.

        An empty draw yields nothing: its sum is zero, and noise is added all the same.

        Args:
            draw: Rows of the drawn examples, each once.
            step: Step number, from which the augmentation follows.
        """
        parameters = draw_views(
            self._streams.generator("augmentation", step),
            len(draw),
            augmentation=self._config.augmentation,
            crop_padding=self._config.crop_padding,
            augmentation_multiplicity=self._config.augmentation_multiplicity,
        ).to(self._device)
        home = self._dataset.images.device
        for microbatch in microbatches(draw, self._microbatch_size):
            rows = torch.from_numpy(microbatch.rows).to(home)
            views = make_views(
                self._dataset.images[rows].to(self._device),
                parameters.microbatch(microbatch.start, len(rows)),
                mean=self._config.mean,
                std=self._config.std,
                dtype=self._dtype,
            )
            labels = self._dataset.labels[rows].to(self._device)
            yield views, labels, torch.from_numpy(microbatch.mask).to(self._device)
