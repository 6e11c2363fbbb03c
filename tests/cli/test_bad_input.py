import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from small_runs import command, dpsgd_train, write_config

NO_CUDA = pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a CUDA device"
)


def told(
    capsys: pytest.CaptureFixture[str], config: str | Path, *overrides: str
) -> list[str]:
    """Lines of complaint of a run that must be refused and leave no folder."""
    run = Path(config).parent / "run"
    arguments = [word for change in overrides for word in ("--set", change)]
    capsys.readouterr()
    assert dpsgd_train(config, "--run-dir", run, *arguments) == 2
    captured = capsys.readouterr()
    assert not run.exists()
    lines = captured.err.splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[^;]+: .+; .+", line), line
    return lines


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        (
            "privacy.epsilon=3",
            r"privacy\.epsilon=3: unknown key; did you mean .*_epsilon`",
        ),
        ("optimizer.learning_rat=3", r"unknown key; did you mean .*learning_rate`"),
        ("optimiser.learning_rate=3", r"unknown section; did you mean `optimizer`"),
        ("train.num_steps=many", r"train\.num_steps=many: must be .*; "),
        ("train.num_steps=1.5", r"train\.num_steps=1\.5: must be a whole number; "),
        ("train.num_steps=0", r"train\.num_steps=0: must be above 0"),
        ("train.seed=true", r"train\.seed=True: must be "),
        ("data.augmentation=rotate", r"data\.augmentation=rotate: must be `none` or "),
        ("privacy.target_epsilon=3", r"target_epsilon=3\.0 and .*exactly one .*remove"),
        ("privacy.noise_multiplier=null", r"target_epsilon=null and .*; give one"),
        ("privacy.target_epsilon=0", r"privacy\.target_epsilon=0: must be above 0"),
        ("privacy.target_epsilon=-1", r"privacy\.target_epsilon=-1: must be above 0"),
        ("privacy.delta=1", r"privacy\.delta=1\.0: must be in \(0, 1\)"),
        (
            "privacy.delta=7e-4",
            r"privacy\.delta=0\.0007: must be below 1/num_examples \(7\.0e-04\); lower",
        ),
        (
            "privacy.expected_batch_size=1438",
            r"expected_batch_size=1438\.0: the sample rate would pass 1: .* 1437",
        ),
        ("privacy.expected_batch_size=0", r"expected_batch_size=0: must be above 0"),
        ("privacy.clipping_norm=0", r"privacy\.clipping_norm=0: must be above 0"),
        ("privacy.noise_multiplier=-1", r"noise_multiplier=-1: must be at least 0"),
        ("privacy.accountant=moments", r"accountant=moments: is not known; "),
        (
            "runtime.microbatch_size=1000000000",
            r"microbatch_size=1000000000: needs about .* GiB, .* largest that fits is",
        ),
        ("runtime.microbatch_size=0", r"runtime\.microbatch_size=0: must be "),
        pytest.param(
            "runtime.device=cuda",
            r"runtime\.device=cuda: this machine has 0 CUDA devices; take cpu or auto",
            marks=NO_CUDA,
        ),
        pytest.param(
            "runtime.execution=cuda_graph",
            r"runtime\.execution=cuda_graph: needs a CUDA device.*; take auto",
            marks=NO_CUDA,
        ),
        ("model.num_classes=9", r"model\.num_classes=9: the data set declares 10"),
        ("model.name=resnet", r"model\.name=resnet: unknown model; "),
        ("model.depth=17", r"model\.depth=17: "),
        ("data.source=parquet", r"data\.train=null: must name the files"),
        ("nonsense", r"--set=nonsense: must be section\.key=value; "),
        ("privacy.max_epsilon=1e-5", r"num_steps=1: passes max_epsilon=1e-05 after 0"),
    ],
)
def test_a_bad_setting_is_told_with_field_value_rule_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, pattern: str
) -> None:
    (line,) = told(capsys, write_config(tmp_path), override)

    assert re.search(pattern, line), line


def test_all_faults_are_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["privacy.epsilon=3", "train.num_steps=x", "model.width=-1"]
    lines = told(capsys, write_config(tmp_path), *overrides)

    assert {line.split("=")[0] for line in lines} == {
        "privacy.epsilon",
        "train.num_steps",
        "model.width",
    }


def test_a_file_that_is_no_config_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    for text, rule in (
        ("data: {source: digits", "is not valid YAML (.*line 1"),
        ("a: 1\na: 2", "`a` is given twice"),
        ("data: &x {source: digits}", "anchors and aliases are not supported"),
        ("", "has no sections; see configs/"),
        ("- 1", "has no sections; see configs/"),
    ):
        path.write_text(text)
        (line,) = told(capsys, path)
        assert line.startswith(f"config={path}: ")
        assert re.search(rule.replace("(", r"\("), line), line
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read (not a text file)" in told(capsys, path)[0]
    assert "No such file or directory" in told(capsys, tmp_path / "absent.yaml")[0]
    (tmp_path / "folder").mkdir()
    assert "cannot be read (Is a directory)" in told(capsys, tmp_path / "folder")[0]


