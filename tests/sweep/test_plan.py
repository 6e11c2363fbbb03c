from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpsgd.config import load_config
from dpsgd.errors import ConfigError
from dpsgd.sweep.plan import SweepPlan, read_sweep

Write = Callable[..., Path]
TWICE = ["a b", "ab", "a  b"]  # of which tables show two alike


def test_a_grid_is_all_combinations_in_order(plan: SweepPlan) -> None:
    assert [run.label for run in plan.runs] == [
        "learning_rate=0.5 seed=0",
        "learning_rate=0.5 seed=1",
        "learning_rate=1 seed=0",
        "learning_rate=1 seed=1",
    ]
    assert [run.index for run in plan.runs] == [0, 1, 2, 3]
    assert plan.runs[2].overrides == ("optimizer.learning_rate=1", "train.seed=0")
    assert plan.runs[2].values == {"optimizer.learning_rate": 1.0, "train.seed": 0}
    assert plan.columns == ("optimizer.learning_rate", "train.seed")
    assert plan.axes == ("optimizer.learning_rate",)


def test_every_entry_of_a_list_meets_every_combination(sweep_file: Write) -> None:
    entries = [
        {"name": "plain", "ema.decay": None},
        {"name": "averaged", "ema.decay": "0.9", "train.num_steps": 3},
    ]
    plan = read_sweep(sweep_file(list=entries, grid={"train.seed": [0, 1]}))

    assert [run.label for run in plan.runs] == [
        "plain seed=0",
        "plain seed=1",
        "averaged seed=0",
        "averaged seed=1",
    ]
    assert plan.axes == ("entry",)
    assert plan.columns == ("entry", "ema.decay", "train.num_steps", "train.seed")
    assert plan.runs[0].values["train.num_steps"] == 4  # of the base config
    assert plan.runs[2].config.ema.decay == 0.9


def test_values_reach_the_trainer_as_they_are_meant(sweep_file: Write) -> None:
    grid = {
        "data.mean": [[0.5], [0.25]],
        "data.name": ["a b", "true", "caf\u00e9"],
        "ema.decay": [None],
        "model.weight_standardization": [False],
        "privacy.delta": ["1e-5"],
    }
    path = sweep_file(grid=grid)
    plan = read_sweep(path)

    assert len(plan.runs) == 6
    for run in plan.runs:
        assert load_config(path.parent / "small.yaml", run.overrides) == run.config
    names = {run.config.data.name for run in plan.runs}
    assert names == {"a b", "true", "caf\u00e9"}
    assert plan.runs[0].config.data.mean == (0.5,)
    assert plan.runs[0].config.ema.decay is None


def test_a_folder_is_named_after_the_settings_and_nothing_else(
    sweep_file: Write,
) -> None:
    before = read_sweep(sweep_file())
    grid = {"train.seed": [1, 0], "optimizer.learning_rate": ["0.50", "1e0", 3]}
    common = {"runtime.checkpoint_every": 3, "eval.every": 4}
    after = read_sweep(sweep_file(grid=grid, set=common))

    known = {run.folder.rpartition("-")[2] for run in before.runs}
    found = {run.folder.rpartition("-")[2] for run in after.runs}
    assert len(known) == 4
    assert known < found
    # What is swept counts, even where a run may go on with another value.
    apart = read_sweep(sweep_file(grid={"runtime.microbatch_size": [1, 2]}))
    assert len({run.folder for run in apart.runs}) == 2


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"privacy": {"noise_multiplier": 2.0}}, False),
        ({"data": {"test": "other.parquet"}}, False),
        ({"data": {"root": "elsewhere"}}, True),
        ({"runtime": {"keep_checkpoints": 9}}, True),
    ],
)
def test_another_base_config_gives_other_folders_unless_results_are_the_same(
    sweep_file: Write, change: dict[str, dict[str, Any]], is_same: bool
) -> None:
    path = sweep_file()
    base = yaml.safe_load((path.parent / "small.yaml").read_text())
    base["data"]["source"] = "parquet"
    (path.parent / "small.yaml").write_text(yaml.safe_dump(base))
    before = [run.folder for run in read_sweep(path).runs]
    for section, values in change.items():
        base[section].update(values)
    (path.parent / "small.yaml").write_text(yaml.safe_dump(base))

    assert ([run.folder for run in read_sweep(path).runs] == before) is is_same


