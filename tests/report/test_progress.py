import io
import re

import pytest
from rich.console import Console

from dpsgd.report import ProgressView


def shown(width: int, *, is_terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=is_terminal)
    with ProgressView(console, num_steps=2468, step=0) as view:
        view.show_step(1300, epsilon=5.12341, views_per_second=12345.6)
        view.show_evaluation(
            1300, epsilon=5.12341, accuracies={"last": 0.5, "ema": 0.654321}
        )
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_has_all_of_it_in_one_line(width: int) -> None:
    text = shown(width, is_terminal=True)
    (bar,) = {
        line.rstrip()
        for line in re.split(r"[\r\n]+", text)
        if "1300/2468" in line and "views/s" in line
    }

    assert "eps <= 5.124" in bar  # rounded up: it is a bound
    assert "12,346 views/s" in bar
    assert "left" in bar
    assert len(bar) <= width
    assert "step 1300/2468  eps <= 5.1235  test: last 50.00%  ema 65.43%" in text


def test_a_file_gets_plain_lines() -> None:
    text = shown(80, is_terminal=False)

    assert text == "step 1300/2468  eps <= 5.1235  test: last 50.00%  ema 65.43%\n"


def test_a_file_gets_a_line_for_steps_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    view = ProgressView(Console(file=stream), num_steps=9, step=0)
    for step in range(1, 10):
        now[0] += 10
        view.show_step(step, epsilon=float("inf"), views_per_second=1.0)

    lines = stream.getvalue().splitlines()
    expected = "NO privacy guarantee  1 views/s"
    assert lines == [f"step {step}/9  {expected}" for step in (3, 6, 9)]
