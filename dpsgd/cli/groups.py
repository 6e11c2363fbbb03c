"""Evaluations by class and by group, side by side, as the commands show them."""

from dpsgd.config import Config
from dpsgd.evaluate import Evaluation
from dpsgd.report import Comparison, compare

__all__ = ["comparisons"]


def comparisons(
    result: Evaluation, config: Config, *, twin: Evaluation | None = None
) -> list[Comparison]:
    """Returns the outcomes by class, and by group if the test set has groups.

    Args:
        result: Evaluation on a test set.
        config: Settings, of which the column of groups is used.
        twin: Evaluation of another network on the same test set.
    """
    by_class = compare(
        "class",
        result.per_class_accuracy,
        num_examples=result.per_class_num_examples,
        twin_accuracy=twin.per_class_accuracy if twin is not None else None,
    )
    if config.data.group_column is None:
        return [by_class]
    by_group = compare(
        config.data.group_column,
        result.per_group_accuracy,
        num_examples=result.per_group_num_examples,
        twin_accuracy=twin.per_group_accuracy if twin is not None else None,
    )
    return [by_class, by_group]
