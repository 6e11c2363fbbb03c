"""What no setting shows alone: settings that contradict or need one another."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpsgd.config.schema import Config, DataConfig, PrivacyConfig
from dpsgd.errors import fault

__all__ = ["faults_between_settings", "missing_delta", "unused_settings"]

_SCALED = ("scaled_crop_flip", "resized_crop_flip")
_PADDED = ("crop", "crop_flip")
_NOT_PADDED = ("none", "flip", *_SCALED)
_WITHOUT_FILES = ("digits", "torchvision")
_NOT_PARQUET = (*_WITHOUT_FILES, "image_folder", "store")
_NOT_STORE = (*_WITHOUT_FILES, "image_folder", "parquet")


class _Detail(NamedTuple):
    """A setting that means something only beside some values of another.

    Attributes:
        name: The setting.
        other: The other one.
        void: Values of the other with which it means nothing.
        remedy: What else than removing it makes sense, if anything does.
    """

    name: str
    other: str
    void: tuple[str | None, ...]
    remedy: str = ""


# In the order of the sections; of a setting the first line that holds is told. Left out
# is `model.groups`, so that `model.normalization=none` is one change to any file.
_DETAILS = (
    _Detail("data.train", "data.source", _WITHOUT_FILES, "take a source of files"),
    _Detail("data.test", "data.source", _WITHOUT_FILES, "take a source of files"),
    _Detail("data.image_column", "data.source", _NOT_PARQUET),
    _Detail("data.label_column", "data.source", _NOT_PARQUET),
    # A store's images have many sizes and are decoded when they are drawn.
    _Detail("data.image_size", "data.source", _NOT_STORE),
    _Detail("data.eval_image_size", "data.source", _NOT_STORE),
    _Detail("data.crop_padding", "data.source", ("store",)),
    _Detail("data.crop_padding", "data.augmentation", _NOT_PADDED, "crop"),
    _Detail("data.fixed_views", "data.augmentation", ("none",), "augment"),
    _Detail("model.init_weights", "model.init_from", (None,), "name weights"),
    _Detail("optimizer.momentum", "optimizer.name", ("adamw",), "take sgd"),
    _Detail("optimizer.betas", "optimizer.name", ("sgd",), "take adamw"),
    _Detail("ema.warmup", "ema.decay", (None,), "set a decay"),
    _Detail("runtime.decode_workers", "data.source", _NOT_STORE),
)


def faults_between_settings(config: Config) -> list[str]:
    """Returns the faults that only show between settings, one line each."""
    if config.privacy.enabled:
        faults = _mechanism_faults(config.privacy)
        faults += _unit_faults(config)
        faults += _secure_noise_faults(config)
    else:
        faults = _faults_without_privacy(config.privacy)
    if config.data.group_column is not None and config.data.source != "parquet":
        rule, remedy = "only parquet files have columns", "remove it, or take parquet"
        column = config.data.group_column
        faults.append(fault("data.group_column", column, rule, remedy))
    faults += _mixture_faults(config.data) + _schedule_faults(config)
    faults += _store_faults(config) + _faults_without_weights(config)
    return faults + _cache_faults(config)


def unused_settings(config: Config) -> dict[str, str]:
    """Returns, by name, the faults of settings that mean nothing beside another.

    A value equal to the default is never at fault: it may not have been given.
    """
    faults: dict[str, str] = {}
    for name, other, void, remedy in _DETAILS:
        value, decisive = _changed(config, name), _value(config, other)
        if value is None or decisive not in void:
            continue
        shown = "null" if decisive is None else decisive
        rule = f"means nothing with {other}={shown}"
        remedies = ", or ".join(filter(None, ("remove it", remedy)))
        faults.setdefault(name, fault(name, value, rule, remedies))
    return faults


def missing_delta(privacy: Any) -> list[str]:
    """Returns the fault of a section that enables privacy and says no delta.

    Args:
        privacy: The section as it was read.
    """
    given = privacy if isinstance(privacy, Mapping) else {}
    if given.get("enabled") is False or given.get("delta") is not None:
        return []
    return [fault("privacy.delta", None, "is required", "add it")]


def _mechanism_faults(privacy: PrivacyConfig) -> list[str]:
    """Returns the faults between settings of a private run."""
    faults = []
    if privacy.target_epsilon is None and privacy.noise_multiplier is None:
        faults.append(
            "privacy.target_epsilon=null and privacy.noise_multiplier=null: exactly "
            "one of them decides the noise; give one"
        )
    if privacy.target_epsilon is not None and privacy.noise_multiplier is not None:
        faults.append(
            f"privacy.target_epsilon={privacy.target_epsilon} and "
            f"privacy.noise_multiplier={privacy.noise_multiplier}: exactly one of them "
            "decides the noise; remove one"
        )
    if privacy.delta is None or not 0 < privacy.delta < 1:
        rule = "must be in (0, 1), and below 1/num_examples"
        is_low = privacy.delta is not None and privacy.delta <= 0
        remedy = "raise delta" if is_low else "lower delta"
        faults.append(fault("privacy.delta", privacy.delta, rule, remedy))
    return faults


def _faults_without_privacy(privacy: PrivacyConfig) -> list[str]:
    """Returns the faults of a section that promises what no run without privacy has."""
    rule = "means nothing with privacy.enabled=false, where nothing is guaranteed"
    faults = [
        fault(f"privacy.{field.name}", value, rule, "remove it, or enable privacy")
        for field in dataclasses.fields(privacy)
        if field.name not in ("enabled", "expected_batch_size")
        and (value := getattr(privacy, field.name)) != field.default
    ]
    size = privacy.expected_batch_size
    if not size.is_integer():
        rule = "is the size of every batch with privacy.enabled=false"
        faults.append(
            fault("privacy.expected_batch_size", size, rule, "give a whole number")
        )
    return faults


def _unit_faults(config: Config) -> list[str]:
    """Returns what is missing for the unit of privacy, or given for another one.

    A setting of users is refused where examples are the unit: who names users wants
    them protected, and must not be told an epsilon of something weaker.
    """
    data, privacy = config.data, config.privacy
    count = "declare that public number, which is never counted from private data"
    settings = [
        ("data.user_column", data.user_column, "name the column of users"),
        ("data.num_users", data.num_users, count),
        (
            "privacy.max_examples_per_user",
            privacy.max_examples_per_user,
            "give a public limit",
        ),
    ]
    if privacy.unit == "example":
        rule, remedy = "goes with privacy.unit=user only", "set it, or remove this"
        return [
            fault(name, value, rule, remedy)
            for name, value, _ in settings
            if value is not None
        ]
    if data.source != "parquet":
        rule = f"data.source={data.source} does not know users"
        return [fault("privacy.unit", "user", rule, "take data.source=parquet")]
    rule = "is required with privacy.unit=user"
    return [
        fault(name, None, rule, remedy)
        for name, value, remedy in settings
        if value is None
    ]


def _mixture_faults(data: DataConfig) -> list[str]:
    """Returns why views cannot be mixed, if they are to be."""
    mixed, num_views = data.mixed_views, data.augmentation_multiplicity
    if mixed == 0:
        return []
    if data.augmentation == "none":
        rule = "means nothing with data.augmentation=none, where all views are alike"
        return [fault("data.mixed_views", mixed, rule, "remove it, or augment")]
    if mixed > num_views - 2:
        rule = f"must leave two of the data.augmentation_multiplicity={num_views} views"
        return [fault("data.mixed_views", mixed, rule, "lower it, or take more views")]
    return []


def _schedule_faults(config: Config) -> list[str]:
    """Returns what does not fit the steps of the run, or means nothing."""
    optimizer, num_steps = config.optimizer, config.train.num_steps
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    if warmup >= num_steps > 0:
        rule = f"must be below train.num_steps ({num_steps})"
        return [fault("optimizer.warmup_steps", warmup, rule, "shorten it")]
    if decay is None:
        return []
    if optimizer.schedule == "constant":
        rule = "means nothing with optimizer.schedule=constant"
        return [fault("optimizer.decay_steps", decay, rule, "take linear or cosine")]
    if decay > num_steps - warmup:
        rule = f"must be at most the {num_steps - warmup} steps after the warm-up"
        return [fault("optimizer.decay_steps", decay, rule, "shorten it")]
    return []


def _store_faults(config: Config) -> list[str]:
    """Returns what a store needs, and which views the source does not have."""
    data, faults = config.data, []
    is_store = data.source == "store"
    wrong = _PADDED if is_store else _SCALED
    if data.augmentation in wrong:
        rule = f"means nothing with data.source={data.source}"
        others = " or ".join(_SCALED if is_store else _PADDED)
        remedy = f"take {others}"
        faults.append(fault("data.augmentation", data.augmentation, rule, remedy))
    if is_store and data.image_size is None:
        rule = "is required with data.source=store, whose images have many sizes"
        faults.append(fault("data.image_size", None, rule, "give a side in pixels"))
    return faults


def _changed(config: Config, name: str) -> Any:
    """Returns the value of a setting by its full name, None if it is the default."""
    section, _, key = name.partition(".")
    fields = dataclasses.fields(getattr(config, section))
    (default,) = (field.default for field in fields if field.name == key)
    value = _value(config, name)
    return None if value == default else value


def _value(config: Config, name: str) -> Any:
    """Returns the value of a setting by its full name."""
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def _secure_noise_faults(config: Config) -> list[str]:
    """Returns what would undo secure noise: its repetition, or sums without it."""
    if config.privacy.noise != "secure":
        return []
    faults = []
    if config.train.seed is not None:
        rule = "privacy.noise=secure is never repeatable"
        faults.append(fault("train.seed", config.train.seed, rule, "remove the seed"))
    if config.report.unprotected_metrics:
        rule = "privacy.noise=secure forbids to record values without noise"
        faults.append(fault("report.unprotected_metrics", True, rule, "leave them out"))
    return faults


def _faults_without_weights(config: Config) -> list[str]:
    """Returns the faults of settings that mean nothing without given weights."""
    if config.model.init_from is not None:
        return []
    rule = "means nothing while model.init_from is null: all parameters are drawn"
    remedy = "name weights to start from, or remove it"
    return [
        fault(f"finetune.{field.name}", value, rule, remedy)
        for field in dataclasses.fields(config.finetune)
        if (value := getattr(config.finetune, field.name)) != field.default
    ]


def _cache_faults(config: Config) -> list[str]:
    """Returns why features cannot be computed once, if they are to be."""
    path = config.runtime.feature_cache
    if path is None:
        return []
    augmentation = config.data.augmentation
    reasons = {
        "only the features of a frozen network can be kept": (
            config.finetune.train != "classifier",
            "set finetune.train=classifier, or remove it",
        ),
        f"data.augmentation={augmentation} makes new views a step": (
            augmentation != "none" and not config.data.fixed_views,
            "set data.fixed_views=true or data.augmentation=none",
        ),
        "features are computed once, without stochastic depth": (
            config.model.stochastic_depth > 0,
            "set model.stochastic_depth=0, or remove it",
        ),
        "the examples of users are not kept": (
            config.privacy.unit == "user",
            "remove it",
        ),
    }
    return [
        fault("runtime.feature_cache", path, rule, remedy)
        for rule, (holds, remedy) in reasons.items()
        if holds
    ]
