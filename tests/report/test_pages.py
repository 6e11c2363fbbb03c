import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_runs import (
    NON_PRIVATE_RUN,
    PARQUET,
    evaluation,
    result,
    write_run,
)

from dpsgd.errors import ConfigError
from dpsgd.report import comparison_report, read_run, run_report
from dpsgd.report.page import Report
from dpsgd.report.runs import RunRecord

VOID = {"meta", "br", "hr"}
PAPER = "https://arxiv.org/abs/2204.13650"
EVIL = '<script>alert("x")</script>&'


class Outline(HTMLParser):
    """Headings, references and tags of a page; fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "srcset", "data", "action", "xlink:href"):
                (self.links if tag == "a" else self.fetched).append(str(value))
            if name == "id":
                self.ids.append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def outline(html: str) -> Outline:
    read = Outline()
    read.feed(html)
    read.close()
    assert read.open == []
    return read


def words_of(html: str) -> str:
    """What a reader sees, without style sheets."""
    text = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    folder = tmp_path_factory.mktemp("pages") / "run"
    return read_run(write_run(folder, report=result()))


@pytest.fixture(scope="module")
def report(run: RunRecord) -> Report:
    """The report of a finished run."""
    return run_report(run)


def test_the_sections_of_a_run_begin_with_its_privacy(report: Report) -> None:
    read = outline(report.html)

    assert read.headings == [
        "run",
        "(2.9999, 1e-05)-differential privacy per example",
        "Accuracy",
        "Curves",
        "Classes",
        "Speed and memory",
        "Settings and versions",
    ]
    names = ["accuracy", "loss", "epsilon", "throughput", "classes"]
    assert [one.name for one in report.drawn] == names
    files = ["report.html", *(f"figures/{name}.png" for name in names)]
    assert list(report.contents()) == files
    assert report.html.count("<svg") == 5


def test_a_page_fetches_nothing_and_runs_nothing(report: Report) -> None:
    html = report.html
    read = outline(html)

    assert read.links == [PAPER]
    assert all(target.startswith("#") for target in read.fetched)
    assert not read.tags & {"script", "link", "img", "iframe", "object", "form"}
    assert re.findall(r"https?:[^\"]*", html) == [PAPER]
    assert "@import" not in html
    assert not [one for one in re.findall(r"url\(([^)]*)\)", html) if one[0] != "#"]
    assert "default-src &#x27;none&#x27;" in html
    assert len(read.ids) == len(set(read.ids))


def test_a_page_has_both_schemes_and_fits_a_phone(report: Report) -> None:
    html = report.html

    assert "color-scheme:light dark" in html
    assert "prefers-color-scheme:dark" in html
    assert "width=device-width" in html
    _, narrow = html.split("@media (max-width: 40rem)")
    assert re.search(r"first-child \{\s*position: sticky; left: 0;", narrow)


def test_figures_that_are_looked_for_first_are_there(report: Report) -> None:
    words = words_of(report.html)

    for text in (
        "Averaged weights 70.0 % 95 % interval 63.3 to 75.9 %",
        "Last weights 50.0 %",
        "Test loss 1.2 averaged weights",
        "Largest class gap 40.0 points between cat and dog",
        "The largest gap is 40.0 points, between cat (90.0 %) and dog (50.0 %). "
        "Their 95 % intervals do not overlap.",
        "Throughput 8 views a second",
        "A step 2 s",
        "Time in all 1 min 15 s",
        "Peak memory 3.0 GiB of the process",
        "expected_batch_size 16",
        "torch 2.14.1",
        "commit 0123abcd",
    ):
        assert text in words, text


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        (
            {"lines": []},
            ["Not finished", "There is no evaluation yet; one is due every 2"],
        ),
        (
            {"lines": [evaluation(2)], "checkpoints": ["step-00000003.safetensors"]},
            [
                "not finished; 3 of 4 steps",
                "Epsilon 1.4998 upper bound; delta 1e-05; at the last evaluation, "
                "step 2",
            ],
        ),
        (
            {"lines": [evaluation(1)], "report": result(num_steps=1)},
            ["1 of 4 steps", "Test accuracy, %"],
        ),
        (
            {
                "lines": [evaluation(4, epsilon=None)],
                "report": result(epsilon=None),
                "settings": {"privacy.noise_multiplier": 0},
            },
            ["NO privacy guarantee", "Epsilon infinite"],
        ),
        (
            NON_PRIVATE_RUN,
            ["NO privacy guarantee", "neither clipped nor noised", "Epsilon infinite"],
        ),
        (
            {
                "lines": [evaluation(4, test_accuracy_ema=None, test_loss_ema=None)],
                "report": result(),
            },
            ["Of the last weights", "Test loss 1.5 last weights"],
        ),
        (
            {"report": result(per_class_accuracy=None, peak_memory_bytes=None)},
            ["is not recorded", "Peak memory not recorded"],
        ),
        (
            {"report": result(per_class_num_examples=None)},
            ["Accuracy by class is measured when a run ends, and is not recorded"],
        ),
        ({"plan": None, "lines": []}, ["No guarantee is recorded"]),
    ],
    ids=[
        "interrupted before the first evaluation",
        "interrupted after the last evaluation",
        "one step",
        "without noise",
        "without privacy",
        "without an average",
        "without classes and memory",
        "without counts of classes",
        "older and unfinished",
    ],
)
def test_odd_runs_have_a_page(
    tmp_path: Path, changes: dict[str, Any], texts: list[str]
) -> None:
    report = run_report(read_run(write_run(tmp_path / "run", **changes)))
    words = words_of(report.html)

    outline(report.html)
    assert not [text for text in texts if text not in words]
    assert "None" not in words
    assert not re.search(r"\bnan\b", words)


def test_groups_of_the_test_set_have_a_section_of_their_own(tmp_path: Path) -> None:
    report = result(
        per_group_accuracy={"north": 0.25, "south": 0.75},
        per_group_num_examples={"north": 100, "south": 100},
    )
    settings = {**PARQUET, "data.group_column": "site"}
    run = read_run(write_run(tmp_path / "run", settings=settings, report=report))
    page = run_report(run)
    words = words_of(page.html)

    assert outline(page.html).headings[4:6] == ["Classes", "Groups"]
    assert [one.name for one in page.drawn][-2:] == ["classes", "groups"]
    assert "Largest group gap 50.0 points between south and north" in words
    assert "site accuracy 95 % interval examples south 75.0 %" in words
    other = read_run(write_run(tmp_path / "other", report=result()))
    both = comparison_report([run, other])
    assert words_of(both.html).count("Groups") == 1
    assert len(set(outline(both.html).ids)) == len(outline(both.html).ids)


def test_nothing_in_files_becomes_markup(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "<b>run</b>",
        settings={"data.source": "parquet", "data.name": EVIL, "data.test": EVIL},
        report=result(
            per_class_accuracy={EVIL: 0.5, "b": 0.25},
            per_class_num_examples={EVIL: 4, "b": 4},
            versions={EVIL: EVIL},
            **dict.fromkeys(
                (
                    "commit",
                    "device",
                    "outcome",
                    "accountant",
                    "adjacency",
                    "cuda",
                    "unit",
                    "noise",
                ),
                EVIL,
            ),
        ),
    )
    (folder / "environment.json").unlink()
    run = read_run(folder)
    other = read_run(write_run(tmp_path / EVIL.replace("/", "_"), report=result()))

    for html in (run_report(run).html, comparison_report([run, other]).html):
        read = outline(html)
        assert not read.tags & {"script", "b>run<"}
        assert "<b>run" not in html
        assert "&lt;script&gt;" in html


def test_a_comparison_has_its_sections_and_every_run(
    run: RunRecord, tmp_path: Path
) -> None:
    settings = {"train.seed": 3, "optimizer.learning_rate": 2}
    seeded = read_run(
        write_run(tmp_path / "seeded", settings=settings, report=result())
    )
    report = comparison_report([run, seeded])
    read = outline(report.html)
    words = words_of(report.html)

    assert read.headings[:7] == [
        "Comparison of 2 runs",
        "Privacy",
        "Results",
        "Curves",
        "Speed and memory",
        "What the runs have set differently",
        "Each run",
    ]
    assert len(read.ids) == len(set(read.ids))
    assert "optimizer.learning_rate 0.5 2" in words
    assert "train.seed null 3" in words
    assert "optimizer.momentum 0 0" not in words
    assert "Runs with a seed have no guarantee" in words
    assert {"accuracy", "utility"} <= {one.name for one in report.drawn}


def test_a_comparison_tells_what_unfinished_and_older_runs_record(
    run: RunRecord, tmp_path: Path
) -> None:
    older = write_run(tmp_path / "older", settings={"optimizer.learning_rate": 2})
    config = yaml.safe_load((older / "config.yaml").read_text())
    del config["optimizer"]["momentum"], config["optimizer"]["learning_rate"]
    (older / "config.yaml").write_text(yaml.safe_dump(config))
    third = write_run(
        tmp_path / "third",
        settings={"optimizer.learning_rate": 4},
        lines=[evaluation(2)],
        checkpoints=["step-00000003.safetensors"],
    )
    runs = [run, read_run(older), read_run(third)]
    words = words_of(comparison_report(runs).html)

    assert "there are no weights to release yet 1.4998 at step 2 2.9999 1e-05" in words
    assert "1.4998 1.25 16 3 of 4, evaluated at 2" in words
    assert "older 8 8 s not recorded not recorded cpu" in words
    assert "optimizer.learning_rate 0.5 not recorded 4" in words
    assert "optimizer.momentum 0 not recorded 0" not in words


def test_a_comparison_with_a_run_without_privacy_has_no_guarantee(
    run: RunRecord, tmp_path: Path
) -> None:
    without = write_run(tmp_path / "without", **NON_PRIVATE_RUN)
    words = words_of(comparison_report([run, read_run(without)]).html)

    assert "Together the runs have no guarantee." in words
    assert "without NO privacy guarantee infinite infinite none" in words
    assert "70.0 % 50.0 % 40.0 infinite none 16 4 of 4" in words
    assert "70.0 % 50.0 % 40.0 2.9999 1.25 16 4 of 4" in words
    tables, _, _ = words.partition("What the runs have set differently")
    assert "not recorded" not in tables


def test_runs_on_the_same_data_add_up_and_are_told_apart(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / name / "run", lines=[], report=result()))
        for name in "ab"
    ]
    words = words_of(comparison_report(runs).html)

    assert "(5.9998, 2e-05)-differentially private per example together" in words
    assert f"{tmp_path}/a/run, {tmp_path}/b/run" in words
    with pytest.raises(ConfigError, match="is given twice"):
        comparison_report([runs[0], runs[0]])
