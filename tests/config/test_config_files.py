"""Configurations as files: published ones, plain data, and what overrides replace."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from config_sections import sections, written

from dpsgd.config import config_to_dict, load_config, parse_config
from dpsgd.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return written(tmp_path, yaml.safe_dump(sections()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_published_configuration_loads_and_round_trips(path: Path) -> None:
    config = load_config(path)

    assert parse_config(config_to_dict(config)) == config


def test_there_are_published_configurations() -> None:
    assert CONFIGS


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    config = parse_config(
        sections(
            data__source="parquet",
            data__train=["a", "b*.parquet"],
            data__mean=[0.1, 0.2, 0.3],
            optimizer__name="adamw",
            optimizer__betas=[0.8, 0.99],
            runtime__microbatch_size=16,
            ema__decay=None,
            model__compute_dtype="bfloat16",
        )
    )
    path = written(tmp_path, yaml.safe_dump(config_to_dict(config)))

    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {source: digits, source: digits}", "`source` is given twice"),
        ("train: {num_steps: 1}\ntrain: {num_steps: 2}", "`train` is given twice"),
        ("train: &anchor {num_steps: 1}", "line 1: anchors and aliases are not"),
        ("a: 1\ntrain: *anchor", "line 2: anchors and aliases are not"),
        ("train: {<<: {num_steps: 1}}", "unknown key"),
        ("train: !!python/name:os.system", "is not valid YAML"),
        ("train: [1", "is not valid YAML"),
        ("? [a]\n: 1", "is not valid YAML"),
        ("", "has no sections"),
        ("- 1", "has no sections"),
        ("just text", "has no sections"),
    ],
)
def test_yaml_that_is_more_or_less_than_data_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "section", "key", "read"),
    [
        ("train.num_steps=7", "train", "num_steps", 7),
        (" train.num_steps =7", "train", "num_steps", 7),
        ("privacy.delta=1e-6", "privacy", "delta", 1e-6),
        ("data.train=*.parquet", "data", "train", "*.parquet"),
        ("data.train=[a, b]", "data", "train", ("a", "b")),
        ("data.train=a=b.parquet", "data", "train", "a=b.parquet"),
        ("model.depth=10", "model", "depth", 10),
        ("ema.decay=null", "ema", "decay", None),
        ("ema.decay=", "ema", "decay", None),
    ],
)
def test_an_override_replaces_one_setting(
    valid: Path, override: str, section: str, key: str, read: object
) -> None:
    config = load_config(valid, ["data.source=parquet", override])

    assert getattr(getattr(config, section), key) == read


def test_the_last_override_wins_and_the_rest_stays(valid: Path) -> None:
    config = load_config(valid, ["train.num_steps=7", "train.num_steps=8"])

    assert config.train.num_steps == 8
    assert dataclasses.replace(config.train, num_steps=10) == load_config(valid).train


def test_the_noise_of_a_file_can_be_replaced_by_override(valid: Path) -> None:
    overrides = ["privacy.target_epsilon=null", "privacy.noise_multiplier=1.5"]

    assert load_config(valid, overrides).privacy.noise_multiplier == 1.5


@pytest.mark.parametrize(
    "override", ["", "train", "train.num_steps", "num_steps=3", ".x=1", "train.=1"]
)
def test_an_override_of_another_form_is_refused(valid: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set=.*must be section\.key=value"):
        load_config(valid, [override])


def test_all_bad_overrides_are_told_at_once(valid: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set=a: .*\n--set=b: "):
        load_config(valid, ["a", "train.num_steps=3", "b"])


def test_an_override_is_checked_like_the_file(valid: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean `train\.num_steps`"):
        load_config(valid, ["train.num_step=3"])
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate=null: must be"):
        load_config(valid, ["optimizer.learning_rate="])


def test_normalization_is_switched_off_by_one_setting() -> None:
    config = load_config(ROOT / "configs" / "digits.yaml", ["model.normalization=none"])

    assert config.model.groups == 4  # of digits.yaml


def test_a_run_that_began_answers_for_its_overrides_alone(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(sections(optimizer__betas=[0.8, 0.9])))

    assert load_config(path, has_begun=True).optimizer.betas == (0.8, 0.9)
    with pytest.raises(ConfigError, match=r"^data\.fixed_views=True: .*$"):
        load_config(path, ["data.fixed_views=true"], has_begun=True)
    with pytest.raises(ConfigError, match=r"optimizer\.betas"):
        load_config(path)
