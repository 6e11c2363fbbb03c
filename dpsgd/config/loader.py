"""Reads a configuration file: every fault is found, and all are told at once."""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dpsgd.config.coercion import Mismatch, coerce
from dpsgd.config.consistency import (
    faults_between_settings,
    missing_delta,
    unused_settings,
)
from dpsgd.config.schema import Config
from dpsgd.errors import ConfigError, did_you_mean, fault

__all__ = [
    "config_to_dict",
    "load_config",
    "parse_config",
    "read_yaml",
    "unknown_names",
    "with_absolute_paths",
    "with_later_settings",
]

_Sections = dict[str, dict[str, Any]]
_NAMED_WEIGHTS = re.compile("(torchvision|timm):")


def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, has_begun: bool = False
) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides.

    Args:
        path: YAML file: sections, each a mapping of keys to values. Anchors, aliases
            and tags are refused, because a configuration is data.
        overrides: Settings that replace the file's; each value is read as YAML.
        has_begun: Whether the file is that of a run, which began with all that is in
            it: then a setting that means nothing is refused among overrides only.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: The file cannot be read, or any setting in it is at fault; the
            message has one line for every fault.
    """
    sections = read_yaml(Path(path))
    faults = [line for text in overrides for line in _override(sections, text)]
    if faults:
        raise ConfigError("\n".join(faults))
    named = {text.partition("=")[0].strip() for text in overrides}
    return parse_config(sections, used=named if has_begun else None)


def parse_config(
    sections: Mapping[str, Any], *, used: Collection[str] | None = None
) -> Config:
    """Builds a configuration from nested mappings, as PyYAML or `json` give them.

    Args:
        sections: Sections, each a mapping of keys to values.
        used: Full names of settings that must mean something beside the others; None
            is all that are not as by default.

    Raises:
        ConfigError: One line for every fault.
    """
    faults: list[str] = []
    built: dict[str, Any] = {}
    hints = get_type_hints(Config)
    faults += unknown_names(sections, list(hints), prefix="", what="section")
    for field in dataclasses.fields(Config):
        if field.name in sections or _required(field):
            values = sections.get(field.name)
            section, found = _section(field.name, hints[field.name], values)
            faults += found
            built[field.name] = section
    faults += missing_delta(sections.get("privacy"))
    if not faults:
        config = Config(**built)
        faults = faults_between_settings(config)
        unused = unused_settings(config)
        faults += [unused[name] for name in unused if used is None or name in used]
        if not faults:
            return config
    raise ConfigError("\n".join(faults))


def config_to_dict(config: Config) -> _Sections:
    """Returns nested plain mappings that `parse_config` reads back to an equal value.

    >>> config = parse_config({
    ...     "data": {"source": "digits"}, "optimizer": {"learning_rate": 1},
    ...     "privacy": {"target_epsilon": 8, "delta": 1e-5, "expected_batch_size": 64},
    ...     "train": {"num_steps": 10}})
    >>> parse_config(config_to_dict(config)) == config
    True
    """
    return {
        section: {key: _plain(value) for key, value in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }


def with_later_settings(values: Mapping[str, Any], section: type) -> dict[str, Any]:
    """Returns what a section held, with the defaults of settings that came later.

    Args:
        values: What `config_to_dict` once told of the section.
        section: Its type.

    >>> from dpsgd.config.schema import FinetuneConfig
    >>> with_later_settings({"train": "classifier"}, FinetuneConfig)
    {'train': 'classifier', 'classifier': 'initialize'}
    """
    defaults = {
        field.name: _plain(field.default)
        for field in dataclasses.fields(section)
        if field.default is not dataclasses.MISSING
    }
    return {**defaults, **values}


def _plain(value: Any) -> Any:
    """Returns a value as YAML and JSON have it."""
    return list(value) if isinstance(value, tuple) else value


def with_absolute_paths(config: Config) -> Config:
    """Returns settings whose data and weights are found from any working directory."""

    def absolute(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple):
            return tuple(os.path.abspath(one) for one in value)
        return value and os.path.abspath(value)

    data = config.data
    if data.source == "torchvision":
        data = dataclasses.replace(data, root=os.path.abspath(data.root))
    data = dataclasses.replace(
        data, train=absolute(data.train), test=absolute(data.test)
    )
    runtime, model = config.runtime, config.model
    runtime = dataclasses.replace(
        runtime, feature_cache=_absolute(runtime.feature_cache)
    )
    if not _NAMED_WEIGHTS.match(model.init_from or ""):
        model = dataclasses.replace(model, init_from=_absolute(model.init_from))
    return dataclasses.replace(config, data=data, model=model, runtime=runtime)


def _absolute(path: str | None) -> str | None:
    """Returns a path as it is found from any working directory."""
    return path and os.path.abspath(os.path.expanduser(path))


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without anchors, numbers as text, and refuses a key given twice.

    YAML 1.1 reads 010 as 8, 1:30 as 90 and 2001-01-01 as a date; the declared type of
    a setting reads its text instead. Of the words, true, false and null keep a meaning.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own attribute

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses anchors and aliases: what is written is what is meant."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None):
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: anchors and aliases are not "
                "supported; write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuses a repeated key, of which PyYAML would keep the last in silence."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(
                    f"line {node.start_mark.line + 1}: `{key}` is given twice; "
                    "keep one of them"
                )
        return super().construct_mapping(node, deep)


for _tag, _words, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_words})$"), list(_first)
    )


def read_yaml(path: Path, *, field: str = "config") -> dict[str, Any]:
    """Reads a YAML file of sections: anchors and tags are refused, numbers stay text.

    Args:
        path: The file.
        field: What it is called where it is at fault.

    Raises:
        ConfigError: It cannot be read, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(
            fault(field, path, f"cannot be read ({reason})", "give a YAML file")
        ) from error
    try:
        content = yaml.load(text, Loader=_PlainLoader)  # noqa: S506, RUF100
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            fault(field, path, f"is not valid YAML ({reason})", "mend that line")
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            fault(field, path, "has no sections", "see configs/ for examples")
        )
    return content


