"""Algorithm 1 of Abadi et al. 2016 with the recipe of De et al. 2022, on one page.

`train_step` is the algorithm; `train` repeats it, saves, evaluates and tells observers.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from dpsgd.clipping import PassStatistics
from dpsgd.data import LoadAhead
from dpsgd.errors import UserError, fault
from dpsgd.optim import noisy_descent_
from dpsgd.run import (
    EvaluationRecord,
    Observer,
    Outcome,
    Run,
    StepRecord,
    TrainState,
)
from dpsgd.trees import all_finite, zeros_like

__all__ = ["train", "train_step"]


def train_step(run: Run, state: TrainState) -> list[PassStatistics]:
    """Takes one step: one draw, one noise, one update, one composition.

    Returns:
        What each pass saw. Unprotected.

    Source: Abadi et al. 2016, Algorithm 1 (arXiv:1607.00133), its lines quoted; the
    views, averaged inside each example's loss, and the parameter average: De et al.
    2022 (arXiv:2204.13650).
    """
    # "Take a random sample L_t with sampling probability L/N"
    draw = run.sampler.draw(state.step)
    # "Compute gradient", "Clip gradient", and their sum over this rank's share
    dtype = torch.float32 if run.secure_noise is None else torch.float64
    with run.layout.gathered(state.params) as params:
        clipped_sum = zeros_like(params, dtype)
        passes = [
            run.grad_fn.accumulate(clipped_sum, params, *batch, mask=mask)
            for *batch, mask in run.load_views(draw, state.step)
        ]
    # The sum over all ranks, once, and never their mean
    clipped_sum = run.layout.total(clipped_sum)
    # "Add noise", divide by the expected batch size L, "Descent"; then the average
    noisy_descent_(
        clipped_sum,
        run.mechanism,
        state.optimizer,
        l2_sensitivity=run.grad_fn.l2_sensitivity,
        noise_key=run.streams.noise_key(state.step),
        secure_noise=run.secure_noise,
        offsets=run.layout.offsets,
        step=state.step,
        ema=state.ema,
        ema_decay=run.config.ema.decay,
        ema_warmup=run.config.ema.warmup,
    )
    state.step += 1
    return passes


def train(
    run: Run,
    state: TrainState,
    observers: Sequence[Observer] = (),
    *,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains until the steps or the budget are spent, or a stop is requested.

    No evaluation leaves this function before a checkpoint holds its step, so that
    what is repeated after a crash was never shown to anyone; nor does the news that it
    diverged. (Unprotected values do, if they are asked for; no guarantee speaks of
    them.)

    Args:
        run: Parts of the run.
        state: Where to start; changed in place.
        observers: Told of every step and evaluation.
        stop_requested: Asked after every step; True saves and returns. Ranks agree.

    Raises:
        UserError: The parameters or the test loss are no longer finite.
        CheckpointError: A checkpoint could not be written; earlier ones are intact.
    """
    take_step = run.unaccounted_step or train_step
    ahead = LoadAhead(run.load_views)
    run = replace(run, load_views=ahead)
    watch = _Stopwatch(state)
    _begin(run, state, observers)
    while state.step < run.ledger.max_steps:
        run.ledger.require(state.step + 1)
        watch.skip()
        passes = take_step(run, state)
        if take_step is train_step and state.step < run.ledger.max_steps:
            ahead.begin(run.sampler.draw(state.step), state.step)
        _check_finite(run, state)  # waits for the device
        watch.count_step()
        record = _step_record(run, state, passes)
        for observer in observers:
            observer.on_step(record)
        stopping = stop_requested()
        evaluating = _evaluates_at(run, state.step)
        if stopping or evaluating or _saves_at(run, state.step):
            run.save(state)
        if evaluating:
            _evaluate(run, state, observers)
        if stopping and state.step < run.ledger.max_steps:
            return "interrupted"
    watch.skip()
    return "finished" if state.step >= run.mechanism.num_steps else "budget_spent"


