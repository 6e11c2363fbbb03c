"""What a run is made of, what training changes, and what it tells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from dpsgd.clipping import ClippedGrad, PassStatistics
from dpsgd.config import Config
from dpsgd.data import LoadViews, PoissonSampler
from dpsgd.errors import fault
from dpsgd.evaluate import Evaluation
from dpsgd.optim import Optimizer, SecureNoise
from dpsgd.parallel import Layout, Ranks
from dpsgd.privacy import DPSGDMechanism, PrivacyLedger
from dpsgd.rng import RandomStreams
from dpsgd.trees import Params

__all__ = [
    "EvaluationRecord",
    "Observer",
    "Outcome",
    "Run",
    "StepRecord",
    "TrainState",
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
