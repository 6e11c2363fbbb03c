"""The folder of a sweep: where its runs lie, and how far each has come."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpsgd.config import load_config
from dpsgd.errors import ConfigError, fault, readable
from dpsgd.report import RunDirectory
from dpsgd.sweep.plan import SweepPlan, SweepRun, identity_of

__all__ = ["RunState", "Status", "SweepFolder"]

Status = Literal["waiting", "running", "unfinished", "finished", "failed"]

_MARK = "sweep.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run has come.

    Attributes:
        status: `unfinished` has a checkpoint to go on from, `waiting` has none.
        error: Why it failed, if it did.
    """

    status: Status
    error: str | None = None


class SweepFolder:
    """Names the files of one sweep.

    Nothing in it is ever deleted or overwritten but the note of a failure, when the
    run is tried again.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def require(self, plan: SweepPlan) -> None:
        """Raises unless tables of the plan's runs belong into the folder.

        Raises:
            ConfigError: No sweep has made it, or only runs that the plan does not ask
                for have begun in it, whose tables would be lost.
            UserError: It cannot be read.
        """
        remedy = "name the folder that bin/dpsgd-sweep made for this sweep"
        if not self._is_ours():
            rule = f"holds no sweep ({_MARK} is missing)"
            raise ConfigError(fault("--sweep-dir", self.path, rule, remedy))
        begun = {path.parent.name for path in self.path.glob("runs/*/config.yaml")}
        begun |= {path.stem for path in self.path.glob("failures/*.json")}
        if begun and begun.isdisjoint(run.folder for run in plan.runs):
            rule = "holds runs of other settings only, and their report is kept"
            raise ConfigError(fault("--sweep-dir", self.path, rule, remedy))

    def _is_ours(self) -> bool:
        """Returns whether a sweep has made the folder."""
        with readable("--sweep-dir", self.path):
            return (self.path / _MARK).is_file()

    def create(self, plan: SweepPlan) -> None:
        """Makes the folder, or takes one that a sweep has made, and keeps what is read.

        Raises:
            ConfigError: It holds other files, cannot be made, or holds a run that has
                other settings than its name says.
            UserError: It cannot be read.
        """
        if not self._is_ours():
            self._require_absent()
        try:
            for name in ("runs", "logs", "failures"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            _write_once(self.path / _MARK, json.dumps({"format": _FORMAT}).encode())
            _write_once(self._kept("sweep", plan.path), plan.path.read_bytes())
            _write_once(self.base(plan), plan.base.read_bytes())
        except OSError as error:
            rule = f"cannot be made ({error.strerror})"
            raise ConfigError(
                fault("--sweep-dir", self.path, rule, "name another folder")
            ) from error
        self.check(plan)

    def _require_absent(self) -> None:
        """Raises ConfigError if the folder holds anything."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            rule = "holds other files than a sweep's, and nothing is overwritten"
            raise ConfigError(
                fault("--sweep-dir", self.path, rule, "name another folder")
            )

    def check(self, plan: SweepPlan) -> None:
        """Raises unless every run that is there has the settings that are asked for.

        Raises:
            ConfigError: One line for each run that has others.
            UserError: A run cannot be read.
        """
        faults = []
        for run in plan.runs:
            directory = self.directory(run)
            with readable("run", directory.path):
                has_begun = directory.config.is_file()
            if not has_begun:
                continue
            held = identity_of(
                load_config(directory.config, has_begun=True), run.values
            )
            if held != run.identity():
                rule = "holds a run of other settings than the sweep asks for"
                faults.append(fault("run", directory.path, rule, "move it away"))
        if faults:
            raise ConfigError("\n".join(faults))

    @contextmanager
    def locked(self, *, is_shared: bool = False) -> Iterator[None]:
        """Keeps other sweeps out of the folder meanwhile.

        Args:
            is_shared: Whether others may share it, as single runs of a sweep do.

        Raises:
            ConfigError: Another sweep is at work in it.
        """
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, kind | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            rule = "another process is sweeping in it"
            raise ConfigError(
                fault("--sweep-dir", self.path, rule, "wait for its end, or stop it")
            ) from error
        finally:
            os.close(folder)

    def base(self, plan: SweepPlan) -> Path:
        """Returns the copy of the base configuration that runs are started with."""
        return self._kept("base", plan.base)

    def directory(self, run: SweepRun) -> RunDirectory:
        """Returns the run directory of a run."""
        return RunDirectory(self.path / "runs" / run.folder)

    def log(self, run: SweepRun) -> Path:
        """Returns where a run's output goes; what it complains of is beside it."""
        return self.path / "logs" / f"{run.folder}.log"

    def errors(self, run: SweepRun) -> Path:
        """Returns where a run's complaints go."""
        return self.path / "logs" / f"{run.folder}.err"

    def state(self, run: SweepRun) -> RunState:
        """Returns how far a run has come, as its files say."""
        directory = self.directory(run)
        with readable("run", directory.path):
            is_finished = directory.report.is_file()
        if is_finished:
            return RunState("finished")
        if directory.is_locked():
            return RunState("running")
        failure = self._failure(run)
        if failure.is_file():
            return RunState("failed", _error_of(failure))
        has_checkpoint = directory.newest_checkpoint() is not None
        return RunState("unfinished" if has_checkpoint else "waiting")

    def note_failure(self, run: SweepRun, *, exit_code: int) -> None:
        """Notes that a run failed, with what it said last."""
        said = self.errors(run).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in said.splitlines() if line.strip()]
        killed = f"killed by signal {-exit_code}" if exit_code < 0 else None
        error = killed or (lines[-1] if lines else f"exit code {exit_code}")
        note = {"exit_code": exit_code, "error": error}
        self._failure(run).write_text(json.dumps(note), encoding="utf-8")

    def forget_failure(self, run: SweepRun) -> None:
        """Lets a run that failed be tried again; its log is kept."""
        self._failure(run).unlink(missing_ok=True)

    def move_aside(self, run: SweepRun) -> None:
        """Makes room for a run that ended before its first checkpoint."""
        path = self.directory(run).path
        if not path.exists():
            return
        aside = self.path / "abandoned"
        aside.mkdir(exist_ok=True)
        number = 1
        while (aside / f"{run.folder}-{number}").exists():
            number += 1
        path.rename(aside / f"{run.folder}-{number}")

    def others(self, plan: SweepPlan) -> list[Path]:
        """Returns the run directories that the plan does not ask for."""
        wanted = {run.folder for run in plan.runs}
        found = (path.parent for path in self.path.glob("runs/*/config.yaml"))
        return sorted(path for path in found if path.name not in wanted)

    def _failure(self, run: SweepRun) -> Path:
        """Returns the note of a failure."""
        return self.path / "failures" / f"{run.folder}.json"

    def _kept(self, name: str, path: Path) -> Path:
        """Returns where a copy of a file lies, by its content."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:10]
        return self.path / f"{name}-{digest}.yaml"


def _write_once(path: Path, content: bytes) -> None:
    """Writes a file that is not there yet, whole or not at all."""
    if path.exists():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _error_of(failure: Path) -> str:
    """Returns why a run failed, from its note."""
    try:
        return str(json.loads(failure.read_text(encoding="utf-8"))["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return "failed; the note of it is damaged"
