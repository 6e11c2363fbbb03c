"""Algorithm 1 of Abadi et al. 2016 with the recipe of De et al. 2022, on one page.

`train_step` is the algorithm; `train` repeats it, saves, evaluates and tells observers.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from dpsgd.clipping import ClippedGrad, PassStatistics
from dpsgd.config import Config
from dpsgd.data import LoadAhead, LoadViews, PoissonSampler
from dpsgd.errors import UserError, fault
from dpsgd.evaluate import Evaluation
from dpsgd.optim import Optimizer, SecureNoise, noisy_descent_
from dpsgd.parallel import Layout, Ranks
from dpsgd.privacy import DPSGDMechanism, PrivacyLedger
from dpsgd.rng import RandomStreams
from dpsgd.trees import Params, zeros_like

__all__ = [
    "EvaluationRecord",
    "Observer",
    "Outcome",
    "Run",
    "StepRecord",
    "TrainState",
    "train",
    "train_step",
]

Outcome = Literal["finished", "interrupted", "budget_spent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The parts of a run, each built once and handed to all who need it.

    Attributes:
        config: Settings.
        mechanism: What is guaranteed; nobody recomputes a member.
        ledger: What has been spent, and may be.
        streams: Random streams.
        sampler: "Take a random sample".
        load_views: Turns a draw into microbatches of views, of this rank's share.
        grad_fn: "Compute gradient", "Clip gradient".
        secure_noise: Noise in place of that of the streams; None keeps theirs.
        layout: Where parameters lie, and how ranks sum.
        frozen: Tensors of the network that no step changes.
        evaluate: Measures weights that lie like parameters on the public test set.
        save: Writes a checkpoint of a state.
        keep_best: Marks the checkpoint of a step as the best.
        unaccounted_step: Stands for `train_step` in a run without privacy, which uses
            neither sampler nor grad_fn; None in every other.
    """

    config: Config
    mechanism: DPSGDMechanism
    ledger: PrivacyLedger
    streams: RandomStreams
    sampler: PoissonSampler
    load_views: LoadViews
    grad_fn: ClippedGrad
    secure_noise: SecureNoise | None
    layout: Layout
    frozen: Params
    evaluate: Callable[[Params], Evaluation]
    save: Callable[["TrainState"], None]
    keep_best: Callable[[int], None]
    unaccounted_step: Callable[["Run", "TrainState"], list[PassStatistics]] | None

    def __post_init__(self) -> None:
        """Raises if a part would do other than what is accounted."""
        for what, part, accounted in (
            ("sample_rate", self.sampler.sample_rate, self.mechanism.sample_rate),
            (
                "l2_sensitivity",
                self.grad_fn.l2_sensitivity,
                self.mechanism.l2_sensitivity,
            ),
            ("mechanism", self.ledger.mechanism, self.mechanism),
            ("noise", self._noise, self.config.privacy.noise),
            ("privacy", self.unaccounted_step is None, self.config.privacy.enabled),
            # Every rank would draw its own from the operating system.
            ("ranks", self.ranks.size if self.secure_noise else 1, 1),
        ):
            if part != accounted:
                rule = f"the mechanism has {accounted}"
                raise ValueError(fault(what, part, rule, "build both from one"))

    @property
    def ranks(self) -> Ranks:
        """The processes that train."""
        return self.layout.ranks

    @property
    def _noise(self) -> str:
        """Which noise is added, as the settings call it."""
        return "standard" if self.secure_noise is None else "secure"

    def views_per_second(self, state: "TrainState") -> float:
        """Returns expected views over the time that steps take once warmed up."""
        views = self.config.views_per_unit
        views_per_step = self.mechanism.expected_batch_size * views
        if state.timed_steps == 0:
            return views_per_step * state.step / max(state.train_seconds, 1e-9)
        return views_per_step * state.timed_steps / max(state.timed_seconds, 1e-9)


@dataclass(kw_only=True, slots=True)
class TrainState:
    """What training changes.

    Attributes:
        step: Steps taken, each paid for.
        params: Trainable parameters, float32; this rank's part of them.
        ema: Their average, or None.
        optimizer: Update rule with its momenta.
        best_accuracy: Highest test accuracy evaluated so far, -1 before the first.
        train_seconds: Time spent in steps, over all pieces of the run.
        timed_steps: Steps but for the first of each piece, which warms up.
        timed_seconds: Time spent in those.
        wall_seconds: Time spent in steps, checkpoints and evaluations.
    """

    step: int
    params: Params
    ema: Params | None
    optimizer: Optimizer
    best_accuracy: float = -1.0
    train_seconds: float = 0.0
    timed_steps: int = 0
    timed_seconds: float = 0.0
    wall_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step, for observers.

    Attributes:
        step: Steps taken.
        epsilon: Upper bound spent after them.
        views_per_second: Expected views a step over the mean seconds a step.
        unprotected: Values without noise, if asked for; the guarantee leaves them out.
    """

    step: int
    epsilon: float
    views_per_second: float
    unprotected: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """One evaluation, for observers.

    Attributes:
        step: Steps taken.
        epsilon: Upper bound spent after them.
        train_seconds: Time spent in steps.
        views_per_second: Expected views a step over the mean seconds a step.
        last: Of the parameters as they are.
        ema: Of their average, or None.
    """

    step: int
    epsilon: float
    train_seconds: float
    views_per_second: float
    last: Evaluation
    ema: Evaluation | None

    @property
    def best_accuracy(self) -> float:
        """The better of the two accuracies, in [0, 1]."""
        return max(self.last.accuracy, self.ema.accuracy if self.ema else 0.0)


class Observer(Protocol):
    """Is told what happens; can change nothing."""

    def on_step(self, record: StepRecord) -> None:
        """Called after every step."""
        ...

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Called after every evaluation, whose checkpoint is on disk by then."""
        ...


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
    kind = torch.float32 if run.secure_noise is None else torch.float64
    with run.layout.gathered(state.params) as params:
        clipped_sum = zeros_like(params, kind)
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
    what is repeated after a crash was never shown to anyone. (Unprotected values do,
    if they are asked for; no guarantee speaks of them.)

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
    if state.step == 0:
        run.save(state)  # a run killed in its first steps can go on, too
    elif _evaluates_at(run, state.step):
        _evaluate(run, state, observers)  # the run ended before this was recorded
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
    """Raises if training has diverged; parameters are private, so looking is free."""
    norms = torch.stack(torch._foreach_norm(list(state.params.values())))
    if run.ranks.any(not torch.isfinite(norms).all()):
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
