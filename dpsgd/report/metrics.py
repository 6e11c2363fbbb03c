"""metrics.jsonl: one JSON object a line, appended as the run goes."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpsgd.errors import UserError, fault

__all__ = ["MetricsWriter", "last_evaluated_step", "read_metrics", "to_json"]


class MetricsWriter:
    """Appends records, after dropping those that a resumed run will write again.

    Args:
        path: The file, made if it is missing.
        from_step: Steps that the run has taken: records that were written after the
            checkpoint are dropped, because the run repeats them.

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        self._path = path
        lines = read_metrics(path)
        kept = [line for line in lines if _precedes(line, from_step)]
        temporary = path.with_name(f"{path.name}.tmp")
        with _writing(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(to_json(line) + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)  # a crash or power cut here loses no line

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record, which has a `step`."""
        with _writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file; a last line that was cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def last_evaluated_step(path: Path) -> int:
    """Returns the last step whose evaluation a file records, 0 if there is none."""
    evaluated = [line for line in read_metrics(path) if "test_accuracy" in line]
    return max((line["step"] for line in evaluated), default=0)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Returns strict JSON, in which inf and NaN are null.

    >>> to_json({"loss": float("nan"), "step": 3})
    '{"loss": null, "step": 3}'
    """
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _precedes(line: Mapping[str, Any], step: int) -> bool:
    """Returns whether a record was written before the checkpoint of a step."""
    is_evaluation = "unprotected" not in line  # told after the checkpoint, not before
    return bool(line["step"] < step + (not is_evaluation))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what a full or locked disk raises into a UserError."""
    try:
        yield
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        remedy = "make room or give access, and go on with --resume"
        raise UserError(fault("metrics", path, rule, remedy)) from error


def _strict(value: Any) -> Any:
    """Returns the value with null for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
