"""What would catch us: each function looks at one promise of the training path.

A detector uses public parts alone (a run, its step, its sampler, its ledger), so that
it outlives how they are written. It returns what it measured, and raises `Caught` where
that breaks the promise. `tests/test_planted_defects.py` runs all of them on the code as
it is, and on copies of it with a planted defect.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rank_processes import RankGroup
from scores import (
    mean_size_score,
    noise_score,
    pairwise_score,
    repetition_score,
    size_variance_score,
    step_score,
)
from small_runs import start
from toy_runs import (
    flat,
    released_sum,
    toy_images,
    toy_run,
    toy_sum,
    with_draw,
)

import dpsgd.train
from dpsgd.audit import audit
from dpsgd.data import DataSplits, PoissonSampler
from dpsgd.parallel import Ranks
from dpsgd.privacy import Phase, Trials, estimate_epsilon
from dpsgd.privacy.bounds import gaussian_epsilon
from dpsgd.rng import RandomStreams
from dpsgd.trees import zeros_like

# A sound step fails with probability 6e-5 a statistic; seeds are fixed, so that what
# passes stays so. The planted defects lie twice as far out or more.
ACCEPTED = 4.0
# The same for the largest of some thousand correlations.
ACCEPTED_OF_MANY = 6.0
# Float32 rounding of norms, factors and sums of about 40 gradients of norm 1.
SLACK = 3e-5
WIDTH = 5
QUIET = 1 / 127  # of one number, whose gradient of norm 0.78 is not clipped
SMALLEST = {"model.name": "convnet", "model.depth": 1, "model.groups": 4}

DETECTORS: dict[str, Callable[[], str]] = {}

# Plants, in processes that a detector starts, what is planted in this one.
plant_in_ranks: Callable[[pytest.MonkeyPatch], None] | None = None


class Caught(AssertionError):
    """A promise that does not hold."""


def require(holds: bool, told: str) -> None:
    """Raises Caught, with what was measured, unless a promise holds."""
    if not holds:
        raise Caught(told)


def detector(function: Callable[[], str]) -> Callable[[], str]:
    """Lists a detector by its name."""
    DETECTORS[function.__name__] = function
    return function


@functools.cache
def some_rows(num_rows: int, seed: int = 0) -> NDArray[np.float64]:
    """Rows of length 1, so that every gradient is clipped."""
    rows = np.random.default_rng(seed).uniform(-1, 1, (num_rows, WIDTH))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def summed(draw: list[int], rows: NDArray[np.float64], **changes: int) -> NDArray:
    """What one step without noise releases for a draw."""
    run, state = toy_run(rows, **changes)
    return flat(released_sum(with_draw(run, draw), state))


@detector
def noise_has_the_promised_size() -> str:
    """The same for every draw: none, one, and enough for several microbatches."""
    rows, sigma = some_rows(30), 2.0
    shares = []
    for size in (0, 1, 30):
        run, state = toy_run(rows, noise_multiplier=sigma, num_idle=4_000, seed=size)
        run = with_draw(run, range(size))
        noise = flat(released_sum(run, state)) - toy_sum(rows[:size], num_idle=4_000)
        shares.append(float(noise.std()) / sigma)
        told = f"noise {shares[-1]:.2f} of the promised size, {size} examples drawn"
        require(abs(noise_score(noise, sigma)) < ACCEPTED, told)
    return f"noise {min(shares):.3f} to {max(shares):.3f} of the promised size"


@detector
def noise_does_not_repeat() -> str:
    """Not within a leaf, not from leaf to leaf, not from step to step."""
    run, state = toy_run(
        some_rows(1), noise_multiplier=1.0, num_idle=2_000, num_steps=2
    )
    run = with_draw(run, [])
    noise = np.concatenate([flat(released_sum(run, state)) for _ in range(2)])
    require(bool(noise.any()), "there is no noise")
    score, shift = repetition_score(noise)
    told = f"noise correlates with itself {shift} elements on (score {score:.1f})"
    require(score < ACCEPTED_OF_MANY, told)
    return f"largest correlation has the score {score:.1f}"


@detector
def one_example_moves_the_sum_by_at_most_the_sensitivity() -> str:
    """Alone and in company, in any leaf, with any number of views, of any norm."""
    rng = np.random.default_rng(1)
    quiet = np.tile(np.eye(WIDTH) * QUIET, (4, 1))
    others = np.concatenate([some_rows(20), quiet])
    extremes = rng.uniform(-1, 1, (24, WIDTH)) * rng.uniform(0.05, 1, (24, 1))
    extremes[0] = [0, 0, 0, 1, -1]  # one leaf alone
    extremes[1] = [1, -1, 1, 0, 0]
    shape = {"num_views": 2, "microbatch_size": 64}
    largest = 0.0
    for company in (0, 40):
        without = summed([*range(company)], others, **shape)
        for extreme in extremes:
            rows = np.concatenate([others, extreme[None]])
            moved = summed([*range(company), 40], rows, **shape) - without
            largest = max(largest, float(np.linalg.norm(moved)))
    told = f"one example moved the sum by {largest:.4f} of the sensitivity"
    require(largest <= 1 + SLACK, told)
    require(largest >= 1 - SLACK, f"{told}: it never reached it")
    return told


@detector
def norms_taken_layer_by_layer_bound_every_example() -> str:
    """The ghost engine, which stores no gradient that it could look at again."""
    changes = {
        "runtime.engine": "ghost",
        "privacy.clipping_norm": 0.1,  # below every norm
        "data.augmentation": "crop_flip",
        "data.crop_padding": 1,
        "data.augmentation_multiplicity": 2,
    }
    with tempfile.TemporaryDirectory() as name:
        run, state, _ = start(Path(name), {**SMALLEST, **changes})
    lengths = []
    for row in range(10):
        total = zeros_like(state.params)
        for *batch, mask in run.load_views(np.array([row]), 0):
            run.grad_fn.accumulate(total, state.params, *batch, mask=mask)
        lengths.append(float(np.linalg.norm(flat(total))))
    largest = max(lengths) / run.mechanism.l2_sensitivity
    told = f"a clipped gradient has {largest:.4f} of the sensitivity"
    require(largest <= 1 + SLACK, told)
    require(min(lengths) >= max(lengths) * (1 - SLACK), f"{told}, another has less")
    return told


@detector
def the_sum_is_that_of_single_examples() -> str:
    """No example's part depends on the others of its draw."""
    rows = some_rows(10)
    together = summed([*range(10)], rows, microbatch_size=16)
    alone = np.sum([summed([row], rows) for row in range(10)], axis=0)
    apart = float(np.linalg.norm(together - alone))
    told = f"a draw of 10 and its examples one by one differ by {apart:.1e}"
    require(apart <= 10 * SLACK, told)
    return told


