"""The privacy statement of a run, in plain words, as a model card needs it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from dpsgd.privacy import ACCOUNTANTS
from dpsgd.report.runs import RunRecord
from dpsgd.report.words import (
    NOT_RECORDED,
    count,
    epsilon_in_words,
    setting_in_words,
    significant,
    steps_in_words,
)

__all__ = ["Standing", "Statement", "joint_epsilon", "statement_of"]

Standing = Literal["private", "unfinished", "seeded", "none", "unknown"]

# By neighbours and unit: what is hidden, two such training sets, which those are.
_UNITS: Final = {
    ("add-or-remove-one", "example"): (
        "one training example with its label",
        "Take any two training sets, of which one holds one more example than the "
        "other.",
        "training sets that differ by one example, added or removed; replacing one "
        "counts as two such changes, up to twice the epsilon",
    ),
    ("add-or-remove-one", "user"): (
        "one user, with all its training examples and their labels",
        "Take any two training sets, of which one holds one more user than the other, "
        "with all examples of that user.",
        "training sets that differ by one user with all its examples, added or "
        "removed; replacing one counts as two such changes, up to twice the epsilon",
    ),
}
_NOISE: Final = {
    "standard": "standard: float32, from a keyed statistical generator",
    "secure": "secure: drawn from the operating system, rounded exactly to a grid",
}
_CORRELATED: Final = {
    "example": (
        "Correlated examples",
        "ten photographs of one person are ten examples, each protected as one",
    ),
    "user": (
        "Correlated users",
        "users are told apart by the column that names them: two names of one person "
        "are two users, each protected as one",
    ),
}
_OF_NOISE: Final = {
    "standard": (
        (
            "Floating point",
            "float32 noise from a statistical generator; attacks on low-order bits "
            "are not ruled out",
        ),
        ("checkpoints/", "they hold the key of the noise and must stay secret"),
    ),
    "secure": (
        (
            "Randomness",
            "the operating system's generator is trusted; draws and views follow from "
            "a secret key by Philox, which is not cryptographic",
        ),
        ("checkpoints/", "they hold the key of the draws and must stay secret"),
    ),
}
_FALSE_ALARMS: Final = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """What may be said of a run's privacy.

    Attributes:
        standing: Whether there is a guarantee, and if not why.
        headline: The guarantee in one line, or that there is none.
        paragraphs: What it means.
        facts: (name, value) rows of how it is reached.
        not_covered: (what, why) of what it does not speak of.
    """

    standing: Standing
    headline: str
    paragraphs: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    not_covered: tuple[tuple[str, str], ...]


def statement_of(run: RunRecord) -> Statement:
    """Returns the statement of a run, from what the run itself recorded."""
    standing = _standing(run)
    return Statement(
        standing=standing,
        headline=_headline(run, standing),
        paragraphs=_paragraphs(run, standing),
        facts=_facts(run, standing),
        not_covered=() if standing == "none" else _not_covered(run),
    )


def joint_epsilon(runs: Sequence[RunRecord]) -> tuple[float, float] | None:
    """Returns epsilon and delta of several runs on the same private data together.

    Each run counts with all its planned steps, so that those that are unfinished may
    go on. By basic composition, which holds even if later settings were chosen by
    looking at earlier results.

    Returns:
        (epsilon, delta), of which epsilon is infinite if that of any run is; None if
        a run has not recorded one of them, or if the runs do not protect the same
        unit: then there is no one guarantee to add up.
    """
    spent = [_largest_epsilon(run) for run in runs]
    deltas = [run.number("delta") for run in runs]
    if math.inf in spent:  # whatever the others are
        return math.inf, math.fsum(filter(None, deltas))
    if len({run.unit for run in runs}) > 1 or None in spent or None in deltas:
        return None
    return math.fsum(filter(None, spent)), math.fsum(filter(None, deltas))


def _largest_epsilon(run: RunRecord) -> float | None:
    """Returns what a run has spent, or will have if it is not finished."""
    return run.epsilon if run.is_finished else run.planned_epsilon


def _standing(run: RunRecord) -> Standing:
    """Returns whether a run has a guarantee."""
    bound = run.epsilon if run.is_finished else run.planned_epsilon
    if bound == math.inf:
        return "none"
    if run.is_seeded:
        return "seeded"
    if bound is None or run.number("delta") is None:
        return "unknown"
    return "private" if run.is_finished else "unfinished"


def _guarantee(epsilon: float | None, run: RunRecord) -> str:
    """Returns the guarantee as a formula."""
    return f"({epsilon_in_words(epsilon)}, {significant(run.number('delta'))})"


def _headline(run: RunRecord, standing: Standing) -> str:
    """Returns the one line that is read if nothing else is."""
    if standing == "none":
        return "NO privacy guarantee"
    if standing == "unknown":
        return "No guarantee is recorded"
    if standing == "seeded":
        return "Not to be released as private: the run was seeded"
    if standing == "unfinished":
        return "Not finished: there are no weights to release yet"
    return f"{_guarantee(run.epsilon, run)}-differential privacy per {run.unit}"


def _paragraphs(run: RunRecord, standing: Standing) -> tuple[str, ...]:
    """Returns what the headline means."""
    if standing == "none":
        return (
            "Training added no noise that an account could use: epsilon is infinite. "
            "Nothing limits what the weights tell about single training examples.",
        )
    if standing == "unknown":
        return (
            "This run directory does not say what was promised or spent. "
            "bin/dpsgd-privacy computes it from sample rate, noise and steps.",
        )
    bound = run.epsilon if run.is_finished else run.planned_epsilon
    meaning = _meaning(run, bound or 0.0)
    if standing == "seeded":
        seed = setting_in_words(run.setting("train", "seed"))
        return (
            f"Its noise follows from train.seed={seed}, which stands in the settings: "
            "whoever knows it can compute the noise and take it away. Train again "
            "without a seed before anything is released.",
            f"The same run without a seed would be {_guarantee(bound, run)}-"
            f"differentially private per {run.unit}. {meaning}",
        )
    if standing == "unfinished":
        return (
            f"Once finished, the run will be {_guarantee(bound, run)}-differentially "
            f"private per {run.unit}; {_spent(run)}.",
            meaning,
        )
    return (meaning,)


def _spent(run: RunRecord) -> str:
    """Returns what an unfinished run had spent when it was last evaluated."""
    if run.epsilon is None:
        return "what it has spent is recorded with the first evaluation"
    spent = epsilon_in_words(run.epsilon)
    return f"an epsilon of {spent} was spent at the last evaluation, step {run.step:,}"


def _meaning(run: RunRecord, epsilon: float) -> str:
    """Returns the definition, applied to this run's figures."""
    adjacency = run.text("adjacency")
    kind = adjacency or f"of which kind is {NOT_RECORDED}"
    general = f"Take any two neighbouring training sets ({kind})."
    _, pair, _ = _UNITS.get((adjacency or "", run.unit), ("", general, ""))
    factor = math.exp(min(epsilon, 700.0))
    times = f"{math.ceil(factor):,}" if factor < 1e6 else f"{factor:.1e}"
    if factor < 100:
        times = f"{math.ceil(100 * factor) / 100:.2f}"
    delta = significant(run.number("delta"))
    return (
        f"{pair} Whatever anyone computes from the released weights, its probability "
        f"differs between the two by a factor of at most exp("
        f"{epsilon_in_words(epsilon)}), about {times}, apart from events of total "
        f"probability {delta}."
    )