def test_names_of_folders_are_safe(sweep_file: Write) -> None:
    entries = [{"name": "../+ 16 views/" * 20, "train.num_steps": 3}]
    (run,) = read_sweep(sweep_file(list=entries)).runs

    assert "/" not in run.folder
    assert not run.folder.startswith(".")
    assert len(run.folder) < 100


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({"grid": {}}, "nothing is swept"),
        ({"gird": {}}, "gird={}: unknown key of a sweep; did you mean `grid`"),
        ({"grid": {"train.seed": 3}}, r"grid\.train\.seed=3: must be a list of values"),
        ({"grid": {"train.seed": []}}, "must be a list of values"),
        ({"grid": {"seed": [1]}}, r"grid\.seed=\['1'\]: must be section\.key"),
        ({"grid": {"train.sed": [1]}}, r"train\.sed=1: unknown key; did you mean"),
        ({"grid": {"train.num_steps": [0]}}, r"train\.num_steps=0: must be above 0"),
        ({"grid": {"name": ["a"]}}, r"grid\.name=\['a'\]: must be a list of values"),
        ({"list": {"train.seed": 1}}, "list=.*must be a list of mappings"),
        ({"list": [3]}, r"list\[0\]=3: must map section\.key to values"),
        (
            {"list": [{"name": "a", "train.seed": 1}, {"train.seed": 2}]},
            "some entries have a name; name them all",
        ),
        (
            {"list": [{"name": None, "train.seed": 1}]},
            "some entries have a name; name them all",
        ),
        (
            {"list": [{"name": n, "train.seed": s} for s, n in enumerate(TWICE)]},
            r"^list\[2\]\.name=a b: is the name of list\[0\], too; give each .* own$",
        ),
        (
            {"grid": {"train.seed": [1]}, "set": {"train.seed": 2}},
            r"train\.seed=\.\.\.: is set in two of",
        ),
        (
            {"grid": {"train.seed": ["1", "01e0"]}},
            r"train\.seed=01e0: must be",
        ),
        (
            {"grid": {"optimizer.learning_rate": ["1", "1e0"]}},
            "run=learning_rate=1: has the same settings as `learning_rate=1`",
        ),
        ({"grid": {"train.seed": [1]}, "x": "train.sed"}, "x=train.sed: is neither"),
        ({"grid": {"train.seed": [1]}, "jobs": 0}, "jobs=0: must be a whole number"),
        (
            {"grid": {"train.seed": [1]}, "slurm": {"array": 3}},
            r"slurm\.array=3: is decided by the sweep",
        ),
        (
            {"grid": {"train.seed": [1]}, "slurm": {"time": "1\n#SBATCH -x"}},
            r"slurm\.time=.*must be a long option",
        ),
        (
            {"grid": {"train.seed": [1]}, "slurm": {"gpus": [1]}},
            r"slurm\.gpus=\['1'\]: must be one value; write it like \{gpus: 1\}$",
        ),
        (
            {"grid": {"train.seed": [1]}, "slurm": {"gpus": {"a": 1}, "time": None}},
            r"slurm\.gpus=\{'a': '1'\}: must be.*\nslurm\.time=null: must be one value",
        ),
        ({"grid": {"train.seed": [1]}, "config": None}, "config=null: must name the"),
        ({"grid": {"train.seed": [1]}, "config": "no.yaml"}, r"no\.yaml: cannot be"),
    ],
)
def test_a_fault_is_told_before_anything_is_started(
    sweep_file: Write, content: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern):
        read_sweep(sweep_file(**content))


def test_all_faults_are_told_at_once_and_each_once(sweep_file: Write) -> None:
    grid = {"train.num_steps": [0, -1], "train.seed": [1, 2], "model.width": ["x"]}

    with pytest.raises(ConfigError) as error:
        read_sweep(sweep_file(grid=grid))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "model.width=x",
        "train.num_steps=0",
        "train.num_steps=-1",
    ]
