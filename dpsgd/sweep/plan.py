"""Which runs a sweep file asks for: a base config, and what differs from run to run."""

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dpsgd.config import (
    Config,
    config_to_dict,
    load_config,
    read_yaml,
    unknown_names,
    with_absolute_paths,
)
from dpsgd.errors import ConfigError, fault
from dpsgd.sweep import reading

__all__ = [
    "ENTRY",
    "RECORDED",
    "SEED",
    "STEPS",
    "SweepPlan",
    "SweepRun",
    "identity_of",
    "read_sweep",
    "short_names",
]

ENTRY: Final = "entry"
"""Column of the names that entries of `list` may have."""
SEED: Final = "train.seed"
STEPS: Final = "train.num_steps"
RECORDED: Final = ("noise_multiplier", "epsilon", "epochs")
"""What a run records that a figure may have on its axis, besides swept keys."""

_KEYS = ["config", "set", "grid", "list", "x", "jobs", "slurm"]
# Where, how fast and how often looked at: a run may go on with other values of these.
_MAY_CHANGE = ("runtime", "eval", "report")
_PLAIN = re.compile(r"[\w.+-]+", re.ASCII)
_WORDS = ("true", "false", "null")
_LONGEST_SLUG = 80
_DIGEST = 10  # hexadecimal digits: no two runs of a folder share them by chance

_Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        index: Place in the sweep, from 0.
        label: What differs in it, in a few words.
        folder: Name of its run directory, which follows from its settings.
        overrides: `section.key=value`, as --set takes them.
        config: All its settings.
        values: Its value in each column of the plan.
    """

    index: int
    label: str
    folder: str
    overrides: tuple[str, ...]
    config: Config
    values: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        """Returns what the run directory of this run must hold."""
        return identity_of(self.config, self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """What a sweep file asks for.

    Attributes:
        path: The sweep file.
        base: The configuration that its runs have in common.
        runs: In the order of the file.
        columns: What tells the runs apart: dotted names, and `entry`.
        listed: Those that entries of `list` set.
        axes: What figures have on their horizontal axis, one figure each.
        jobs: Processes at once on a CPU.
        slurm: Options of sbatch.
    """

    path: Path
    base: Path
    runs: tuple[SweepRun, ...]
    columns: tuple[str, ...]
    listed: tuple[str, ...]
    axes: tuple[str, ...]
    jobs: int
    slurm: Mapping[str, str]


def read_sweep(path: Path) -> SweepPlan:
    """Reads a sweep file and checks every run of it before any is started.

    Args:
        path: YAML with `config` (base file, relative to this one), and `grid` (lists
            of values by dotted name, all combinations), `list` (mappings of dotted
            names to values, each a run) or both (every entry with every combination).
            May have `set` (for all runs), `x`, `jobs` and `slurm`.

    Raises:
        ConfigError: One line for every fault.
    """
    content = read_yaml(path, field="sweep")
    faults = unknown_names(content, _KEYS, prefix="", what="key of a sweep")

    def checked(read: tuple[Any, list[str]]) -> Any:
        faults.extend(read[1])
        return read[0]

    common = checked(reading.settings(content.get("set"), "set"))
    grid = checked(reading.grid(content.get("grid")))
    entries = checked(reading.entries(content.get("list")))
    jobs = checked(reading.jobs(content.get("jobs", 1)))
    slurm = checked(reading.slurm(content.get("slurm")))
    base = content.get("config")
    if not isinstance(base, str):
        rule = "must name the configuration that all runs have in common"
        faults.append(fault("config", base, rule, "add it"))
    if not grid and not entries and not faults:
        faults.append("grid=null and list=null: nothing is swept; give one of them")
    faults += _overlaps(common, grid, entries)
    columns = _columns(grid, entries)
    if columns:
        on_axis = [*(key for key in columns if key != SEED), *RECORDED, SEED]
        axes = checked(reading.axes(content.get("x"), on_axis))
    if faults:
        raise ConfigError("\n".join(faults))
    return SweepPlan(
        path=path,
        base=path.parent / str(base),
        runs=_runs(path.parent / str(base), common, grid, entries, columns),
        columns=columns,
        listed=tuple(key for key in columns if key not in grid and key != ENTRY),
        axes=axes,
        jobs=jobs,
        slurm=slurm,
    )


def identity_of(config: Config, swept: Collection[str]) -> dict[str, Any]:
    """Returns the settings by which a run is known again.

    Args:
        config: All settings.
        swept: Names that tell runs apart, which count even where settings may change.
    """
    settings = config_to_dict(with_absolute_paths(config))
    del settings["data"]["root"]  # where a public data set is downloaded to
    for section in _MAY_CHANGE:
        kept = {
            key: value
            for key, value in settings.pop(section).items()
            if f"{section}.{key}" in swept
        }
        if kept:
            settings[section] = kept
    return settings


def short_names(keys: Collection[str]) -> list[str]:
    """Returns dotted names without their sections where they are clear without.

    >>> short_names(["train.seed", "entry"]), short_names(["data.name", "model.name"])
    (['seed', 'entry'], ['data.name', 'model.name'])
    """
    short = [key.rpartition(".")[2] for key in keys]
    return short if len(set(short)) == len(short) else list(keys)


def _overlaps(
    common: _Settings, grid: _Settings, entries: list[_Settings]
) -> list[str]:
    """Returns a fault for every key that is set in two places."""
    listed = {key for entry in entries for key in entry}
    twice = (common.keys() & (grid.keys() | listed)) | (grid.keys() & listed)
    rule = "is set in two of `set`, `grid` and `list`"
    return [fault(key, "...", rule, "keep one of them") for key in sorted(twice)]


def _runs(
    base: Path,
    common: _Settings,
    grid: _Settings,
    entries: list[_Settings],
    columns: Sequence[str],
) -> tuple[SweepRun, ...]:
    """Returns every entry with every combination of the grid, checked."""
    runs: list[SweepRun] = []
    faults: list[str] = []
    for entry in entries or [{}]:
        for values in itertools.product(*grid.values()):
            combination = dict(zip(grid, values, strict=True))
            settings = {**common, **entry, **combination}
            name = settings.pop(reading.NAME, None)
            told = [ENTRY] if name else [*entry]  # a name stands for what it sets
            try:
                run = _run(
                    len(runs),
                    base,
                    settings,
                    columns=columns,
                    told=[*told, *combination],
                    name=name,
                )
            except ConfigError as error:
                lines = str(error).splitlines()
                faults += [line for line in lines if line not in faults]
            else:
                runs.append(run)
    faults += _repetitions(runs)
    if faults:
        raise ConfigError("\n".join(faults))
    return tuple(runs)


def _run(
    index: int,
    base: Path,
    settings: _Settings,
    *,
    columns: Sequence[str],
    told: Sequence[str],
    name: str | None,
) -> SweepRun:
    """Returns one run, whose settings are checked."""
    overrides = tuple(f"{key}={_as_yaml(value)}" for key, value in settings.items())
    config = load_config(base, overrides)
    values = {key: name if key == ENTRY else _setting(config, key) for key in columns}
    label = _label({key: values[key] for key in told})
    identity = json.dumps(identity_of(config, columns), sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:_DIGEST]
    slug = re.sub(r"[^\w.=+-]+", "_", label, flags=re.ASCII)[:_LONGEST_SLUG]
    return SweepRun(
        index=index,
        label=label,
        folder=f"{slug.strip('_.')}-{digest}",
        overrides=overrides,
        config=config,
        values=values,
    )


def _label(values: Mapping[str, Any]) -> str:
    """Returns what differs in a run."""
    parts = [
        str(value) if key == ENTRY else f"{key}={_in_words(value)}"
        for key, value in zip(short_names(values), values.values(), strict=True)
    ]
    return " ".join(" ".join(parts).split())  # in one line, whatever stands in them


def _repetitions(runs: Sequence[SweepRun]) -> list[str]:
    """Returns a fault for every run that has the settings of an earlier one."""
    seen: dict[str, str] = {}
    faults = []
    for run in runs:
        digest = run.folder[-_DIGEST:]
        if digest in seen:
            rule = f"has the same settings as `{seen[digest]}`"
            faults.append(fault("run", run.label, rule, "leave one of them out"))
        seen.setdefault(digest, run.label)
    return faults


def _columns(grid: _Settings, entries: list[_Settings]) -> tuple[str, ...]:
    """Returns what tells runs apart: names of entries, their keys, the grid's keys."""
    keys = [key for entry in entries for key in entry if key != reading.NAME]
    named = [ENTRY] if any(reading.NAME in entry for entry in entries) else []
    return tuple(dict.fromkeys([*named, *keys, *grid]))


def _setting(config: Config, name: str) -> Any:
    """Returns a setting by its dotted name, which exists: the loader took it."""
    section, _, key = name.partition(".")
    value = getattr(getattr(config, section), key)
    return list(value) if isinstance(value, tuple) else value


def _as_yaml(value: Any) -> str:
    """Returns a value as text that YAML reads back as the same.

    >>> _as_yaml("1e-5"), _as_yaml("a b"), _as_yaml("true"), _as_yaml(True)
    ('1e-5', '"a b"', '"true"', 'true')
    """
    is_plain = isinstance(value, str) and _PLAIN.fullmatch(value)
    if is_plain and value.lower() not in _WORDS:
        return str(value)
    return json.dumps(value)


def _in_words(value: Any) -> str:
    """Returns a value for a label."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else str(value)
