import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from made_up_runs import PLAN, evaluation, result, texts, write_run
from PIL import Image

from dpsgd.report.drawing import COLORS, LIGHT, new_axes, to_png, to_svg
from dpsgd.report.figures import (
    accuracy_figure,
    curves_of,
    epsilon_figure,
    loss_figure,
    outcomes_figure,
    throughput_figure,
    utility_figure,
)
from dpsgd.report.outcomes import Comparison, compare
from dpsgd.report.runs import RunRecord, read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    folder = tmp_path_factory.mktemp("figures") / "run"
    return read_run(write_run(folder, report=result()))


def test_colours_can_be_told_apart_by_their_value() -> None:
    for scheme in zip(*COLORS.values(), strict=True):
        assert len(set(scheme)) == len(COLORS)


def test_an_svg_follows_the_scheme_and_fetches_nothing(run: RunRecord) -> None:
    figure = accuracy_figure([run])
    assert figure is not None
    inline = to_svg(figure, "name", is_inline=True)
    alone = to_svg(figure, "name", is_inline=False)

    assert not [color for color in LIGHT.values() if color in inline]
    assert "var(--series-1)" in inline
    assert "http" not in inline
    assert re.findall(r"https?://[^\"]*", alone) == ["http://www.w3.org/2000/svg"]
    assert "prefers-color-scheme:dark" in alone
    ET.fromstring(alone)  # is well-formed
    ids = re.findall(r'\bid="([^"]*)"', inline)
    assert all(one.startswith("name-") for one in ids)
    references = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', inline)
    assert {one or other for one, other in references} <= set(ids)


def test_the_same_data_give_the_same_bytes(run: RunRecord) -> None:
    first, second = loss_figure([run]), loss_figure([run])
    assert first is not None
    assert second is not None

    assert to_svg(first, "x", is_inline=True) == to_svg(second, "x", is_inline=True)
    assert to_png(first) == to_png(second)
    assert Image.open(io.BytesIO(to_png(first))).format == "PNG"


def test_one_run_has_a_line_for_each_kind_of_weights(run: RunRecord) -> None:
    curves = curves_of([run], lambda one: one.accuracy, lambda one: one.accuracy_ema)

    assert [(one.label, one.points) for one in curves] == [
        ("averaged weights", ((2, 0.7), (4, 0.7))),
        ("last weights", ((2, 0.5), (4, 0.5))),
    ]


def test_several_runs_have_a_line_each_of_their_best_known_weights(
    run: RunRecord, tmp_path: Path
) -> None:
    lines = [evaluation(3, test_accuracy_ema=None, test_loss=None)]
    other = read_run(write_run(tmp_path / "other", lines=lines))
    curves = curves_of(
        [run, other], lambda one: one.accuracy, lambda one: one.accuracy_ema
    )

    assert [one.label for one in curves] == ["run", "other"]
    assert curves[1].points == ((3, 0.5),)
    # A line that is not there takes no other's colour.
    (loss,) = curves_of([other, run], lambda one: one.loss)
    assert (loss.label, loss.rank) == ("run", 1)


def test_steps_of_several_sizes_are_told_in_epochs(
    run: RunRecord, tmp_path: Path
) -> None:
    plan = {**PLAN, "expected_batch_size": 32.0}
    other = read_run(write_run(tmp_path / "other", plan=plan))
    older = read_run(write_run(tmp_path / "older", plan=None))
    curves = curves_of([run, other], lambda one: one.accuracy)

    assert curves[0].points == ((2 * 16 / 1437, 0.5), (4 * 16 / 1437, 0.5))
    assert curves[1].points == ((2 * 32 / 1437, 0.5), (4 * 32 / 1437, 0.5))
    assert "epochs" in texts(accuracy_figure([run, other]))
    assert "epochs" in texts(epsilon_figure([run, other]))
    assert "steps" in texts(accuracy_figure([run, other, older]))


def test_every_figure_of_a_run_says_what_it_shows(run: RunRecord) -> None:
    assert "Test accuracy, %" in texts(accuracy_figure([run]))
    assert "Test loss, nats" in texts(loss_figure([run]))
    assert "Throughput, views a second" in texts(throughput_figure([run]))
    assert {"planned: 3.00", "steps"} <= set(texts(epsilon_figure([run])))
    assert {"averaged weights", "last weights"} <= set(texts(accuracy_figure([run])))
    assert "epsilon (upper bound)" in texts(utility_figure([run]))


def test_an_axis_that_starts_at_0_has_room_above_its_highest_point(
    tmp_path: Path,
) -> None:
    lines = [evaluation(2, views_per_second=100.0), evaluation(4, views_per_second=99)]
    figure = throughput_figure([read_run(write_run(tmp_path / "run", lines=lines))])
    assert figure is not None
    bottom, top = figure.axes[0].get_ylim()

    assert bottom == 0
    assert 103 < top < 110


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    bare = read_run(write_run(tmp_path / "bare", lines=[]))
    line = evaluation(1, epsilon=None, test_loss=None, test_loss_ema=None)
    noiseless = read_run(write_run(tmp_path / "noiseless", lines=[line]))

    for draw in (accuracy_figure, loss_figure, epsilon_figure, throughput_figure):
        assert draw([bare]) is None
    assert accuracy_figure([noiseless]) is not None
    assert epsilon_figure([noiseless]) is None
    assert utility_figure([noiseless]) is None
    assert loss_figure([noiseless]) is None
    assert outcomes_figure(bare.by_class) is None


def many_classes(count: int) -> Comparison:
    accuracy = {f"class {n}": 1 - n / count for n in range(count)}
    return compare("class", accuracy, num_examples=dict.fromkeys(accuracy, count))


def test_of_very_many_classes_the_best_and_worst_are_drawn() -> None:
    few = texts(outcomes_figure(many_classes(24)))
    shown = texts(outcomes_figure(many_classes(1000)))

    assert "Test accuracy by class, %" in few
    assert {"class 0", "class 12", "class 23"} <= set(few)
    assert {"class 0", "class 11", "class 988", "class 999"} <= set(shown)
    assert not {"class 12", "class 987"} & set(shown)
    assert "best and worst 12 of 1,000" in shown


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with new_axes("title") as axes:
        axes.plot([1, 2])
    to_png(axes.figure)

    assert dict(matplotlib.rcParams) == before
