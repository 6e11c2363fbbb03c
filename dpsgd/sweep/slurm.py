"""A sweep on many machines: a SLURM array, each of whose tasks makes one run.

An array needs nothing but the scheduler that clusters already have: the index of a task
is the index of a run, and a task that ends early goes on when the same script is
submitted again. Ray would add a service to start and a dependency to keep.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.plan import SweepPlan

__all__ = ["slurm_script"]

_SECONDS_TO_SAVE = 120


def slurm_script(
    plan: SweepPlan,
    folder: SweepFolder,
    *,
    command: Sequence[str],
    working_directory: Path,
) -> str:
    """Returns a script for sbatch.

    Args:
        plan: The sweep; its `slurm` options come last, so that they decide.
        folder: Where it goes.
        command: How dpsgd-sweep is started on the machines of the cluster.
        working_directory: Where data are looked for.
    """
    options = {
        "job-name": f"dpsgd-{plan.path.stem}",
        "array": f"0-{len(plan.runs) - 1}",
        "chdir": str(working_directory),
        "output": str(folder.path.resolve() / "logs" / "slurm-%A-%a.out"),
        # A task is told before its time is over, and then saves a checkpoint.
        "signal": f"B:TERM@{_SECONDS_TO_SAVE}",
        **plan.slurm,
    }
    sweep = [
        *command,
        str(plan.path.resolve()),
        "--sweep-dir",
        str(folder.path.resolve()),
    ]
    called = shlex.join(sweep)
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={shlex.quote(text)}" for name, text in options.items()),
        "",
        *(f"# {run.index}: {run.label}" for run in plan.runs),
        "#",
        "# Submit it again to go on with what did not finish. When all has ended:",
        f"#   {called} --summary",
        "",
        f'exec {called} --only "$SLURM_ARRAY_TASK_ID"',
    ]
    return "\n".join(lines) + "\n"
