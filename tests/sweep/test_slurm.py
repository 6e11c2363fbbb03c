import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.plan import SweepPlan, read_sweep
from dpsgd.sweep.slurm import slurm_script


def script_of(plan: SweepPlan, folder: SweepFolder, command: str = "sweep") -> str:
    return slurm_script(
        plan, folder, command=[command], working_directory=Path("/some where")
    )


def test_each_run_is_a_task_that_is_told_to_save_before_its_end(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    script = script_of(plan, folder)
    lines = script.splitlines()

    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --array=0-3" in lines
    assert "#SBATCH --signal=B:TERM@120" in lines
    assert "#SBATCH --chdir='/some where'" in lines
    assert "# 2: learning_rate=1 seed=0" in lines
    # Options count only before the first command.
    commands = [n for n, line in enumerate(lines) if line and line[0] != "#"]
    assert max(n for n, line in enumerate(lines) if "#SBATCH" in line) < commands[0]


def test_options_of_the_sweep_file_decide(
    folder: SweepFolder, sweep_file: Callable[..., Path]
) -> None:
    slurm = {"time": "02:00:00", "gpus": "1", "job-name": "mine"}
    plan = read_sweep(sweep_file(grid={"train.seed": [0, 1]}, slurm=slurm))
    lines = script_of(plan, folder).splitlines()

    assert {"#SBATCH --time=02:00:00", "#SBATCH --gpus=1"} <= set(lines)
    assert [line for line in lines if "job-name" in line] == ["#SBATCH --job-name=mine"]


def test_a_task_makes_the_run_of_its_index(
    folder: SweepFolder, plan: SweepPlan, tmp_path: Path
) -> None:
    sweep = tmp_path / "dp sweep"
    sweep.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    sweep.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script_of(plan, folder, str(sweep))],
        env={"SLURM_ARRAY_TASK_ID": "3"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines() == [
        str(plan.path),
        "--sweep-dir",
        str(folder.path),
        "--only",
        "3",
    ]
    assert shlex.quote(str(sweep)) in script_of(plan, folder, str(sweep))