@detector
def padding_contributes_nothing() -> str:
    """A microbatch that is mostly padding sums to what its examples do."""
    rows = some_rows(2)
    padded = summed([1], rows, microbatch_size=8)
    plain = summed([1], rows, microbatch_size=1)
    apart = float(np.linalg.norm(padded - plain))
    told = f"seven rows of padding change the sum by {apart:.1e}"
    require(apart <= SLACK, told)
    return told


@detector
def the_divisor_is_public() -> str:
    """Twice the examples, twice the update."""
    rows = np.repeat(some_rows(1), 8, axis=0)
    sizes = (1, 2, 8)
    lengths = [float(np.linalg.norm(summed([*range(n)], rows))) for n in sizes]
    shown = ", ".join(f"{length:.2f}" for length in lengths)
    told = f"draws of 1, 2 and 8 equal examples sum to {shown}"
    require(bool(np.allclose(lengths, sizes, rtol=SLACK)), told)
    return told


@detector
def draws_are_poisson() -> str:
    """Sizes vary, rows are independent, and steps too."""
    rate, num_rows, num_steps = 0.1, 60, 3_000
    streams = RandomStreams.from_seed(0)
    sampler = PoissonSampler(num_rows=num_rows, sample_rate=rate, streams=streams)
    included = np.zeros((num_steps, num_rows), bool)
    for step in range(num_steps):
        included[step, sampler.draw(step)] = True
    scores = {
        "mean size": mean_size_score(included, rate),
        "variance of sizes": size_variance_score(included, rate),
        "pairs": pairwise_score(included, rate),
        "next step": step_score(included, rate),
    }
    worst = max(scores, key=lambda name: abs(scores[name]))
    told = f"{worst} of draws has the score {scores[worst]:.1f}"
    require(abs(scores[worst]) < ACCEPTED, told)
    return told


@detector
def an_empty_draw_is_noised_and_counted() -> str:
    """It releases noise like any other, and is paid for."""
    run, state = toy_run(some_rows(1), noise_multiplier=1.0, num_idle=1_000)
    released = flat(released_sum(with_draw(run, []), state))
    require(state.step == 1, "an empty draw was not counted")
    told = f"an empty draw released noise of size {released.std():.2f} for 1"
    require(abs(noise_score(released, 1.0)) < ACCEPTED, told)
    return told