def test_bad_arguments_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, rule in (
        ([], "a configuration file is required, or --resume DIR"),
        (["a.yaml", "--fast"], "unrecognized arguments: --fast"),
        (
            ["--run-dir", "a", "--resume", "b"],
            "--run-dir and --resume both name the run; give one of them",
        ),
        (["a.yaml", "--set"], "argument --set: expected one argument"),
    ):
        assert dpsgd_train(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"dpsgd-train: {rule}; see dpsgd-train --help"


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("mine")

    assert dpsgd_train(write_config(tmp_path), "--run-dir", run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--run-dir={run}: holds a run or other files")
    assert line.endswith(f"; name another folder, or go on with --resume {run}")
    assert os.listdir(run) == ["config.yaml"]
    assert (run / "config.yaml").read_text() == "mine"

    file = tmp_path / "file"
    file.write_text("mine")
    assert dpsgd_train(write_config(tmp_path), "--run-dir", file) == 2
    (line,) = capsys.readouterr().err.splitlines()
    rule = "is a file, and nothing is overwritten; name a folder"
    assert line == f"--run-dir={file}: {rule}"


def test_divergence_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"optimizer.learning_rate": 1e30})

    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("optimizer.learning_rate=1e+30: training diverged: ")
    assert line.endswith("; lower the learning rate and start a new run")


def test_memory_that_runs_out_in_training_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dpsgd.train.train_step", exhausted)

    assert dpsgd_train(write_config(tmp_path), "--run-dir", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "runtime.microbatch_size=16: does not fit in the memory of cpu; "
        "set it to 8 or less; go on with --resume"
    )


def images(count: int, side: int = 8) -> list[bytes]:
    rng = np.random.default_rng(count)
    encoded = []
    for _ in range(count):
        stream = io.BytesIO()
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        encoded.append(stream.getvalue())
    return encoded


def write_parquet(path: Path, cells: Sequence[bytes], labels: Sequence[int]) -> None:
    """Writes images and labels of three declared classes."""
    feature = {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}
    info = {"info": {"features": {"label": feature}}}
    table = pa.table(
        {
            "img": pa.array([{"bytes": one, "path": None} for one in cells]),
            "label": pa.array(labels, pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A config of a run on parquet files that are all right."""
    write_parquet(tmp_path / "train.parquet", images(12), [0, 1, 2] * 4)
    write_parquet(tmp_path / "test.parquet", images(6), [0, 1, 2] * 2)
    changes = {
        "data.source": "parquet",
        "data.train": str(tmp_path / "train.parquet"),
        "data.test": str(tmp_path / "test.parquet"),
        "data.num_examples": 12,
        "privacy.expected_batch_size": 4,
        "privacy.delta": 0.01,
        "train.num_steps": 1,
    }
    return Path(write_config(tmp_path, changes))


def test_good_parquet_files_train(parquet: Path) -> None:
    assert dpsgd_train(parquet, "--run-dir", parquet.parent / "run") == 0


def test_a_missing_or_truncated_data_file_is_named(
    parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = parquet.parent / "train.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    (line,) = told(capsys, parquet)
    assert line.startswith(f"data.train={path}: is not a readable parquet file (")
    path.unlink()
    (line,) = told(capsys, parquet)
    assert line == f"data.train={path}: no such file; check the path or the pattern"


def test_a_corrupt_image_is_named_by_its_row(
    parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = parquet.parent / "test.parquet"
    cells = images(6)
    for broken in (cells[4][:60], b"not an image"):
        write_parquet(path, [*cells[:4], broken, cells[5]], [0, 1, 2] * 2)
        (line,) = told(capsys, parquet)
        assert line.startswith(f"data.test={path}, row 4: cannot be decoded (")


def test_labels_outside_the_classes_are_named_by_their_row(
    parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = parquet.parent / "train.parquet"
    for label in (3, -1):
        write_parquet(path, images(12), [0, 1, 2] * 3 + [0, 1, label])
        (line,) = told(capsys, parquet)
        assert line.startswith(f"data.train={path}, row 11: has label {label}, which")
        assert "must be in [0, 3)" in line


def test_classes_unlike_the_models_are_told(
    parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = told(capsys, parquet, "model.num_classes=4")

    assert line == (
        "model.num_classes=4: the data set declares 3 classes; set 3 or remove it"
    )


def test_an_undeclared_size_is_told(
    parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = told(capsys, parquet, "data.num_examples=null")

    assert line.startswith("data.num_examples=null: is a public constant")
    assert "add data.num_examples: 12 if that count is public" in line


def test_a_process_ends_with_code_2_one_line_and_no_traceback(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"privacy.delta": 0.5})
    done = command("dpsgd-train", config, cwd=tmp_path)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "privacy.delta=0.5: must be below 1/num_examples (7.0e-04); lower delta\n"
    )
    assert os.listdir(tmp_path) == ["small.yaml"]
