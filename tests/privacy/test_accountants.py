"""What every registered accountant keeps."""

import math

import pytest

from dpsgd.errors import ConfigError
from dpsgd.privacy import (
    ACCOUNTANTS,
    EpsilonBound,
    Phase,
    PLDAccountant,
    PRVAccountant,
    RDPAccountant,
    build_accountant,
    calibrate_noise_multiplier,
    estimate_epsilon,
)

CIFAR = 4096 / 50000

pytestmark = pytest.mark.usefixtures("coarse")


@pytest.fixture(params=[*ACCOUNTANTS])
def accountant(request):
    return build_accountant(request.param)


def test_the_registered_are_those_whose_answers_may_be_promised():
    assert {name: type(build_accountant(name)) for name in ACCOUNTANTS} == {
        "prv": PRVAccountant,
        "pld": PLDAccountant,
        "rdp": RDPAccountant,
    }


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("gdp", r"did you mean `rdp`\?"), ("moments", "known are prv, pld, rdp")],
)
def test_an_unknown_accountant_is_refused_with_the_nearest_name(name, remedy):
    rule = rf"^accountant={name}: is not known; {remedy}$"
    with pytest.raises(ConfigError, match=rule):
        build_accountant(name)


@pytest.mark.parametrize(
    "phases",
    [
        [Phase(CIFAR, 3.0, 300)],
        [Phase(0.01, 1.0, 100)],
        [Phase(1e-3, 0.7, 200)],
        [Phase(0.2, 5.0, 30), Phase(0.1, 2.0, 20), Phase(1.0, 20.0, 1)],
    ],
)
def test_no_upper_bound_is_below_the_estimate(accountant, phases):
    bound = accountant.epsilon(phases, 1e-6)
    estimate = estimate_epsilon(phases, 1e-6)
    assert estimate is not None
    assert bound.lower <= bound.estimate <= bound.upper
    # Where no contour settles the estimate is up to 3e-4 too large.
    assert bound.lower <= estimate <= bound.upper * (1 + 3e-4)


def test_upper_bounds_rise_with_steps_and_rate_and_fall_with_noise_and_delta(
    accountant,
):
    def upper(q=0.05, sigma=2.0, steps=100, delta=1e-5):
        return accountant.epsilon([Phase(q, sigma, steps)], delta).upper

    base = upper()
    assert upper(steps=110) > base > upper(steps=90)
    assert upper(q=0.055) > base > upper(q=0.045)
    assert upper(sigma=1.9) > base > upper(sigma=2.1)
    assert upper(delta=5e-6) > base > upper(delta=2e-5)


@pytest.mark.parametrize(
    ("phases", "epsilon"),
    [
        ([], 0.0),
        ([Phase(0.1, 1.0, 0)], 0.0),
        ([Phase(0.1, 0.0, 0)], 0.0),
        ([Phase(0.0, 0.0, 5)], 0.0),
        ([Phase(0.1, 0.0, 5)], math.inf),
        ([Phase(0.1, 5.0, 5), Phase(1.0, 0.0, 1)], math.inf),
    ],
)
def test_nothing_costs_nothing_and_no_noise_costs_all(accountant, phases, epsilon):
    assert accountant.epsilon(phases, 1e-5) == EpsilonBound(epsilon, epsilon, epsilon)
    assert accountant.slack(phases, 1e-5) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_an_impossible_delta_is_refused(accountant, delta):
    with pytest.raises(ConfigError, match=r"^delta=.*: must be in \(0, 1\); "):
        accountant.epsilon([Phase(0.1, 1.0, 10)], delta)


def test_a_curve_bounds_each_count_and_never_falls(accountant):
    steps = [200, 0, 1, 60]
    curve = accountant.epsilon_curve(
        sample_rate=0.05, noise_multiplier=1.5, steps=steps, delta=1e-5
    )
    for count, bound in zip(steps, curve, strict=True):
        assert bound.upper >= estimate_epsilon([Phase(0.05, 1.5, count)], 1e-5)
    uppers = [curve[index].upper for index in (1, 2, 3, 0)]
    assert uppers == sorted(uppers)


def test_an_unsorted_curve_takes_the_bound_of_more_steps_where_it_is_less():
    class Erratic(RDPAccountant.__base__):  # any accountant that is sound, not smooth
        name = "erratic"

        def epsilon(self, phases, delta):
            upper = {1: 5.0, 2: 3.0, 3: 4.0}[phases[0].num_steps]
            return EpsilonBound(0.0, upper, upper)

    curve = Erratic().epsilon_curve(
        sample_rate=0.1, noise_multiplier=1.0, steps=[2, 1, 3], delta=1e-5
    )
    assert [bound.upper for bound in curve] == [3.0, 3.0, 4.0]


def test_noise_calibrated_for_each_keeps_the_target(accountant):
    sigma = calibrate_noise_multiplier(
        target_epsilon=2.0,
        sample_rate=0.05,
        num_steps=60,
        delta=1e-5,
        accountant=accountant,
    )
    assert 1.95 < accountant.epsilon([Phase(0.05, sigma, 60)], 1e-5).upper <= 2.0


@pytest.mark.parametrize(
    ("phase", "delta"),
    [(Phase(CIFAR, 3.0, 2468), 1e-5), (Phase(1e-4, 30.0, 10**4), 1e-10)],
)
def test_the_pld_is_tight_and_the_renyi_bound_loose(phase, delta):
    estimate = estimate_epsilon([phase], delta)
    pld = PLDAccountant().epsilon([phase], delta).upper
    rdp = RDPAccountant().epsilon([phase], delta).upper
    assert estimate <= pld <= (1 + 3e-4) * estimate
    assert 1.02 * estimate < rdp < 2 * estimate


def test_the_pld_resolves_deltas_that_the_package_cannot():
    phase = Phase(0.01, 1.0, 1000)
    with pytest.raises(ConfigError, match=r"^delta=1e-30: .*; raise it, or take pld$"):
        PRVAccountant().epsilon([phase], 1e-30)
    bound = PLDAccountant().epsilon([phase], 1e-30)
    assert bound.estimate <= bound.upper <= (1 + 3e-4) * bound.estimate
    with pytest.raises(ConfigError, match=r"^delta=1e-120: must be at least 1e-100"):
        PLDAccountant().epsilon([phase], 1e-120)


def test_renyi_orders_beyond_any_table_are_searched():
    # At the paper's epsilon 1 a table that ends at order 63 is 10 % looser.
    phase = Phase(CIFAR, 10.0, 875)
    # accounting by dp-accounting's default orders, fractional and up to 512: 0.98771
    assert RDPAccountant().epsilon([phase], 1e-5).upper <= 0.98771


def test_full_batches_by_renyi_are_the_conversion_of_the_gaussian():
    # min over orders a of a / 2 + log((a - 1) / a) - log(delta a) / (a - 1), mu = 1.
    orders = [1 + 0.001 * k for k in range(1, 20_000)]
    exact = min(
        a / 2 + math.log1p(-1 / a) - (math.log(1e-5) + math.log(a)) / (a - 1)
        for a in orders
    )
    found = RDPAccountant().epsilon([Phase(1.0, 2.0, 4)], 1e-5).upper
    assert found == pytest.approx(exact, rel=1e-6)
