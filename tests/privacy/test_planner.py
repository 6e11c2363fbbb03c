import pytest

from dpsgd.errors import ConfigError
from dpsgd.privacy import Phase, PLDAccountant, RDPAccountant
from dpsgd.privacy.planner import Budget

PLD = PLDAccountant()


def budget(**changes):
    fields = {
        "target_epsilon": 8.0,
        "delta": 1e-5,
        "num_examples": 50_000,
        "clipping_norm": 1.0,
        "accountant": PLD,
    }
    return Budget(**{**fields, **changes})


def test_a_plan_is_certified_to_keep_the_target_and_wastes_little():
    run = budget().plan(4096, 2468)
    assert 2.560747 <= run.noise_multiplier <= 1.0003 * 2.560747  # see test_estimator
    assert 7.998 < run.epsilon <= 8.0
    phase = Phase(4096 / 50_000, run.noise_multiplier, 2468)
    assert run.epsilon == PLD.epsilon([phase], 1e-5).upper


def test_noise_a_coordinate_and_compute_follow_from_the_plan():
    run = budget(clipping_norm=0.5, accountant=RDPAccountant()).plan(2500, 100)
    assert run.noise_per_coordinate == run.noise_multiplier * 0.5 / 2500
    assert run.examples_processed == 250_000
    assert run.epochs == pytest.approx(5.0)


def test_at_equal_compute_a_larger_batch_has_more_noise_in_sum_and_less_on_average():
    small, large = (budget().plan(size, 10 * 50_000 // size) for size in (500, 5000))
    assert small.epochs == large.epochs
    assert small.noise_multiplier < large.noise_multiplier
    assert small.noise_per_coordinate > 2 * large.noise_per_coordinate


def test_epochs_become_the_nearest_numbers_of_steps_at_least_one():
    assert budget().steps_of(4096, [1, 30, 1.01]) == [12, 366]
    assert budget().steps_of(50_000, [0.1, 1, 2]) == [1, 2]


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ConfigError, match=r"^delta=0\.1: must be below 1/num_examples"):
        budget(delta=0.1)
    with pytest.raises(ConfigError, match=r"^expected_batch_size=50001: must be "):
        budget().plan(50_001, 10)
    with pytest.raises(ConfigError, match=r"^num_steps=-1: must be"):
        budget().plan(100, -1)
    with pytest.raises(ConfigError, match=r"^target_epsilon=0: must be"):
        budget(target_epsilon=0).plan(100, 1)
