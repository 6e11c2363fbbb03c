import importlib.util
import math

import pytest

from dpsgd.errors import ConfigError
from dpsgd.privacy import ACCOUNTANTS, Phase, comparison, estimate_epsilon
from dpsgd.privacy.comparison import compare
from dpsgd.privacy.gdp import gdp_epsilon
from dpsgd.privacy.peer import peer_interval, peer_is_installed, peer_pld, peer_rdp

CIFAR = [Phase(4096 / 50000, 3.0, 2468)]


# Independent implementations of the same formula; see docs of the figures in test_prv.
@pytest.mark.parametrize(
    ("phase", "epsilon"),
    [
        (Phase(4096 / 50000, 10.0, 875), 0.89765),
        (Phase(4096 / 50000, 6.0, 1125), 1.82118),
        (Phase(1.0, 2.0, 4), 4.37718),
    ],
)
def test_the_central_limit_has_its_published_figures(phase, epsilon):
    assert gdp_epsilon([phase], 1e-5) == pytest.approx(epsilon, abs=6e-6)


def test_the_central_limit_is_no_bound_and_not_among_the_accountants():
    phases = [Phase(0.01, 0.5, 100)]
    assert gdp_epsilon(phases, 1e-5) < 0.5 * estimate_epsilon(phases, 1e-5)
    assert "gdp" not in ACCOUNTANTS


def test_the_central_limit_of_phases_adds_squares():
    half = Phase(0.1, 2.0, 50)
    whole = gdp_epsilon([Phase(0.1, 2.0, 100)], 1e-5)
    assert gdp_epsilon([half, half], 1e-5) == pytest.approx(whole)
    assert gdp_epsilon([], 1e-5) == 0.0
    assert gdp_epsilon([Phase(0.1, 0.0, 1)], 1e-5) == math.inf
    with pytest.raises(ConfigError, match="delta=2"):
        gdp_epsilon([half], 2)


def test_dp_accounting_brackets_the_estimate():
    bound = peer_pld(CIFAR, 1e-5, peer_interval(CIFAR, 1e-5))
    estimate = estimate_epsilon(CIFAR, 1e-5)
    assert bound.lower < estimate < bound.upper < (1 + 1e-4) * estimate
    assert peer_rdp(CIFAR, 1e-5) > 1.05 * estimate


def test_dp_accounting_composes_phases():
    phases = [Phase(4096 / 50000, 4.0, 800), Phase(2048 / 50000, 2.0, 600)]
    assert 3.42293 < peer_pld(phases, 1e-5, 1e-3).upper < 3.4238
    assert peer_pld([], 1e-5, 1e-3).upper == peer_rdp([], 1e-5) == 0.0
    assert peer_pld([Phase(0.1, 0.0, 1)], 1e-5, 1e-3).lower == math.inf


@pytest.mark.usefixtures("coarse")
def test_all_accounts_are_compared_and_said_to_be_what_they_are():
    opinions = {opinion.method: opinion for opinion in compare(CIFAR, 1e-5)}
    assert [*opinions] == [*ACCOUNTANTS, "estimate", "gdp", "dp-accounting"]
    assert [opinion.kind for opinion in opinions.values()] == [
        "upper bound",
        "upper bound",
        "upper bound",
        "nearly exact",
        "approximation",
        "bracket",
    ]
    estimate = opinions["estimate"].epsilon
    assert estimate == pytest.approx(6.529280, abs=6e-7)
    assert all(opinions[name].epsilon >= estimate for name in ACCOUNTANTS)
    assert opinions["gdp"].epsilon < estimate < opinions["dp-accounting"].epsilon


def test_without_dp_accounting_its_row_says_how_to_install_it(monkeypatch):
    assert peer_is_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    last = compare([Phase(1.0, 2.0, 4)], 1e-5)[-1]
    assert last.epsilon is None
    assert last.kind == "not installed: pip install dp-accounting"


def test_noise_too_small_for_dp_accounting_has_no_answer_of_it():
    last = compare([Phase(0.1, 0.01, 1)], 1e-5)[-1]
    assert last.epsilon is None
    assert last.kind == "no answer: too little noise"


@pytest.mark.parametrize(
    ("q", "sigma", "kind"),
    [
        (0.1, 0.01, "no answer: too little noise"),
        (0.01, 1.0, "coarse bound"),  # of a lattice, above that of pld
        (0.1, 30.0, "nearly exact"),
    ],
)
def test_an_estimate_is_said_to_be_what_it_is(monkeypatch, q, sigma, kind):
    monkeypatch.setattr(comparison, "ACCOUNTANTS", {})
    monkeypatch.setattr(comparison, "peer_is_installed", lambda: False)
    estimate = compare([Phase(q, sigma, 10)], 1e-5)[0]
    assert (estimate.method, estimate.kind) == ("estimate", kind)


def test_an_impossible_delta_is_refused_before_anything_is_asked(monkeypatch):
    monkeypatch.setattr(comparison, "build_accountant", None)
    with pytest.raises(ConfigError, match=r"^delta=0\.0: must be in"):
        compare(CIFAR, 0.0)
