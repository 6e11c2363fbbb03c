import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    top_k_accuracy_score,
)
from torch import Tensor, nn

from dpsgd.data import ImageDataset
from dpsgd.evaluate import Evaluation, evaluate


class Table(nn.Module):
    """Returns the logits that are written down for image number i."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images.flatten()]


def measured(
    logits: Tensor,
    labels: list[int],
    batch_size: int = 7,
    groups: Tensor | None = None,
) -> Evaluation:
    names = tuple(f"class {label}" for label in range(logits.shape[1]))
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    dataset = ImageDataset(
        images=images,
        labels=torch.tensor(labels),
        groups=groups,
        group_names=() if groups is None else ("a", "b", "c"),
    )
    return evaluate(
        Table(torch.zeros_like(logits)),  # its own weights must not be used
        {"logits": logits},
        dataset,
        normalize=lambda pixels: pixels.long(),
        class_names=names,
        batch_size=batch_size,
    )


def made_up(num_classes: int) -> tuple[Tensor, list[int]]:
    rng = np.random.default_rng(num_classes)
    logits = torch.tensor(rng.normal(size=(100, num_classes)), dtype=torch.float32)
    labels = rng.integers(num_classes, size=100).tolist()
    logits[torch.arange(100), torch.tensor(labels)] += 1
    return logits, labels


@pytest.mark.parametrize("num_classes", [2, 4, 5, 6, 10])
def test_measures_are_those_of_sklearn(num_classes: int) -> None:
    logits, labels = made_up(num_classes)
    result = measured(logits, labels)

    probabilities = logits.double().softmax(dim=1).numpy()
    guesses = probabilities.argmax(axis=1)
    classes = list(range(num_classes))
    assert result.num_examples == 100
    assert result.accuracy == pytest.approx(accuracy_score(labels, guesses))
    assert result.loss == pytest.approx(
        log_loss(labels, probabilities, labels=classes), rel=1e-5
    )
    if num_classes > 5:
        top5 = top_k_accuracy_score(labels, logits.numpy(), k=5, labels=classes)
        assert result.top5_accuracy == pytest.approx(top5)
    else:
        assert result.top5_accuracy == 1
    table = confusion_matrix(labels, guesses, labels=classes)
    recalls = table.diagonal() / table.sum(axis=1)
    assert list(result.per_class_accuracy) == [f"class {one}" for one in classes]
    assert list(result.per_class_accuracy.values()) == pytest.approx(recalls.tolist())
    assert result.largest_gap == pytest.approx(recalls.max() - recalls.min())
    assert list(result.per_class_num_examples.values()) == table.sum(axis=1).tolist()


def test_groups_are_measured_by_themselves() -> None:
    logits, labels = made_up(4)
    groups = torch.arange(100) % 3
    result = measured(logits, labels, groups=groups)

    is_right = logits.argmax(dim=1) == torch.tensor(labels)
    expected = [is_right[groups == one].double().mean().item() for one in range(3)]
    assert list(result.per_group_accuracy) == ["a", "b", "c"]
    assert list(result.per_group_accuracy.values()) == pytest.approx(expected)
    assert result.per_group_num_examples == {"a": 34, "b": 33, "c": 33}
    assert len(set(expected)) == 3
    without = measured(logits, labels)
    assert without.per_group_accuracy == without.per_group_num_examples == {}
    assert without.per_class_accuracy == result.per_class_accuracy


def test_batch_size_changes_nothing_but_rounding() -> None:
    logits, labels = made_up(10)
    whole = measured(logits, labels, batch_size=100)
    for batch_size in (1, 33, 500):
        part = measured(logits, labels, batch_size=batch_size)
        assert part.loss == pytest.approx(whole.loss, rel=1e-6)
        assert part.per_class_accuracy == whole.per_class_accuracy
        assert part.accuracy == whole.accuracy
        assert part.top5_accuracy == whole.top5_accuracy


def test_a_class_without_examples_has_no_accuracy_and_no_part_in_the_gap() -> None:
    result = measured(torch.eye(3)[[0, 0, 1, 0]], [0, 0, 1, 1])

    assert result.per_class_accuracy["class 0"] == 1
    assert result.per_class_accuracy["class 1"] == 0.5
    assert math.isnan(result.per_class_accuracy["class 2"])
    assert result.per_class_num_examples == {"class 0": 2, "class 1": 2, "class 2": 0}
    assert result.largest_gap == 0.5
    assert result.accuracy == 0.75


def test_the_loss_of_a_diverged_network_is_not_finite() -> None:
    assert not math.isfinite(measured(torch.full((2, 3), torch.nan), [0, 1]).loss)