def _override(sections: _Sections, text: str) -> list[str]:
    """Applies one `section.key=value` in place; returns its faults."""
    name, separator, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (separator and dot and section and key):
        return [
            fault("--set", text, "must be section.key=value", "add what is missing")
        ]
    try:
        parsed = yaml.load(value, Loader=_PlainLoader)  # noqa: S506, RUF100
    except yaml.YAMLError:  # a glob such as *.parquet is text, not a YAML alias
        parsed = value
    if not isinstance(sections.get(section), dict):
        sections[section] = {}
    sections[section][key] = parsed
    return []


def _section(name: str, section: type, values: Any) -> tuple[Any, list[str]]:
    """Builds one section; returns it, or None, with the faults found."""
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        rule = "must be a mapping of keys to values"
        return None, [fault(name, values, rule, "indent its keys under it")]
    hints = get_type_hints(section, include_extras=True)
    faults = unknown_names(values, list(hints), prefix=f"{name}.", what="key")
    built = {}
    for field in dataclasses.fields(section):
        full_name = f"{name}.{field.name}"
        if field.name not in values:
            if _required(field):
                faults.append(fault(full_name, None, "is required", "add it"))
            continue
        try:
            built[field.name] = coerce(values[field.name], hints[field.name])
        except Mismatch as mismatch:
            rule = f"must be {mismatch}"
            faults.append(
                fault(full_name, values[field.name], rule, "give such a value")
            )
    return (None if faults else section(**built)), faults


def _required(field: "dataclasses.Field[Any]") -> bool:
    """Returns whether a field has no default."""
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def unknown_names(
    values: Mapping[str, Any], known: list[str], *, prefix: str, what: str
) -> list[str]:
    """Returns a fault for every name that no field has, with the nearest known."""
    faults = []
    for name in values:
        if name not in known:
            otherwise = f"known are {', '.join(known)}"
            remedy = did_you_mean(name, known, otherwise=otherwise, prefix=prefix)
            value = values[name]
            faults.append(fault(f"{prefix}{name}", value, f"unknown {what}", remedy))
    return faults
