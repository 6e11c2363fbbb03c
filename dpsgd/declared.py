"""The public facts that a run goes by, declared and never counted, and its network."""

import dataclasses

from dpsgd.config import Config
from dpsgd.data import (
    DataSplits,
    PublicFacts,
    check_labels,
    declared_num_examples,
    published_facts,
)
from dpsgd.errors import ConfigError, fault
from dpsgd.models import Network, build_model

__all__ = ["declared_network", "facts_of", "require_outputs", "with_classes"]


def facts_of(config: Config, splits: DataSplits) -> PublicFacts:
    """Returns the public facts of loaded data, whose size is declared, not counted.

    Raises:
        ConfigError: No size is declared, or a data set of that name is published with
            another number of classes.
    """
    published, held = published_facts(config.data), len(splits.train.class_names)
    if published is not None and held not in (0, len(published.class_names)):
        rule = f"has {len(published.class_names)} classes, and the files have {held}"
        remedy = "give the data that it names, or remove it and declare num_examples"
        raise ConfigError(fault("data.name", config.data.name, rule, remedy))
    if config.privacy.unit == "user":
        size = config.data.num_users
        assert size is not None  # the loader sees to it
    else:
        size = declared_num_examples(config.data, rows_held=len(splits.train))
    return PublicFacts(
        num_examples=size,
        image_shape=splits.train.image_shape,
        class_names=splits.train.class_names,
    )


def with_classes(config: Config, facts: PublicFacts) -> PublicFacts:
    """Returns the facts with a name for every output of the network.

    Raises:
        ConfigError: Declared classes and `model.num_classes` contradict each other,
            neither is given, or there is but one class.
    """
    declared, wanted = len(facts.class_names), config.model.num_classes
    if not declared and wanted is None:
        rule = "the data set declares no classes, and labels are never counted"
        raise ConfigError(
            fault("model.num_classes", None, rule, "give the number of classes")
        )
    if declared and wanted not in (None, declared):
        rule = f"the data set declares {declared} classes"
        raise ConfigError(
            fault("model.num_classes", wanted, rule, f"set {declared} or remove it")
        )
    names = facts.class_names or tuple(str(label) for label in range(wanted or 0))
    if len(names) < 2:
        rule = "must be at least 2: of one class there is nothing to learn"
        remedy = "train on examples of several classes"
        raise ConfigError(fault("model.num_classes", len(names), rule, remedy))
    return dataclasses.replace(facts, class_names=names)


def declared_network(config: Config, facts: PublicFacts) -> Network:
    """Returns the network of a run, parameters undrawn.

    Raises:
        ConfigError: The architecture refuses its settings, or test images of another
            size than those that are trained on.
    """
    network = build_model(
        config.model, image_shape=facts.image_shape, num_classes=facts.num_classes
    )
    size = config.data.eval_image_size
    if network.takes_one_size and size not in (None, config.data.image_size):
        rule = f"model.name={config.model.name} takes images of one size"
        raise ConfigError(fault("data.eval_image_size", size, rule, "remove it"))
    return network


def require_outputs(splits: DataSplits, num_classes: int) -> None:
    """Raises DataError if a label has no output of the network."""
    for field, dataset in (("data.train", splits.train), ("data.test", splits.test)):
        check_labels(
            dataset.labels.cpu().numpy(),
            num_classes,
            field=field,
            place="row {}".format,
            remedy="correct the label or raise model.num_classes",
        )
