"""metrics.jsonl: one JSON object a line, appended as the run goes."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, TextIO, cast

from dpsgd.errors import UserError, fault, readable, writable

__all__ = ["MetricsWriter", "last_evaluated_step", "read_metrics", "to_json"]

_OWNER_ONLY: Final = 0o600


class MetricsWriter:
    """Appends records, after dropping those that a resumed run will write again.

    No evaluation is dropped, since it was shown, and a step that was shown must not be
    taken again with other noise (`dpsgd.resumption`); one that is repeated is replaced.

    Args:
        path: The file, made if it is missing; readable by its owner only, since times
            and unprotected values are not for others.
        from_step: Steps that the run has taken: unprotected values of later ones are
            dropped, because the run repeats them.

    Raises:
        UserError: The file cannot be read or written.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        self._path = path
        kept = [
            line
            for line in read_metrics(path)
            if "unprotected" not in line or line["step"] <= from_step
        ]
        self._last_kept = max((line["step"] for line in kept), default=0)
        self._put(kept)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one record, which has a `step`, in place of one of its step and kind."""
        if record["step"] <= self._last_kept:
            lines = read_metrics(self._path)
            others = [line for line in lines if _order(line) != _order(record)]
            self._put(sorted([*others, record], key=_order))
            return
        with _writing(self._path), _opened(self._path, "a") as file:
            file.write(to_json(record) + "\n")

    def _put(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the file; a crash or power cut here loses no line."""
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        with _writing(self._path):
            temporary.unlink(missing_ok=True)  # of a crash, maybe others may read it
            with _opened(temporary, "x") as file:
                file.writelines(to_json(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file; a last line that was cut short is left out.

    Raises:
        UserError: The file is there and cannot be read, or is no text.
    """
    with readable("metrics", path):
        content = path.read_bytes() if path.exists() else b""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        rule, remedy = "cannot be read (not a text file)", "bring back the run's own"
        raise UserError(fault("metrics", path, rule, remedy)) from error
    records = []
    for line in text.splitlines():
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


def _opened(path: Path, mode: str) -> TextIO:
    """Opens a text file, which is readable by its owner only if it is made here."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode=_OWNER_ONLY)

    return cast(TextIO, open(path, mode, encoding="utf-8", opener=opener))


def _order(line: Mapping[str, Any]) -> tuple[int, bool]:
    """Returns a record's place: unprotected values of a step, then its evaluation."""
    return line["step"], "unprotected" not in line


def _writing(path: Path) -> AbstractContextManager[None]:
    """Turns what a full or locked disk raises into a UserError."""
    remedy = "make room or give access, and go on with --resume"
    return writable("metrics", path, remedy=remedy, kind=UserError)


def _strict(value: Any) -> Any:
    """Returns the value with null for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
