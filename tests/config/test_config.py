"""Every fault of a configuration is found, named and told together with the others."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpsgd.config import config_to_dict, load_config, parse_config, schema
from dpsgd.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def sections(**changes: Any) -> dict[str, dict[str, Any]]:
    """A small valid configuration; `section__key=value` sets, `...` removes."""
    values: dict[str, dict[str, Any]] = {
        "data": {"source": "digits"},
        "optimizer": {"learning_rate": 1.0},
        "privacy": {"target_epsilon": 8, "delta": 1e-5, "expected_batch_size": 64},
        "train": {"num_steps": 10},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
        if value is ...:
            del values[section][key]
    return values


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return written(tmp_path, yaml.safe_dump(sections()))


def with_line(folder: Path, section: str, line: str) -> Path:
    """The valid configuration with one more line, as typed, in a section."""
    blocks = sections()
    extra = blocks.pop(section, {})
    key = line.partition(":")[0].strip()
    extra.pop(key, None)
    text = yaml.safe_dump(blocks) + f"{section}:\n"
    text += "".join(f"  {name}: {value}\n" for name, value in extra.items())
    return written(folder, f"{text}  {line}\n")


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
        ("privacy", "delta: 0", r"privacy.delta=0.0: must be in \(0, 1\)"),
        ("privacy", "delta: 1", r"privacy.delta=1.0: must be in \(0, 1\)"),
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


def test_all_faults_between_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(
            sections(
                privacy__target_epsilon=...,
                privacy__delta=2,
                optimizer__warmup_steps=10,
            )
        )

    first, second, third = str(error.value).splitlines()
    assert first.startswith("privacy.target_epsilon=null and privacy.noise_multiplier")
    assert second.startswith("privacy.delta=2.0")
    assert third.startswith("optimizer.warmup_steps=10: must be below train.num_steps")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"decay_steps": 2}, "decay_steps=2: means nothing with optimizer.schedule="),
        (
            {"schedule": "linear", "warmup_steps": 6, "decay_steps": 5},
            "decay_steps=5: must be at most the 4 steps after the warm-up",
        ),
    ],
)
def test_a_decay_fits_its_schedule(settings: dict[str, Any], complaint: str) -> None:
    changes = {f"optimizer__{name}": value for name, value in settings.items()}

    with pytest.raises(ConfigError, match=complaint):
        parse_config(sections(train__num_steps=10, **changes))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"augmentation": "none"}, "mixed_views=3: means nothing with data.augment"),
        (
            {"augmentation": "flip", "augmentation_multiplicity": 4},
            "mixed_views=3: must leave two of the data.augmentation_multiplicity=4",
        ),
    ],
)
def test_mixtures_are_of_two_different_views(
    settings: dict[str, Any], complaint: str
) -> None:
    changes = {f"data__{name}": value for name, value in settings.items()}

    with pytest.raises(ConfigError, match=complaint):
        parse_config(sections(data__mixed_views=3, **changes))


def test_a_warm_up_of_the_average_is_above_1() -> None:
    with pytest.raises(ConfigError, match=r"ema\.warmup=1: must be above 1 and finite"):
        parse_config(sections(ema__warmup=1))
    assert parse_config(sections(ema__warmup=2)).ema.warmup == 2.0


def test_exactly_one_setting_decides_the_noise() -> None:
    with pytest.raises(ConfigError, match="noise_multiplier=null: exactly one"):
        parse_config(sections(privacy__target_epsilon=None))
    with pytest.raises(ConfigError, match=r"noise_multiplier=0\.0: exactly one"):
        parse_config(sections(privacy__noise_multiplier=0))
    config = parse_config(
        sections(privacy__noise_multiplier=0, privacy__target_epsilon=...)
    )
    assert config.privacy.noise_multiplier == 0


USERS: dict[str, Any] = {
    "data__source": "parquet",
    "data__user_column": "owner",
    "data__num_users": 1000,
    "privacy__unit": "user",
    "privacy__max_examples_per_user": 4,
}


def test_a_unit_of_users_is_complete() -> None:
    config = parse_config(sections(**USERS, data__augmentation_multiplicity=3))

    assert config.privacy.unit == "user"
    assert config.views_per_unit == 12
    assert parse_config(sections(data__augmentation_multiplicity=3)).views_per_unit == 3


@pytest.mark.parametrize(
    "name", ["data__user_column", "data__num_users", "privacy__max_examples_per_user"]
)
def test_what_a_unit_of_users_lacks_is_named(name: str) -> None:
    rule = f"{name.replace('__', '.')}=null: is required with privacy.unit=user; "
    with pytest.raises(ConfigError, match=f"^{rule}.*$"):
        parse_config(sections(**{**USERS, name: None}))


def test_users_of_a_source_that_knows_none_are_refused() -> None:
    rule = "privacy.unit=user: data.source=digits does not know users; take"
    with pytest.raises(ConfigError, match=f"^{rule}.*$"):
        parse_config(sections(**{**USERS, "data__source": "digits"}))


def test_settings_of_users_are_refused_where_examples_are_the_unit() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(sections(**{**USERS, "privacy__unit": "example"}))

    assert str(error.value).splitlines() == [
        "data.user_column=owner: goes with privacy.unit=user only; set it, or remove "
        "this",
        "data.num_users=1000: goes with privacy.unit=user only; set it, or remove this",
        "privacy.max_examples_per_user=4: goes with privacy.unit=user only; set it, or "
        "remove this",
    ]


def test_what_would_undo_secure_noise_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(
            sections(
                privacy__noise="secure", train__seed=0, report__unprotected_metrics=True
            )
        )

    assert str(error.value).splitlines() == [
        "train.seed=0: privacy.noise=secure is never repeatable; remove the seed",
        "report.unprotected_metrics=True: privacy.noise=secure forbids to record "
        "values without noise; leave them out",
    ]
    assert parse_config(sections(privacy__noise="secure")).privacy.noise == "secure"
    assert parse_config(sections(train__seed=0)).privacy.noise == "standard"


def test_groups_of_a_source_without_columns_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.group_column=age: only parquet"):
        parse_config(sections(data__group_column="age"))


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


STORE = {
    "data__source": "store",
    "data__train": "stores/train",
    "data__test": "stores/test",
    "data__image_size": 224,
}


def test_a_store_takes_its_own_settings() -> None:
    config = parse_config(
        sections(
            **STORE,
            data__eval_image_size=256,
            data__augmentation="scaled_crop_flip",
            runtime__decode_workers="4",
        )
    )

    assert config.runtime.decode_workers == 4
    assert config.data.eval_image_size == 256


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data__image_size": None},
            "data.image_size=null: is required with data.source=store, whose images "
            "have many sizes; give a side in pixels",
        ),
        (
            {"data__augmentation": "crop"},
            "data.augmentation=crop: means nothing with data.source=store; take "
            "scaled_crop_flip or resized_crop_flip",
        ),
        (
            {"data__crop_padding": 2},
            "data.crop_padding=2: means nothing with data.source=store; remove it",
        ),
        (
            {"data__label_column": "y"},
            "data.label_column=y: means nothing with data.source=store; remove it",
        ),
        (
            {"data__group_column": "skin"},
            "data.group_column=skin: only parquet files have columns; remove it, or "
            "take parquet",
        ),
        (
            {**USERS, "data__source": "store"},
            "privacy.unit=user: data.source=store does not know users; take "
            "data.source=parquet",
        ),
    ],
)
def test_what_a_store_lacks_or_needs_is_told(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(sections(**{**STORE, **changes}))

    assert str(error.value).splitlines() == [told]


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("data.image_size", 32, "remove it"),
        ("data.eval_image_size", 32, "remove it"),
        ("runtime.decode_workers", 2, "remove it"),
        ("data.augmentation", "resized_crop_flip", "take crop or crop_flip"),
    ],
)
def test_settings_of_stores_are_refused_elsewhere(
    name: str, value: Any, remedy: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(sections(**{name.replace(".", "__"): value}))

    rule = f"{name}={value}: means nothing with data.source=digits; {remedy}"
    assert str(error.value).splitlines() == [rule]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data__train": "mine.parquet", "data__test": "mine.parquet"},
            [
                "data.train=mine.parquet: means nothing with data.source=digits; "
                "remove it, or take a source of files",
                "data.test=mine.parquet: means nothing with data.source=digits; "
                "remove it, or take a source of files",
            ],
        ),
        (
            {"data__source": "image_folder", "data__image_column": "image"},
            [
                "data.image_column=image: means nothing with data.source=image_folder; "
                "remove it"
            ],
        ),
        (
            {"data__augmentation": "flip", "data__crop_padding": 2},
            [
                "data.crop_padding=2: means nothing with data.augmentation=flip; "
                "remove it, or crop"
            ],
        ),
        (
            {"data__fixed_views": True},
            [
                "data.fixed_views=True: means nothing with data.augmentation=none; "
                "remove it, or augment"
            ],
        ),
        (
            {"model__init_weights": "last"},
            [
                "model.init_weights=last: means nothing with model.init_from=null; "
                "remove it, or name weights"
            ],
        ),
        (
            {"optimizer__betas": [0.8, 0.9], "ema__decay": None, "ema__warmup": 2},
            [
                "optimizer.betas=(0.8, 0.9): means nothing with optimizer.name=sgd; "
                "remove it, or take adamw",
                "ema.warmup=2.0: means nothing with ema.decay=null; remove it, or set "
                "a decay",
            ],
        ),
        (
            {"optimizer__name": "adamw", "optimizer__momentum": 0.9},
            [
                "optimizer.momentum=0.9: means nothing with optimizer.name=adamw; "
                "remove it, or take sgd"
            ],
        ),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(
    changes: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(sections(**changes))

    assert str(error.value).splitlines() == told


def test_a_default_is_never_refused_as_unused() -> None:
    settings = config_to_dict(parse_config(sections(ema__decay=None)))

    assert settings["ema"]["warmup"] == 10.0
    assert config_to_dict(parse_config(settings)) == settings


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