def _begin(run: Run, state: TrainState, observers: Sequence[Observer]) -> None:
    """Saves before the first step; later repeats what may not have been told."""
    if state.step == 0:
        run.save(state)  # a run killed in its first steps can go on, too
        return
    _check_finite(run, state)
    if _evaluates_at(run, state.step):
        _evaluate(run, state, observers)


class _Stopwatch:
    """Books the time that passes on a state.

    Args:
        state: Where it is booked.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._is_warm = False
        self._last = time.perf_counter()

    def skip(self) -> None:
        """Books the time since the last call on anything but steps."""
        self._lap()

    def count_step(self) -> None:
        """Books the time since the last call on the step just taken."""
        seconds = self._lap()
        self._state.train_seconds += seconds
        if self._is_warm:
            self._state.timed_steps += 1
            self._state.timed_seconds += seconds
        self._is_warm = True

    def _lap(self) -> float:
        """Books and returns the seconds since the last call."""
        before, self._last = self._last, time.perf_counter()
        self._state.wall_seconds += self._last - before
        return self._last - before


def _evaluates_at(run: Run, step: int) -> bool:
    """Returns whether the test set is measured after `step` steps."""
    return step % run.config.eval.every == 0 or step == run.ledger.max_steps


def _saves_at(run: Run, step: int) -> bool:
    """Returns whether a checkpoint is due after `step` steps."""
    return step % run.config.runtime.checkpoint_every == 0


def _evaluate(run: Run, state: TrainState, observers: Sequence[Observer]) -> None:
    """Measures both weights, keeps the best, and tells observers."""
    record = EvaluationRecord(
        step=state.step,
        epsilon=run.ledger.epsilon_spent(state.step),
        train_seconds=state.train_seconds,
        views_per_second=run.views_per_second(state),
        last=run.evaluate(state.params),
        ema=run.evaluate(state.ema) if state.ema is not None else None,
    )
    if record.best_accuracy > state.best_accuracy:
        state.best_accuracy = record.best_accuracy
        run.keep_best(state.step)
    for observer in observers:
        observer.on_evaluation(record)
    losses = [one.loss for one in (record.last, record.ema) if one is not None]
    if not all(math.isfinite(loss) for loss in losses):
        raise _diverged(run, state, "test loss")


def _check_finite(run: Run, state: TrainState) -> None:
    """Raises if training has diverged; parameters are private, so looking is free.

    To say so shows the step, which must not be taken again: it is saved before.
    """
    if run.ranks.any(not all_finite(state.params)):
        run.save(state)
        raise _diverged(run, state, "parameters")


def _diverged(run: Run, state: TrainState, what: str) -> UserError:
    """Returns the error for values that are no longer finite."""
    rate = run.config.optimizer.learning_rate
    rule = f"training diverged: the {what} held inf or NaN after step {state.step}"
    remedy = "lower the learning rate and start a new run"
    return UserError(fault("optimizer.learning_rate", rate, rule, remedy))


def _step_record(
    run: Run, state: TrainState, passes: Sequence[PassStatistics]
) -> StepRecord:
    """Describes the step just taken."""
    asked = run.config.report.unprotected_metrics
    return StepRecord(
        step=state.step,
        epsilon=run.ledger.epsilon_spent(state.step),
        views_per_second=run.views_per_second(state),
        unprotected=_unprotected(run, passes) if asked else None,
    )


def _unprotected(run: Run, passes: Sequence[PassStatistics]) -> dict[str, float]:
    """Summarises values that noise does not protect, over all ranks."""
    bound = run.mechanism.clipping_norm
    sums = torch.zeros(1, 5, dtype=torch.float64)
    if passes:  # the device is waited for once, not after every pass
        sums = torch.stack([one.sums(bound) for one in passes])
    realized, left_out, *totals = run.ranks.total(sums.sum(0).cpu()).tolist()
    if not realized:
        return {"realized_batch_size": 0.0}
    loss, norm, clipped = (total / realized for total in totals)
    values = {
        "realized_batch_size": realized,
        "train_loss": loss,
        "num_nonfinite": left_out,
    }
    if run.config.privacy.enabled:
        values |= {"mean_gradient_norm": norm, "clipped_share": clipped}
    return values
