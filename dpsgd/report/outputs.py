"""Files that a report may write again, and no others: what a user made is safe."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dpsgd.errors import ConfigError, fault, readable, writable

__all__ = ["OwnFiles"]

_LIST = ".dpsgd-report.json"


class OwnFiles:
    """The files that reports have written into a folder, known by their content.

    Args:
        folder: Where they are; made when they are written.
        option: Of the command, by which another folder can be named.
    """

    def __init__(self, folder: Path, *, option: str) -> None:
        self._folder = folder
        self._elsewhere = f"name another folder with {option}"
        self._list = folder / _LIST

    def replace(self, contents: Mapping[str, bytes]) -> None:
        """Writes files, each whole or not at all.

        Guarantees:
            A file that stands in the way is replaced only if a report wrote it and
            nobody has changed it since; otherwise nothing at all is written.

        Args:
            contents: Content by path within the folder.

        Raises:
            ConfigError: A file is not a report's own, or cannot be written.
            UserError: What is there cannot be read.
        """
        known = self._known()
        with readable("report", self._folder):
            in_the_way = [
                self._folder / name
                for name in contents
                if self._stands_in_the_way(name, known.get(name, []))
            ]
        if in_the_way:
            rule = "was not written by a report, or has been changed since"
            remedy = f"move it away, or {self._elsewhere}"
            faults = [fault("report", path, rule, remedy) for path in in_the_way]
            raise ConfigError("\n".join(faults))
        digests = {name: [_digest(content)] for name, content in contents.items()}
        both = {name: known.get(name, []) + new for name, new in digests.items()}
        remedy = f"give access to it, or {self._elsewhere}"
        with writable("report", self._folder, remedy=remedy):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_list({**known, **both})  # right also if killed half way
            for name, content in contents.items():
                _write(self._folder / name, content)
            self._write_list({**known, **digests})

    def _stands_in_the_way(self, name: str, digests: list[str]) -> bool:
        """Returns whether something is there that no report has written."""
        path = self._folder / name
        if not path.exists():
            return False
        return not path.is_file() or _digest(path.read_bytes()) not in digests

    def _known(self) -> dict[str, list[str]]:
        """Returns the digests of what was written; none if the list is damaged."""
        try:
            known = json.loads(self._list.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {name: list(one) for name, one in known.items() if isinstance(one, list)}

    def _write_list(self, digests: Mapping[str, list[str]]) -> None:
        """Writes the list of what is ours."""
        _write(self._list, json.dumps(digests, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    """Replaces a file by new content, or leaves it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _digest(content: bytes) -> str:
    """Returns what a content is known by."""
    return hashlib.sha256(content).hexdigest()
