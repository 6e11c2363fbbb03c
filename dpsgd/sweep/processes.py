"""Runs as processes: one a slot, stopped cleanly, their ends noted."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import dpsgd
from dpsgd.errors import ConfigError, fault, writable
from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.plan import SweepPlan, SweepRun

__all__ = ["Slot", "run_all", "slots_of", "train_command"]

# What dpsgd-train returns when a signal stopped it and its checkpoint is written.
_STOPPED: Final = (130, 143)
_SECONDS_BETWEEN_LOOKS = 0.2

Command = Callable[[SweepRun], list[str]]


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one process.

    Attributes:
        name: `cpu` or `GPU 0`.
        environment: Variables that keep the process to its share of the machine.
    """

    name: str
    environment: Mapping[str, str]


def slots_of(
    plan: SweepPlan, *, jobs: int, num_gpus: int, environment: Mapping[str, str]
) -> list[Slot]:
    """Returns a slot for each GPU, or `jobs` slots on the CPU.

    Args:
        plan: Whose runs say which device they want.
        jobs: Processes at once on a CPU, > 0.
        num_gpus: GPUs of this machine.
        environment: Variables of this process; CUDA_VISIBLE_DEVICES limits the GPUs.

    Raises:
        ConfigError: A run wants a certain GPU, while the sweep hands them out.
    """
    devices = {run.config.runtime.device for run in plan.runs}
    for device in sorted(devices):
        if device not in ("auto", "cpu", "cuda"):
            rule = "a sweep hands out the GPUs itself"
            raise ConfigError(fault("runtime.device", device, rule, "set auto"))
    if num_gpus and devices != {"cpu"}:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        names = [name.strip() for name in visible.split(",") if name.strip()]
        names = names or [str(number) for number in range(num_gpus)]
        return [Slot(f"GPU {name}", {"CUDA_VISIBLE_DEVICES": name}) for name in names]
    share = {}
    if jobs > 1 and "OMP_NUM_THREADS" not in environment:
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    return [Slot("cpu", share) for _ in range(jobs)]


def train_command(folder: SweepFolder, plan: SweepPlan, run: SweepRun) -> list[str]:
    """Returns the command that starts a run, or goes on with it."""
    module = [sys.executable, "-P", "-m", "dpsgd.cli.train"]
    directory = folder.directory(run).path
    if folder.state(run).status == "unfinished":
        return [*module, "--resume", str(directory)]
    overrides = [word for text in run.overrides for word in ("--set", text)]
    return [*module, str(folder.base(plan)), "--run-dir", str(directory), *overrides]


def run_all(
    folder: SweepFolder,
    runs: Iterable[SweepRun],
    slots: Sequence[Slot],
    *,
    command: Command,
    on_look: Callable[[Mapping[int, str]], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Runs processes until all have ended, or a stop is requested.

    A stop is handed to every process as SIGTERM, at which it writes a checkpoint and
    ends; this waits for all of them. A process that ends otherwise than well, and was
    not stopped, is noted as failed, and the others go on.

    Args:
        folder: Where logs and notes go.
        runs: What to run, in order.
        slots: Room for processes.
        command: The command of a run, asked for when it starts.
        on_look: Told several times a second which runs have a process, by index, and
            in which slot.
        stop_requested: Asked as often.

    Raises:
        ConfigError: A log cannot be written.
    """
    waiting = list(runs)
    free = list(slots)
    working: list[_Process] = []
    is_stopping = False
    try:
        while waiting or working:
            if stop_requested() and not is_stopping:
                is_stopping = True
                waiting.clear()
                for one in working:
                    one.process.terminate()
            while waiting and free:
                run, slot = waiting.pop(0), free.pop(0)
                working.append(_Process(folder, run, slot, command(run)))
            on_look({one.run.index: one.slot.name for one in working})
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for one in [one for one in working if one.process.poll() is not None]:
                working.remove(one)
                free.append(one.slot)
                one.close(was_stopped=is_stopping)
    finally:
        for one in working:  # an error of ours must not leave orphans
            one.process.terminate()
            one.process.wait()
            one.close(was_stopped=True)
    on_look({})


class _Process:
    """One run at work.

    Args:
        folder: Where its output goes.
        run: What it does.
        slot: Where it does it.
        command: How it is started.
    """

    def __init__(
        self, folder: SweepFolder, run: SweepRun, slot: Slot, command: list[str]
    ) -> None:
        self.run = run
        self.slot = slot
        self._folder = folder
        remedy = "give access to it, or name another folder"
        with writable("--sweep-dir", folder.path, remedy=remedy):
            self._output = folder.log(run).open("ab")
            self._errors = folder.errors(run).open("wb")
        package = str(Path(dpsgd.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        unbuffered = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            env={**os.environ, **unbuffered, **slot.environment},
            start_new_session=True,  # a Ctrl-C in the terminal is for the sweep alone
        )

    def close(self, *, was_stopped: bool) -> None:
        """Closes the logs, and notes a failure that nobody asked for."""
        self._output.close()
        self._errors.close()
        code = self.process.returncode
        if code != 0 and code not in _STOPPED and not was_stopped:
            self._folder.note_failure(self.run, exit_code=code)