def _facts(run: RunRecord, standing: Standing) -> tuple[tuple[str, str], ...]:
    """Returns how the guarantee is reached, in words."""
    rows = () if standing == "none" else _guarantee_facts(run, standing)
    rows += _step_facts(run) if run.has_mechanism else _unprotected_step_facts(run)
    rows += (
        ("Steps", steps_in_words(run.step, run.planned_steps, run.checkpoint_step)),
        ("Training set", _training_set(run)),
    )
    if standing == "private":
        rows += (
            ("Against attacks", _membership(run)),
            ("Released", "model.safetensors, and all that is computed from it"),
        )
    return rows


def _training_set(run: RunRecord) -> str:
    """Returns the size of the training set in words."""
    size = run.number(f"num_{run.unit}s")
    if size is None:
        return NOT_RECORDED
    return f"{count(size)} {run.unit}s, as declared"


def _step_facts(run: RunRecord) -> tuple[tuple[str, str], ...]:
    """Returns what a step of a private run does."""
    return (
        (
            "Sampling",
            f"Poisson: each step takes each {run.unit} independently with probability "
            f"{significant(run.number('sample_rate'))}{_of_users(run)}",
        ),
        ("Mechanism", _mechanism(run)),
    )


def _unprotected_step_facts(run: RunRecord) -> tuple[tuple[str, str], ...]:
    """Returns what a step does with privacy.enabled=false."""
    size = count(run.number("expected_batch_size"))
    return (
        ("Sampling", f"batches of {size}, every epoch in a new order"),
        ("Mechanism", "none: gradients are neither clipped nor noised"),
    )


