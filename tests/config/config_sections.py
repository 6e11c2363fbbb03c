"""A small valid configuration, as sections and as a file."""

from pathlib import Path
from typing import Any

import yaml


def sections(**changes: Any) -> dict[str, dict[str, Any]]:
    """A small valid configuration; `section__key=value` sets, `...` removes."""
    values: dict[str, dict[str, Any]] = {
        "data": {"source": "digits"},
        "optimizer": {"learning_rate": 1.0},
        "privacy": {"target_epsilon": 8, "delta": 1e-5, "expected_batch_size": 64},
        "train": {"num_steps": 10},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
        if value is ...:
            del values[section][key]
    return values


def written(folder: Path, text: str) -> Path:
    """A file of this text, in a folder."""
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def with_line(folder: Path, section: str, line: str) -> Path:
    """The valid configuration with one more line, as typed, in a section."""
    blocks = sections()
    extra = blocks.pop(section, {})
    key = line.partition(":")[0].strip()
    extra.pop(key, None)
    text = yaml.safe_dump(blocks) + f"{section}:\n"
    text += "".join(f"  {name}: {value}\n" for name, value in extra.items())
    return written(folder, f"{text}  {line}\n")
