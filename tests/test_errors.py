from pathlib import Path

import pytest
from unwilling_disks import refused

from dpsgd import errors


def test_a_fault_names_field_value_rule_and_remedy() -> None:
    assert errors.fault("a.b", None, "must be x", "do y") == "a.b=null: must be x; do y"
    assert errors.fault("a", 0, "rule", "remedy") == "a=0: rule; remedy"


@pytest.mark.parametrize(
    "name", ["ConfigError", "DataError", "CheckpointError", "BudgetExceededError"]
)
def test_what_a_user_can_mend_is_a_value_error(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.UserError)
    assert issubclass(errors.UserError, ValueError)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("lnear", "did you mean `schedule.linear`?"),
        ("exponential", "choose one"),
        (3, "choose one"),
    ],
)
def test_the_nearest_name_is_asked_for(name: object, remedy: str) -> None:
    names = ["cosine", "linear"]

    asked = errors.did_you_mean(name, names, otherwise="choose one", prefix="schedule.")
    assert asked == remedy


def test_what_the_system_refuses_is_told_with_its_reason() -> None:
    told = r"^run=a: cannot be read \(Permission denied\); give access to it$"
    with pytest.raises(errors.UserError, match=told), errors.readable("run", Path("a")):
        refused()
