"""The keys of a sweep file, each read on its own, so that all faults are told."""

import re
from collections.abc import Mapping
from typing import Any, Final

from dpsgd.errors import did_you_mean, fault

__all__ = ["NAME", "axes", "entries", "grid", "jobs", "settings", "slurm"]

NAME: Final = "name"
"""Key of an entry's name, which is no setting."""

_DOTTED = re.compile(r"\w+\.\w+")
_OPTION = re.compile(r"[a-z][a-z-]*")
_OURS = ("array", "output", "signal")

Settings = dict[str, Any]


def settings(content: Any, field: str) -> tuple[Settings, list[str]]:
    """Returns a mapping of dotted names to values, and its faults.

    Args:
        content: What stands in the file; null is empty.
        field: Where it stands.
    """
    if content is None:
        return {}, []
    if not isinstance(content, Mapping):
        rule = "must map section.key to values"
        return {}, [fault(field, content, rule, "indent its keys under it")]
    faults = [
        fault(f"{field}.{name}", value, "must be section.key", "add what is missing")
        for name, value in content.items()
        if name != NAME and not _DOTTED.fullmatch(str(name))
    ]
    return dict(content), faults


def grid(content: Any) -> tuple[Settings, list[str]]:
    """Returns the values of each swept key, and the faults."""
    found, faults = settings(content, "grid")
    for name, values in found.items():
        if name == NAME or not isinstance(values, list) or not values:
            rule = "must be a list of values"
            faults.append(fault(f"grid.{name}", values, rule, "write it like [1, 2]"))
    return found, faults


def entries(content: Any) -> tuple[list[Settings], list[str]]:
    """Returns the entries of `list`, and the faults."""
    if content is None:
        return [], []
    if not isinstance(content, list) or not content:
        rule = "must be a list of mappings of section.key to values"
        return [], [fault("list", content, rule, "begin each entry with a dash")]
    read = [settings(entry, f"list[{place}]") for place, entry in enumerate(content)]
    faults = [line for _, lines in read for line in lines]
    found = [entry for entry, _ in read]
    return found, faults + _misnamed(found)


def _misnamed(found: list[Settings]) -> list[str]:
    """Returns a fault for every name that does not tell one entry from the others."""
    names = [entry.get(NAME) for entry in found]
    if not any(NAME in entry for entry in found):
        return []
    if not all(isinstance(name, str) and name.strip() for name in names):
        return [fault("list", names, "some entries have a name", "name them all")]
    first: dict[str, int] = {}
    faults = []
    for place, name in enumerate(names):
        shown = " ".join(str(name).split())  # as tables show it
        if shown in first:
            rule = f"is the name of list[{first[shown]}], too"
            remedy = "give each entry a name of its own"
            faults.append(fault(f"list[{place}].{NAME}", shown, rule, remedy))
        first.setdefault(shown, place)
    return faults


def jobs(content: Any) -> tuple[int, list[str]]:
    """Returns how many processes may run at once on a CPU, and the faults."""
    if re.fullmatch("[1-9][0-9]*", str(content)):
        return int(content), []
    return 1, [fault("jobs", content, "must be a whole number above 0", "write 1")]


def slurm(content: Any) -> tuple[dict[str, str], list[str]]:
    """Returns options of sbatch by long name, and the faults."""
    if content is None:
        return {}, []
    if not isinstance(content, Mapping):
        rule = "must map options of sbatch to values"
        return {}, [fault("slurm", content, rule, "write it like {time: 2:00:00}")]
    faults = []
    for name, value in content.items():
        if not _OPTION.fullmatch(str(name)) or "\n" in str(value):
            rule = "must be a long option of sbatch, without dashes, and its value"
            shown = " ".join(str(value).split())
            faults.append(fault(f"slurm.{name}", shown, rule, "mend or remove it"))
        elif name in _OURS:
            rule = "is decided by the sweep"
            faults.append(fault(f"slurm.{name}", value, rule, "remove it"))
        elif value is None or isinstance(value, list | Mapping):
            rule, remedy = "must be one value", "write it like {gpus: 1}"
            faults.append(fault(f"slurm.{name}", value, rule, remedy))
    return {str(name): str(value) for name, value in content.items()}, faults


def axes(content: Any, allowed: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Returns what figures have on their axis, and the faults.

    Args:
        content: One name or a list of them; null takes the first that is allowed.
        allowed: Names that can be on an axis.
    """
    if content is None:
        return (allowed[0],), []
    names = content if isinstance(content, list) else [content]
    faults = []
    for name in names:
        if name not in allowed:
            remedy = did_you_mean(name, allowed, otherwise=f"take {allowed[0]}")
            faults.append(fault("x", name, "is neither swept nor recorded", remedy))
    return tuple(names), faults
