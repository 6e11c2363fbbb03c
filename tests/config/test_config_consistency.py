"""Settings that contradict, need or silence one another are told together."""

from typing import Any

import pytest
from config_sections import sections

from dpsgd.config import config_to_dict, parse_config
from dpsgd.errors import ConfigError


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