def _of_users(run: RunRecord) -> str:
    """Returns how many examples a user takes part with, where users are the unit."""
    if run.unit != "user":
        return ""
    most = run.setting("privacy", "max_examples_per_user")
    return (
        f", with at most {most or NOT_RECORDED} of its examples, drawn anew each time"
    )


def _guarantee_facts(run: RunRecord, standing: Standing) -> tuple[tuple[str, str], ...]:
    """Returns what is guaranteed, to whom."""
    adjacency = run.text("adjacency") or NOT_RECORDED
    unknown = (NOT_RECORDED, "", adjacency)
    unit, _, neighbours = _UNITS.get((adjacency, run.unit), unknown)
    views = run.setting("data", "augmentation_multiplicity")
    if isinstance(views, int) and views > 1 and unit != NOT_RECORDED:
        each = "it" if run.unit == "example" else "each"
        unit = f"{unit}, and all {views} augmented views of {each}"
    epsilon = f"{epsilon_in_words(run.epsilon)} (certified upper bound)"
    if standing == "unfinished":
        planned = epsilon_in_words(run.planned_epsilon)
        epsilon = f"{planned} once finished (certified upper bound); {_spent(run)}"
    elif standing == "seeded":
        bound = run.epsilon if run.is_finished else run.planned_epsilon
        epsilon = (
            f"{epsilon_in_words(bound)} (certified upper bound), only towards those "
            "who do not know the seed"
        )
    return (
        ("Unit of privacy", unit),
        ("Neighbours", neighbours),
        ("Epsilon", epsilon),
        ("Delta", significant(run.number("delta"))),
        ("Accountant", _accountant(run)),
        ("Noise", _NOISE.get(run.noise, run.noise)),
    )


def _accountant(run: RunRecord) -> str:
    """Returns who certified epsilon, and how, as far as this version knows it."""
    name = run.text("accountant") or NOT_RECORDED
    known = ACCOUNTANTS.get(name)
    return name if known is None else f"{name}: {known.description}"


def _membership(run: RunRecord) -> str:
    """Returns the guarantee as a limit on telling who was in the training set."""
    epsilon, delta = run.epsilon or 0.0, run.number("delta") or 0.0
    share = min(
        math.exp(min(epsilon, 700.0)) * _FALSE_ALARMS + delta,
        1 - math.exp(-epsilon) * (1 - delta - _FALSE_ALARMS),
    )
    shown = min(100.0, math.ceil(1e4 * share) / 100)
    return (
        f"whoever tells from the weights whether one {run.unit} was trained on, with "
        f"{100 * _FALSE_ALARMS:.0f} % false alarms, finds one that was with a "
        f"probability of at most {shown:.2f} %"
    )


def _mechanism(run: RunRecord) -> str:
    """Returns one step in words."""
    multiplier = run.number("noise_multiplier")
    noise = f"{run.noise} Gaussian noise"
    if multiplier is None:
        noise = f"{noise} whose multiplier is not recorded"
    elif multiplier == 0:
        noise = "no noise is added"
    else:
        noise = f"{noise} of {significant(multiplier)} times the sensitivity"
    return (
        f"gradients clipped to L2 norm {significant(run.number('clipping_norm'))} per "
        f"{run.unit} and summed; {noise}; divided by the expected batch size "
        f"{count(run.number('expected_batch_size'))}"
    )


def _not_covered(run: RunRecord) -> tuple[tuple[str, str], ...]:
    """Returns what the guarantee does not speak of."""
    rows = [
        (
            "Choosing settings on the private data",
            "every run on them spends its own epsilon, also those that are thrown away",
        ),
        (
            "Declared constants",
            "the size of the training set, its classes, and the mean and deviation "
            "that pixels are normalised by are taken as public",
        ),
        ("The test set", "accuracies are exact: it is treated as public"),
        (
            "Times",
            "how long steps take follows the random sizes of the batches; speed and "
            "times on this page are averages of them",
        ),
        _CORRELATED.get(run.unit, _CORRELATED["example"]),
        *_OF_NOISE.get(run.noise, _OF_NOISE["standard"]),
    ]
    if run.setting("model", "init_from") is not None:
        rows.insert(
            0,
            (
                "The weights it started from",
                "the data that they were trained on count as public",
            ),
        )
    if run.num_unprotected:
        rows.append(
            (
                "metrics.jsonl",
                f"holds {count(run.num_unprotected)} records of values that no noise "
                "protects; they are left out here, and must not be published",
            )
        )
    return tuple(rows)
