"""Every planted defect is caught, and nothing is caught in the code as it is."""

import re

import pytest
from detectors import DETECTORS, step_trials
from planted_defects import DEFECTS, DOCUMENT, told_by

from dpsgd.privacy.bounds import gaussian_epsilon

PAIRS = [(name, by) for name, planted in DEFECTS.items() for by in planted.caught_by]


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_code_as_it_is_passes(detector: str) -> None:
    is_caught, told = told_by(detector, None)

    assert not is_caught, told


@pytest.mark.parametrize(("name", "detector"), PAIRS)
def test_a_planted_defect_is_caught(name: str, detector: str) -> None:
    is_caught, told = told_by(detector, DEFECTS[name])

    assert is_caught, f"{DEFECTS[name].name}: {detector} says {told}"


def test_every_detector_catches_something() -> None:
    assert {detector for _, detector in PAIRS} == {*DETECTORS}


def test_the_document_lists_what_is_caught() -> None:
    """`make defects` writes its table anew."""
    lines = re.findall(r"^\| (.*) \| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    listed, name = set(), ""
    for first, detector in lines:
        name = first or name
        listed.add((name, detector))

    assert listed >= {(DEFECTS[one].name, detector) for one, detector in PAIRS}
    assert {name for name, _ in listed} == {one.name for one in DEFECTS.values()}


def test_trials_of_real_steps_show_most_of_their_epsilon() -> None:
    trials = step_trials(20)
    truth = gaussian_epsilon(1.0, 1e-5)
    shown = trials.epsilon_if_gaussian(delta=1e-5, confidence=0.95)

    assert 0.6 * truth < shown < truth
    assert trials.epsilon_lower_bound(delta=1e-5, confidence=0.95) < truth
