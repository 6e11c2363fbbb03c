"""Accuracy, loss and a per-class table on the public test set."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.data import ImageDataset
from dpsgd.trees import Params

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a network does on a test set.

    Attributes:
        accuracy: Share of examples whose first guess is right, in [0, 1].
        top5_accuracy: Share whose label is among five guesses (or all classes).
        loss: Mean cross-entropy in nats; inf or NaN if the network has diverged.
        per_class_accuracy: Accuracy by class name; NaN for a class without examples.
        num_examples: Size of the test set.
    """

    accuracy: float
    top5_accuracy: float
    loss: float
    per_class_accuracy: dict[str, float]
    num_examples: int

    @property
    def measures(self) -> dict[str, float]:
        """Accuracies and loss under the names that tables show."""
        return {
            "top-1": self.accuracy,
            "top-5": self.top5_accuracy,
            "loss": self.loss,
        }

    @property
    def largest_gap(self) -> float:
        """Best minus worst class accuracy, in [0, 1], of classes with examples."""
        known = [a for a in self.per_class_accuracy.values() if not math.isnan(a)]
        return max(known) - min(known) if known else 0.0


def evaluate(
    model: nn.Module,
    params: Params,
    dataset: ImageDataset,
    *,
    normalize: Callable[[Tensor], Tensor],
    class_names: tuple[str, ...],
    batch_size: int,
) -> Evaluation:
    """Measures a network on a test set, one view an image, without augmentation.

    Args:
        model: Network, whose parameters are replaced by `params`.
        params: Weights to measure, on the device to measure on.
        dataset: Test set, on any device.
        normalize: Maps uint8 images (M, C, H, W) to the network's input.
        class_names: Name of each output.
        batch_size: Images a pass; memory only.
    """
    device = next(iter(params.values())).device
    num_classes = len(class_names)
    right = torch.zeros(num_classes, dtype=torch.float64)
    count = torch.zeros(num_classes, dtype=torch.float64)
    top5, loss = 0, 0.0
    with torch.no_grad():
        for start in range(0, len(dataset), batch_size):
            images = dataset.images[start : start + batch_size].to(device)
            labels = dataset.labels[start : start + batch_size].to(device)
            logits = functional_call(model, params, (normalize(images),)).float()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            guesses = logits.topk(min(5, num_classes), dim=1).indices  # (M, 5)
            hits = guesses == labels[:, None]
            top5 += int(hits.any(dim=1).sum())
            count += torch.bincount(labels.cpu(), minlength=num_classes)
            right += torch.bincount(labels[hits[:, 0]].cpu(), minlength=num_classes)
    per_class = (right / count).tolist()
    total = len(dataset)
    return Evaluation(
        accuracy=float(right.sum()) / total,
        top5_accuracy=top5 / total,
        loss=loss / total,
        per_class_accuracy=dict(zip(class_names, per_class, strict=True)),
        num_examples=total,
    )
