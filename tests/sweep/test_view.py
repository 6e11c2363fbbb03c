import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from sweep_runs import leave_run

from dpsgd.sweep.folder import RunState, SweepFolder
from dpsgd.sweep.plan import SweepPlan, read_sweep
from dpsgd.sweep.view import SweepView, runs_table


def shown(
    folder: SweepFolder, plan: SweepPlan, *, is_terminal: bool, height: int = 40
) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100, height=height, force_terminal=is_terminal)
    first, second = plan.runs[:2]
    with SweepView(console, folder, plan) as view:
        view.look({0: "GPU 0", 1: "GPU 1"})
        leave_run(folder, first)
        folder.errors(second).write_text("field=[1]: rule; remedy")
        folder.note_failure(second, exit_code=2)
        view.look({2: "GPU 0"})
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_file_gets_a_line_for_each_change(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    assert shown(folder, plan, is_terminal=False).splitlines() == [
        "run 0 (learning_rate=0.5 seed=0) started on GPU 0",
        "run 1 (learning_rate=0.5 seed=1) started on GPU 1",
        "run 0 (learning_rate=0.5 seed=0) finished: 70.00 %",
        "run 1 (learning_rate=0.5 seed=1) failed: field=[1]: rule; remedy",
        "run 2 (learning_rate=1 seed=0) started on GPU 0",
    ]


def test_a_terminal_has_a_table_that_is_kept_up_to_date(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    last = shown(folder, plan, is_terminal=True).split("rates")[-1]
    cells = [
        [cell.strip() for cell in re.split("[│┃]", line)] for line in last.splitlines()
    ]
    rows = {row[1]: row[2:8] for row in cells if len(row) > 7}

    label = "learning_rate=0.5 seed=0"
    assert rows["0"] == [label, "finished", "4/4", "3.000", "70.00 %", ""]
    assert rows["2"][5] == "0 s"  # whole seconds of what has just begun
    assert [rows[index][1] for index in "123"] == ["failed", "running", "waiting"]
    assert "field=[1]: rule; remedy" in last
    assert "1 running, 1 failed, 1 finished, 1 waiting" in last


def test_where_there_is_no_room_those_at_work_and_failed_are_shown(
    sweep_file: Callable[..., Path],
) -> None:
    plan = read_sweep(sweep_file(grid={"train.seed": list(range(60))}))
    states = [RunState("waiting")] * 60
    states[50], states[59] = RunState("running"), RunState("failed", "why")
    rows = [
        (run, state, ("", "", "", ""))
        for run, state in zip(plan.runs, states, strict=True)
    ]
    stream = io.StringIO()
    Console(file=stream, width=80).print(runs_table(rows, title="many", room=5))
    text = stream.getvalue()

    assert {"seed=50", "seed=59", "seed=0", "seed=2"} <= set(
        re.findall(r"seed=\d+", text)
    )
    assert "seed=3 " not in text
    assert "55 more runs are not shown" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(plan: SweepPlan, width: int) -> None:
    rows = [
        (
            run,
            RunState("failed", "a long error " * 9),
            ("4/4", "2.999", "70.00 %", "3 s"),
        )
        for run in plan.runs
    ]
    stream = io.StringIO()
    Console(file=stream, width=width).print(runs_table(rows, title="x", room=9))

    assert max(len(line) for line in stream.getvalue().splitlines()) <= width
    assert "70.00 %" in stream.getvalue()
