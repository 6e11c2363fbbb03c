"""Training without privacy, for weights that a private run then starts from.

All that such a run does otherwise is in this file: how it samples, what gradient it
takes, and its step. Nothing of it can be accounted, and a private run refuses the step.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from dpsgd.clipping import Execution, LossFn, PassStatistics, RecordedPass
from dpsgd.errors import ConfigError, fault
from dpsgd.optim import update_ema_
from dpsgd.rng import RandomStreams
from dpsgd.run import Run, TrainState
from dpsgd.trees import Params, zeros_like

__all__ = ["NonPrivateStep", "ShuffledSampler", "SummedGrad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShuffledSampler:
    """Draws without replacement: every epoch is a new order of all examples.

    What is left of an epoch that is shorter than a batch is not used in it. A draw is a
    function of the streams' key and the step alone.

    Args:
        num_rows: Rows held.
        batch_size: Examples of every batch, in [1, num_rows].
        streams: The run's random streams; the stream `sampling` is used.

    Raises:
        ConfigError: The batch is larger than the set.
    """

    num_rows: int
    batch_size: int
    streams: RandomStreams

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.num_rows:
            rule = f"must be in [1, {self.num_rows}], the examples that are held"
            value = self.batch_size
            raise ConfigError(
                fault("privacy.expected_batch_size", value, rule, "change it")
            )

    def draw(self, step: int) -> NDArray[np.int64]:
        """Returns the (batch_size,) rows that one step uses, each once."""
        epoch, position = divmod(step, self.num_rows // self.batch_size)
        start = position * self.batch_size
        order = _order(self.streams, epoch, self.num_rows)
        return order[start : start + self.batch_size]


@lru_cache(maxsize=1)
def _order(streams: RandomStreams, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """Returns the order of the rows in one epoch."""
    return streams.generator("sampling", epoch).permutation(num_rows)


class SummedGrad:
    """Sums gradients of whole microbatches, one backward pass each, without a bound.

    Args:
        loss_fn: `loss_fn(params, *example)`, the scalar loss of one example.
        execution: As for `RecordedPass`; speed only.
    """

    def __init__(self, loss_fn: LossFn, *, execution: Execution = "eager") -> None:
        self._loss_fn = loss_fn
        self._run = RecordedPass(self._pass, execution)

    def accumulate(
        self, total: Params, params: Params, *batch: Tensor, mask: Tensor
    ) -> PassStatistics:
        """Adds one microbatch's gradient to `total` in place.

        Args:
            total: Float32 leaves like `params`.
            params: Trainable parameters by name.
            *batch: Tensors whose first axis counts the M examples of the microbatch.
            mask: (M,) bool, False for padding, which contributes zero.

        Returns:
            Losses; no norms, because no example's gradient is looked at.
        """
        return self._run(total, params, *batch, mask)

    def _pass(
        self, total: Params, params: Params, *batch_and_mask: Tensor
    ) -> PassStatistics:
        """Takes the pass, operator by operator."""
        *batch, mask = batch_and_mask
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        in_dims = (None, *(0 for _ in batch))
        with torch.enable_grad():
            losses = vmap(self._loss_fn, in_dims)(leaves, *batch)
            losses = torch.where(mask, losses, 0.0)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        torch._foreach_add_([total[name] for name in leaves], list(grads))
        losses = losses.detach().float()
        none = losses.new_zeros(0)
        finite = torch.isfinite(losses)
        return PassStatistics(losses, none, (mask & ~finite).sum(), mask.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class NonPrivateStep:
    """Takes one step of ordinary training: the mean gradient of a shuffled batch.

    Args:
        sampler: Which examples a step uses.
        grad_fn: Sums their gradients.
    """

    sampler: ShuffledSampler
    grad_fn: SummedGrad

    def __call__(self, run: Run, state: TrainState) -> list[PassStatistics]:
        """Changes the state as `train_step` does, but for all that is private in it.

        Args:
            run: A run without privacy.
            state: Where it is.

        Returns:
            What each pass saw.

        Raises:
            ValueError: The run is a private one, whose account would be void.
        """
        if run.config.privacy.enabled:
            rule = "this step clips nothing and adds no noise"
            raise ValueError(fault("privacy.enabled", True, rule, "use train_step"))
        batch = self.sampler.draw(state.step)
        with run.layout.gathered(state.params) as params:
            grads = zeros_like(params)
            passes = [
                self.grad_fn.accumulate(grads, params, *part, mask=mask)
                for *part, mask in run.load_views(batch, state.step)
            ]
        grads = run.layout.total(grads)
        torch._foreach_div_(list(grads.values()), float(len(batch)))
        state.optimizer.step(grads, step=state.step)
        average = run.config.ema
        if state.ema is not None and average.decay is not None:
            update_ema_(
                state.ema,
                state.params,
                step=state.step,
                decay=average.decay,
                warmup=average.warmup,
            )
        state.step += 1
        return passes
