"""What a person is told when something they gave us cannot be used.

Every message follows one pattern, `field=value: rule; remedy`, so that the
reader sees what was given, why it is refused and what to do about it.
"""

__all__ = [
    "BudgetExceededError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "RankError",
    "UserError",
    "fault",
]


class UserError(ValueError):
    """A fault that the person who started the run can mend."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """A data set that is missing, damaged, or unlike what was declared."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign, or could not be written."""


class RankError(UserError):
    """Another process of the same run was lost."""


class BudgetExceededError(UserError):
    """A step that would spend more privacy than was granted."""


def fault(field: str, value: object, rule: str, remedy: str) -> str:
    """Returns the message `field=value: rule; remedy`.

    >>> fault("privacy.delta", 0.1, "must be below 1/num_examples", "lower it")
    'privacy.delta=0.1: must be below 1/num_examples; lower it'
    """
    shown = "null" if value is None else value
    return f"{field}={shown}: {rule}; {remedy}"
