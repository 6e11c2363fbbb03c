import math

import pytest

from dpsgd.errors import BudgetExceededError, ConfigError
from dpsgd.privacy import (
    Accountant,
    DPSGDMechanism,
    PrivacyLedger,
    PRVAccountant,
    estimate_epsilon,
)


class Counting(Accountant):
    """Counts what the real accountant is asked."""

    name = "counting"

    def __init__(self):
        self.prv = PRVAccountant()
        self.asked = []

    def epsilon(self, phases, delta):
        self.asked.append("epsilon")
        return self.prv.epsilon(phases, delta)

    def epsilon_curve(self, **arguments):
        self.asked.append("curve")
        return self.prv.epsilon_curve(**arguments)

    def slack(self, phases, delta):
        return self.prv.slack(phases, delta)


def mechanism(**changes):
    fields = {
        "sample_rate": 0.05,
        "num_steps": 200,
        "noise_multiplier": 2.0,
        "clipping_norm": 1.0,
        "expected_batch_size": 50.0,
        "delta": 1e-5,
    }
    return DPSGDMechanism(**{**fields, **changes})


def test_building_a_ledger_and_taking_planned_steps_asks_nothing():
    accountant = Counting()
    ledger = PrivacyLedger(mechanism(), accountant)
    ledger.require(200)
    assert ledger.max_steps == 200
    assert accountant.asked == []


@pytest.mark.usefixtures("coarse")
def test_spending_is_an_upper_bound_at_every_step_and_never_falls():
    accountant = Counting()
    ledger = PrivacyLedger(mechanism(), accountant)
    spent = [ledger.epsilon_spent(step) for step in range(201)]
    assert accountant.asked == ["curve", "epsilon"]
    assert spent == sorted(spent)
    assert spent[0] == 0.0
    for step in (1, 7, 100, 199, 200):
        exact = estimate_epsilon([mechanism().phase(step)], 1e-5)
        assert exact <= spent[step]
        assert step < 100 or spent[step] <= 1.15 * exact


@pytest.mark.usefixtures("coarse")
def test_certifying_a_count_tightens_what_is_spent_before_it():
    accountant = Counting()
    ledger = PrivacyLedger(mechanism(), accountant)
    before = ledger.epsilon_spent(200)
    exactly = ledger.epsilon_exactly(200)
    assert ledger.epsilon_exactly(200) == exactly
    assert accountant.asked == ["curve", "epsilon"]
    assert ledger.epsilon_spent(200) == min(before, exactly)
    exact = estimate_epsilon([mechanism().phase()], 1e-5)
    assert exact <= exactly <= 1.02 * exact


@pytest.mark.usefixtures("coarse")
def test_a_limit_stops_the_run_before_it_is_passed():
    ledger = PrivacyLedger(mechanism(), PRVAccountant(), max_epsilon=1.0)
    last = ledger.max_steps
    assert 0 < last < 200
    assert ledger.epsilon_exactly(last) <= 1.0 < ledger.epsilon_exactly(last + 1)
    ledger.require(last)
    with pytest.raises(
        BudgetExceededError, match=rf"^num_steps={last + 1}: .*; "
    ) as told:
        ledger.require(last + 1)
    # A resumed run refuses another limit: it is part of what the run began with.
    assert "start a new run with a higher privacy.max_epsilon" in str(told.value)


def test_a_limit_above_the_plan_changes_nothing():
    ledger = PrivacyLedger(mechanism(), PRVAccountant(), max_epsilon=50.0)
    assert ledger.max_steps == 200
    with pytest.raises(BudgetExceededError, match="200 steps that are accounted for"):
        ledger.require(201)
    with pytest.raises(BudgetExceededError):
        ledger.epsilon_spent(201)


def test_without_noise_the_spending_is_infinite_and_no_limit_can_be_kept():
    free = mechanism(noise_multiplier=0.0)
    assert PrivacyLedger(free, PRVAccountant()).epsilon_spent(1) == math.inf
    assert PrivacyLedger(free, PRVAccountant(), max_epsilon=9.0).max_steps == 0


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="=0"):
        PrivacyLedger(mechanism(), PRVAccountant(), max_epsilon=0.0)
