"""Public facts of a data set: declared or published, never counted from private data.

With add-or-remove-one neighbours even the number of examples is private, so sample
rate, expected batch size and divisor must follow from a number that is stated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dpsgd.config import DataConfig
from dpsgd.errors import ConfigError, fault

__all__ = ["PUBLISHED", "PublicFacts", "declared_num_examples", "published_facts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicFacts:
    """What is known of a training set without looking at its examples.

    Attributes:
        num_examples: Size N, a public constant: of examples, or of users where users
            are the unit of privacy.
        image_shape: (C, H, W) of one image.
        class_names: Classes, in the order of the labels; empty if none are declared.
    """

    num_examples: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of declared classes."""
        return len(self.class_names)


def _facts(size: int, shape: tuple[int, int, int], num_classes: int) -> PublicFacts:
    """Returns facts with classes named by their number."""
    names = tuple(str(label) for label in range(num_classes))
    return PublicFacts(num_examples=size, image_shape=shape, class_names=names)


PUBLISHED: Mapping[str, PublicFacts] = {
    "cifar10": _facts(50_000, (3, 32, 32), 10),
    "cifar100": _facts(50_000, (3, 32, 32), 100),
    "mnist": _facts(60_000, (1, 28, 28), 10),
    "fashion_mnist": _facts(60_000, (1, 28, 28), 10),
    "svhn": _facts(73_257, (3, 32, 32), 10),
    "digits": _facts(1_437, (1, 8, 8), 10),
    "imagenet": _facts(1_281_167, (3, 224, 224), 1000),
    "places365": _facts(1_803_460, (3, 224, 224), 365),
}
"""Training sets of public data sets, as their authors describe them: ImageNet is that
of 2012, Places365 the standard one. The images of these two have many sizes."""


def published_facts(config: DataConfig) -> PublicFacts | None:
    """Returns the facts of a data set that can be planned for without its files.

    Args:
        config: The section `data`.

    Returns:
        Facts with the declared size, if one is; None if the files must be read.
    """
    if config.source not in ("digits", "torchvision", "store"):
        return None
    published = PUBLISHED.get(_published_name(config) or "")
    if published is None:
        return None
    shape, side = published.image_shape, config.image_size
    return PublicFacts(
        num_examples=config.num_examples or published.num_examples,
        image_shape=shape if side is None else (shape[0], side, side),
        class_names=published.class_names,
    )


def declared_num_examples(config: DataConfig, *, rows_held: int) -> int:
    """Returns the public size N of the training set.

    N is declared, or published by the authors of a named data set. It is never the
    number of rows held, which is private when neighbours differ by one example.

    Args:
        config: The section `data`.
        rows_held: Rows that were loaded; shown in the message of the error, so that
            the person who holds the data can decide, and otherwise unused.

    Raises:
        ConfigError: N is neither declared nor published.
    """
    if config.num_examples is not None:
        return config.num_examples
    published = PUBLISHED.get(_published_name(config) or "")
    if published is None:
        rule = "is a public constant that you declare, never counted from private data"
        remedy = f"add data.num_examples: {rows_held} if that count is public"
        raise ConfigError(fault("data.num_examples", None, rule, remedy))
    return published.num_examples


def _published_name(config: DataConfig) -> str | None:
    """Returns the name under which a data set's facts are published."""
    return "digits" if config.source == "digits" else config.name