def weights_of_ranks(
    ranks: Ranks, mode: str, plant: Callable[[pytest.MonkeyPatch], None] | None
) -> NDArray[np.float64]:
    """The weights after three noisy steps, gathered."""
    with pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
        run, state = toy_run(
            some_rows(12),
            noise_multiplier=1.0,
            num_steps=3,
            ranks=ranks,
            runtime__parallel=mode,
        )
        for _ in range(run.mechanism.num_steps):
            dpsgd.train.train_step(run, state)
        return flat(run.layout.whole(state.params))


@detector
def two_ranks_train_like_one() -> str:
    """The same draw, each example in one share; one sum, one noise, whole or shared."""
    expected = weights_of_ranks(Ranks(), "none", None)
    apart = {}
    with contextlib.closing(RankGroup(2)) as group:
        for mode in ("ddp", "fsdp"):
            for rank, found in enumerate(group(weights_of_ranks, mode, plant_in_ranks)):
                name = f"rank {rank} of 2, {mode},"
                require(not isinstance(found, str), f"{name} ended: {found}")
                apart[name] = float(np.abs(found - expected).max())
    worst = max(apart, key=lambda name: apart[name])
    told = f"{worst} differs from one process by {apart[worst]:.1e}"
    require(apart[worst] <= SLACK, told)
    return told


@detector
def a_resumed_run_takes_only_the_steps_that_are_left() -> str:
    """What was taken before is remembered, so that the sum is what was paid for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, state, _ = start(folder, SMALLEST)
        dpsgd.train.train(run, state, stop_requested=lambda: state.step == 3)
        before = state.step
        _, resumed, _ = start(folder, SMALLEST, resume=True)
        taken = before + run.ledger.max_steps - resumed.step
    told = f"{taken} steps are taken, {run.mechanism.num_steps} are accounted for"
    require(taken == run.mechanism.num_steps, told)
    return told


@detector
def epsilon_is_that_of_the_declared_size() -> str:
    """The account states no less than the settings spend, by another computation."""
    with tempfile.TemporaryDirectory() as name:
        run, _, plan = start(Path(name), {"privacy.expected_batch_size": 512})
    privacy, declared = run.config.privacy, 1_437
    rate, steps = privacy.expected_batch_size / declared, run.config.train.num_steps
    require(run.sampler.sample_rate == rate, f"rows are drawn at {run.sampler}")
    phase = Phase(rate, privacy.noise_multiplier or 0.0, steps)
    spent = estimate_epsilon([phase], privacy.delta)
    assert spent is not None
    stated = min(plan.epsilon.upper, run.ledger.epsilon_exactly(steps))
    told = f"epsilon {stated:.4f} is stated, {spent:.4f} is spent"
    require(stated >= spent, told)
    return told


def step_trials(num_steps: int, *, num_canaries: int = 200) -> Trials:
    """Scores of single steps with noise 1, each of one example and of none.

    Each canary has a coordinate of its own, as do as many that are absent, so that one
    step is as many trials, independent if the noise of coordinates is; that it is, is
    what `noise_does_not_repeat` looks at.
    """
    rows = np.eye(num_canaries, 2 * num_canaries + 2)
    run, state = toy_run(
        rows,
        noise_multiplier=1.0,
        sample_rate=1.0,
        num_steps=num_steps,
        microbatch_size=num_canaries,
    )
    released = np.array([flat(released_sum(run, state)) for _ in range(num_steps)])
    present, absent, _ = np.split(released, [num_canaries, 2 * num_canaries], axis=1)
    return Trials(with_canary=present.ravel(), without=absent.ravel())


@detector
def trials_of_a_step_do_not_pass_its_epsilon() -> str:
    """Thousands of steps with one example and without show no more than is claimed."""
    shown = step_trials(20).epsilon_if_gaussian(delta=1e-5, confidence=0.95)
    claimed = gaussian_epsilon(1.0, 1e-5)
    told = f"trials show epsilon {shown:.2f}, claimed is {claimed:.2f}"
    require(shown <= claimed, told)
    return told


@detector
def canaries_do_not_pass_the_claim() -> str:
    """One run with canaries, through `dpsgd.audit`."""
    rows, num_idle = some_rows(30), 3_000
    run, state = toy_run(
        rows,
        noise_multiplier=4.0,
        sample_rate=1.0,
        num_steps=4,
        num_idle=num_idle,
        microbatch_size=256,
    )
    images = toy_images(rows)
    result = audit(
        run,
        state,
        DataSplits(train=images, test=images),
        num_classes=2,
        num_gradient_canaries=1_000,
        num_image_canaries=0,
        confidence=0.95,
    )
    found = result.canaries["gradients"]
    shown = max(found.epsilon_lower_bound, found.epsilon_if_gaussian)
    told = f"canaries show epsilon {shown:.2f}, claimed is {result.epsilon:.2f}"
    require(not result.is_refuted, told)
    return told
