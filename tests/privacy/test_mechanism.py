from dataclasses import FrozenInstanceError

import pytest

from dpsgd.errors import ConfigError
from dpsgd.privacy import DPSGDMechanism, Phase

FIELDS = {
    "sample_rate": 0.1,
    "num_steps": 10,
    "noise_multiplier": 1.5,
    "clipping_norm": 2.0,
    "expected_batch_size": 100.0,
    "delta": 1e-5,
    "rescale_to_unit_norm": False,
    "unit": "example",
}


def mechanism(**changes):
    return DPSGDMechanism(**{**FIELDS, **changes})


def test_noise_scales_with_the_sensitivity_of_the_clipped_sum():
    assert mechanism().l2_sensitivity == 2.0
    assert mechanism().noise_std == 3.0
    assert mechanism(rescale_to_unit_norm=True).l2_sensitivity == 1.0
    assert mechanism(rescale_to_unit_norm=True).noise_std == 1.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 0.0),
        ("sample_rate", 1.01),
        ("sample_rate", float("nan")),
        ("num_steps", -1),
        ("num_steps", 1.5),
        ("noise_multiplier", -0.1),
        ("noise_multiplier", float("inf")),
        ("clipping_norm", 0.0),
        ("expected_batch_size", float("inf")),
        ("delta", 0.0),
        ("delta", 1.0),
        ("unit", "household"),
    ],
)
def test_impossible_mechanisms_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}=.*: .*must be .*; "):
        mechanism(**{field: value})


def test_a_mechanism_cannot_be_changed_after_it_was_accounted_for():
    with pytest.raises(FrozenInstanceError):
        mechanism().noise_multiplier = 0.1


def test_a_mechanism_survives_a_checkpoint_exactly():
    assert mechanism().to_dict() == FIELDS
    assert DPSGDMechanism.from_dict(mechanism().to_dict()) == mechanism()


def test_a_checkpoint_with_other_fields_is_refused():
    state = {k: v for k, v in FIELDS.items() if k != "delta"} | {"sigma": 1.0}
    with pytest.raises(ConfigError, match="mechanism=delta, sigma: "):
        DPSGDMechanism.from_dict(state)


def test_differences_name_each_field_that_differs_and_no_other():
    other = mechanism(noise_multiplier=1.6, num_steps=11)
    assert mechanism().differences(mechanism()) == []
    assert mechanism().differences(other) == [
        "num_steps: 10 != 11",
        "noise_multiplier: 1.5 != 1.6",
    ]


def test_the_phase_counts_the_steps_taken_or_else_all_planned():
    assert mechanism().phase() == Phase(0.1, 1.5, 10)
    assert mechanism().phase(0) == Phase(0.1, 1.5, 0)
    assert mechanism().adjacency == "add-or-remove-one"
