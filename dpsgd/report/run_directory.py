"""The folder that a run leaves behind, and what may stand in it."""

import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from dpsgd.errors import ConfigError, fault, readable

__all__ = ["FORMAT", "RunDirectory", "default_run_directory", "environment"]

# Of plan.json and report.json. Format 1 had no plan.json and no `format`; the oldest
# runs of it name neither unit nor noise, and count no test examples by class.
FORMAT = 2
_CHECKPOINT = re.compile(r"step-(\d+)\.(?:safetensors|shards)")
_PACKAGES = ("dpsgd", "torch", "torchvision", "triton", "numpy", "prv-accountant")


class RunDirectory:
    """Names the files of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.plan = path / "plan.json"
        self.metrics = path / "metrics.jsonl"
        self.report = path / "report.json"
        self.scores = path / "scores.json"  # of an audit, from its start
        self.weights = path / "model.safetensors"
        self.checkpoints = path / "checkpoints"

    def require_absent(self, *, can_resume: bool = True) -> None:
        """Raises if the folder holds anything: nothing is overwritten.

        Args:
            can_resume: Whether the command has `--resume`, which is then named.

        Raises:
            ConfigError: It does, or is a file.
            UserError: It cannot be read.
        """
        with readable("--run-dir", self.path):
            is_file = self.path.exists() and not self.path.is_dir()
            is_in_use = self.path.is_dir() and any(self.path.iterdir())
        if is_file:
            rule, remedy = "is a file, and nothing is overwritten", "name a folder"
            raise ConfigError(fault("--run-dir", self.path, rule, remedy))
        if is_in_use:
            rule = "holds a run or other files already, and nothing is overwritten"
            remedy = "name another folder"
            if can_resume:
                remedy = f"{remedy}, or go on with --resume {self.path}"
            raise ConfigError(fault("--run-dir", self.path, rule, remedy))

    def create(self, settings: Mapping[str, Any], *, can_resume: bool = True) -> None:
        """Makes the folder and writes the resolved settings into it.

        Args:
            settings: Sections by name.
            can_resume: As of `require_absent`.

        Raises:
            ConfigError: The folder holds something, or cannot be made.
        """
        self.require_absent(can_resume=can_resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(dict(settings), sort_keys=False)
            self.config.write_text(text, encoding="utf-8")
        except OSError as error:
            rule = f"cannot be made ({error.strerror})"
            raise ConfigError(
                fault("--run-dir", self.path, rule, "name another folder")
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training in the folder meanwhile.

        Raises:
            ConfigError: Another process does.
            UserError: The folder cannot be read.
        """
        with readable("run_dir", self.path):
            folder = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(folder)
            yield
        finally:
            os.close(folder)

    def _lock(self, folder: int) -> None:
        """Locks the open folder, or says who holds it."""
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            rule = "another process is training in it"
            raise ConfigError(
                fault("--resume", self.path, rule, "wait for its end, or stop it")
            ) from error

    def is_locked(self) -> bool:
        """Returns whether a process is training in the folder."""
        if not self.path.is_dir():
            return False
        try:
            with self.locked():
                return False
        except ConfigError:
            return True

    def require(self) -> None:
        """Raises unless the folder holds a run, and not an audited one.

        Raises:
            ConfigError: It holds none, or an audit.
            UserError: It cannot be read.
        """
        with readable("run_dir", self.path):
            holds_run = self.config.is_file()
        if not holds_run:
            rule = "holds no run (config.yaml is missing)"
            remedy = "name the folder that bin/dpsgd-train made"
            raise ConfigError(fault("run_dir", self.path, rule, remedy))
        if self.is_audit():
            rule = "holds an audit, whose run learned from canaries and kept no weights"
            remedy = "name the folder that bin/dpsgd-train made"
            raise ConfigError(fault("run_dir", self.path, rule, remedy))

    def is_audit(self) -> bool:
        """Returns whether bin/dpsgd-audit made the folder, finished or not."""
        if self.scores.exists():
            return True
        try:
            report = json.loads(self.report.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or one that its reader complains of
            return False
        return isinstance(report, dict) and "canaries" in report

    def newest_checkpoint(self) -> int | None:
        """Returns the step of the newest checkpoint, None without any.

        Raises:
            UserError: The folder of checkpoints is there and cannot be read.
        """
        with readable("run_dir", self.checkpoints):  # what a glob finds empty
            there = self.checkpoints.is_dir()
            names = os.listdir(self.checkpoints) if there else []
        found = [_CHECKPOINT.fullmatch(name) for name in names]
        return max((int(name[1]) for name in found if name), default=None)


def default_run_directory(config_path: Path, now: datetime) -> Path:
    """Returns `runs/<config>-<time>`.

    >>> default_run_directory(Path("digits.yaml"), datetime(2026, 1, 2, 3, 4, 5))
    PosixPath('runs/digits-20260102-030405')
    """
    return Path("runs") / f"{config_path.stem}-{now:%Y%m%d-%H%M%S}"


def environment() -> dict[str, Any]:
    """Returns commit, versions and hardware, so that a result can be traced."""
    import torch  # here, so that what runs have left is read without it

    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Returns the commit of the source tree, marked if it was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
