"""Accountants by name."""

from typing import Final

from dpsgd.errors import ConfigError, did_you_mean, fault
from dpsgd.privacy.accountant import Accountant
from dpsgd.privacy.pld import PLDAccountant
from dpsgd.privacy.prv import PRVAccountant
from dpsgd.privacy.rdp import RDPAccountant

__all__ = ["ACCOUNTANTS", "build_accountant"]

ACCOUNTANTS: Final[dict[str, type[Accountant]]] = {
    accountant.name: accountant
    for accountant in (PRVAccountant, PLDAccountant, RDPAccountant)
}
"""Accountants whose answers may be promised; a new one is added here."""


def build_accountant(name: str) -> Accountant:
    """Returns the accountant of a name.

    Args:
        name: A key of `ACCOUNTANTS`.

    Raises:
        ConfigError: There is no such accountant.
    """
    if name not in ACCOUNTANTS:
        otherwise = f"known are {', '.join(ACCOUNTANTS)}"
        remedy = did_you_mean(name, ACCOUNTANTS, otherwise=otherwise)
        raise ConfigError(fault("accountant", name, "is not known", remedy))
    return ACCOUNTANTS[name]()
