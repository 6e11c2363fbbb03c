"""Every setting has a declared type, range and default, and no other name is taken."""

import ast
import dataclasses
from pathlib import Path

import pytest
from config_sections import sections, with_line

from dpsgd.config import load_config, parse_config, schema
from dpsgd.errors import ConfigError


def test_defaults_are_the_papers() -> None:
    config = parse_config(sections())

    assert config.privacy.clipping_norm == 1.0
    assert config.privacy.rescale_to_unit_norm
    assert config.optimizer.name == "sgd"
    assert config.optimizer.momentum == 0.0
    assert config.optimizer.weight_decay == 0.0
    assert config.optimizer.schedule == "constant"
    assert config.model.order == "activation_norm"
    assert config.model.groups == 16
    assert config.train.seed is None


def test_a_configuration_cannot_be_changed() -> None:
    config = parse_config(sections())

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.privacy.delta = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "line", "read"),
    [
        ("privacy", "delta: 1e-5", 1e-5),
        ("privacy", "delta: '1e-5'", 1e-5),
        ("privacy", "expected_batch_size: 4096", 4096.0),
        ("train", "num_steps: 1e3", 1000),
        ("train", "num_steps: 1_000", 1000),
        ("train", "seed: null", None),
        ("train", "seed: -3", -3),
        ("model", "normalization: none", "none"),
        ("report", "unprotected_metrics: false", False),
        ("runtime", "microbatch_size: auto", "auto"),
        ("runtime", "microbatch_size: 8.0", 8),
        ("data", "mean: 0.25", (0.25,)),
        ("data", "std: [1, '0.5']", (1.0, 0.5)),
        ("data", "train: a.parquet", "a.parquet"),
        ("data", "train: [a, b]", ("a", "b")),
        ("ema", "decay: null", None),
    ],
)
def test_a_value_is_read_as_its_declared_type(
    tmp_path: Path, section: str, line: str, read: object
) -> None:
    config = load_config(with_line(tmp_path, section, line), ["data.source=parquet"])
    value = getattr(getattr(config, section), line.partition(":")[0])

    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("train", "num_steps: 1.5", "train.num_steps=1.5: must be a whole number"),
        ("train", "num_steps: yes", "train.num_steps=yes: must be a whole number"),
        ("train", "num_steps: 0", "train.num_steps=0: must be above 0 and finite"),
        ("train", "num_steps: .inf", "train.num_steps=.inf: must be a whole number"),
        ("train", "num_steps: .nan", "train.num_steps=.nan: must be a whole number"),
        ("train", "num_steps: [10]", "must be a whole number"),
        ("privacy", "delta: small", "privacy.delta=small: must be a number"),
        ("privacy", "delta: .nan", "privacy.delta=.nan: must be a number"),
        ("privacy", "delta: 0", r"delta=0.0: must be in \(0, 1\), .*; raise delta"),
        ("privacy", "delta: 1", r"delta=1.0: must be in \(0, 1\), .*; lower delta"),
        ("privacy", "delta:", "privacy.delta=null: is required"),
        ("privacy", "clipping_norm: 0", "clipping_norm=0: must be above 0"),
        ("privacy", "clipping_norm: inf", "clipping_norm=inf: must be above 0"),
        ("privacy", "clipping_norm: -1", "clipping_norm=-1: must be above 0"),
        ("privacy", "noise_multiplier: -1", "must be at least 0 and finite"),
        ("privacy", "expected_batch_size: 0", "must be above 0 and finite"),
        ("privacy", "rescale_to_unit_norm: 1", "must be true or false"),
        ("privacy", "rescale_to_unit_norm: 'yes'", "must be true or false"),
        ("optimizer", "name: adam", "must be `sgd` or `adamw`"),
        ("optimizer", "momentum: 1", r"optimizer.momentum=1: must be in \[0, 1\)"),
        ("optimizer", "betas: [0.9]", "must be a list of 2 values"),
        ("ema", "decay: 1.0", r"must be in \[0, 1\) or null"),
        ("data", "augmentation: no", "data.augmentation=no: must be `none` or"),
        ("data", "name: true", "data.name=True: must be text or null"),
        (
            "report",
            "unprotected_metrics: no",
            "report.unprotected_metrics=no: must be true or false",
        ),
        ("data", "name: ''", "must be text or null"),
        ("privacy", "unit: person", "privacy.unit=person: must be `example` or `user`"),
        ("privacy", "max_examples_per_user: 0", "must be above 0 and finite"),
        ("data", "mean: []", "must be a list of at least one value"),
        ("data", "std: [0.5, 0]", "must be above 0 and finite"),
        ("runtime", "microbatch_size: big", "a whole number or `auto`"),
        ("report", "unprotected_metrics: 1", "must be true or false"),
        ("runtime", "execution: fast", "must be `auto` or `eager` or"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(
    tmp_path: Path, section: str, line: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(with_line(tmp_path, section, line))


@pytest.mark.parametrize("number", ["010", "1:30"])
def test_a_number_is_never_read_in_another_base(tmp_path: Path, number: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.num_steps"):
        load_config(with_line(tmp_path, "train", f"num_steps: {number}"))


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("data", "num_examples: 2001-13-45"),
        ("optimizer", f"learning_rate: 1{'0' * 400}"),
    ],
)
def test_no_text_escapes_as_another_error(
    tmp_path: Path, section: str, line: str
) -> None:
    with pytest.raises(ConfigError):
        load_config(with_line(tmp_path, section, line))


@pytest.mark.parametrize("mean", [float("inf"), -float("inf"), 127.0])
def test_a_mean_outside_the_pixels_is_refused(mean: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.mean"):
        parse_config(sections(data__mean=[mean]))


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    message = (
        "privacy.max_grad_norm=1: unknown key.*\n"
        "optimizer.learning_rat=2: unknown key; did you mean `optimizer.learning_rate`"
    )
    with pytest.raises(ConfigError, match=message):
        parse_config(sections(privacy__max_grad_norm=1, optimizer__learning_rat=2))


def test_an_unknown_section_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown section; did you mean `privacy`"):
        parse_config(sections(privcy__delta=1))
    with pytest.raises(ConfigError, match=r"qqq=.*unknown section; known are data"):
        parse_config(sections(qqq__a=1))


def test_a_section_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model=7: must be a mapping"):
        parse_config({**sections(), "model": 7})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({})

    for name in (
        "data.source",
        "privacy.delta",
        "privacy.expected_batch_size",
        "optimizer.learning_rate",
        "train.num_steps",
    ):
        assert f"{name}=null: is required" in str(error.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(
            sections(
                data__source="floppy",
                model__depht=16,
                privacy__delta="tiny",
                train__num_steps=...,
                nonsense__x=1,
            )
        )

    lines = str(error.value).splitlines()
    assert len(lines) == 5
    starts = ["nonsense=", "data.source=", "model.depht=", "privacy.delta=", "train."]
    for start in starts:
        assert [line for line in lines if line.startswith(start)], start


def test_every_field_has_a_docstring() -> None:
    folder = Path(schema.__file__).parent
    trees = [ast.parse(path.read_text()) for path in folder.glob("*.py")]
    nodes = [node for tree in trees for node in tree.body]
    fields = 0
    for section in (node for node in nodes if isinstance(node, ast.ClassDef)):
        for node, following in zip(
            section.body, [*section.body[1:], None], strict=True
        ):
            if not isinstance(node, ast.AnnAssign):
                continue
            fields += 1
            where = f"{section.name}.{ast.unparse(node.target)}"
            assert isinstance(following, ast.Expr), where
            assert isinstance(following.value, ast.Constant), where
            assert len(str(following.value.value)) > 5, where

    assert fields > 40


def test_every_section_is_frozen_and_takes_names_only() -> None:
    for name in schema.__all__:
        section = getattr(schema, name)
        if dataclasses.is_dataclass(section):
            parameters = section.__dataclass_params__  # type: ignore[attr-defined]
            assert parameters.frozen
            assert all(field.kw_only for field in dataclasses.fields(section))
