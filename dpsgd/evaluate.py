"""Accuracy, loss and a per-class table on the public test set."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.config import Config
from dpsgd.data import Dataset, DataSplits, normalize, num_decode_workers
from dpsgd.parallel import Ranks
from dpsgd.trees import Params

__all__ = ["Evaluation", "evaluate", "evaluator"]

_LARGEST_BATCH = 500
_PIXELS = 1 << 23  # 167 images of 224x224


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a network does on a test set.

    Attributes:
        accuracy: Share of examples whose first guess is right, in [0, 1].
        top5_accuracy: Share whose label is among five guesses (or all classes).
        loss: Mean cross-entropy in nats; inf or NaN if the network has diverged.
        per_class_accuracy: Accuracy by class name; NaN for a class without examples.
        num_examples: Size of the test set.
        per_class_num_examples: Its examples by class name.
        per_group_accuracy: Accuracy by group of the test set; empty without groups.
        per_group_num_examples: Its examples by group.
    """

    accuracy: float
    top5_accuracy: float
    loss: float
    per_class_accuracy: dict[str, float]
    num_examples: int
    per_class_num_examples: dict[str, int]
    per_group_accuracy: dict[str, float]
    per_group_num_examples: dict[str, int]

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
    dataset: Dataset,
    *,
    normalize: Callable[[Tensor], Tensor],
    class_names: tuple[str, ...],
    batch_size: int,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Measures a network on a test set, one view an image, without augmentation.

    Each rank measures its share of the test set, and counts are summed.

    Accuracies are exact counts without noise, by class and by the test set's groups,
    so that the test set must be public.

    Args:
        model: Network, whose parameters are replaced by `params`.
        params: Weights to measure, on the device to measure on.
        dataset: Test set.
        normalize: Maps uint8 images (M, C, H, W) to the network's input.
        class_names: Name of each output.
        batch_size: Images a pass; memory only.
        ranks: Who measures; None is this process alone.
    """
    ranks = ranks or Ranks()
    device = next(iter(params.values())).device
    num_classes, total = len(class_names), len(dataset)
    is_right = torch.zeros(total, dtype=torch.int64)
    top5, loss = 0, 0.0
    own = ranks.share(total)
    with torch.no_grad():
        rows = torch.arange(own.start, own.stop)
        starts = range(own.start, own.stop, batch_size)
        sizes = [min(batch_size, own.stop - start) for start in starts]
        start = own.start
        for images, labels in dataset.batches(rows, sizes, device=device):
            inputs = normalize(images[:, 0])  # (M, C, H, W)
            logits = functional_call(model, params, (inputs,)).float()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            guesses = logits.topk(min(5, num_classes), dim=1).indices  # (M, 5)
            hits = guesses == labels[:, None]
            top5 += int(hits.any(dim=1).sum())
            is_right[start : start + len(hits)] = hits[:, 0].cpu().long()
            start += len(hits)
    ranks.meet()  # however much longer one of them read its share
    is_right = ranks.total(is_right).bool()
    top5, loss = ranks.total(torch.tensor([top5, loss], dtype=torch.float64)).tolist()
    per_class = _shares(is_right, dataset.labels.cpu(), class_names)
    per_group: tuple[dict[str, float], dict[str, int]] = ({}, {})
    if dataset.groups is not None:
        per_group = _shares(is_right, dataset.groups, dataset.group_names)
    return Evaluation(
        accuracy=float(is_right.sum()) / total,
        top5_accuracy=top5 / total,
        loss=loss / total,
        per_class_accuracy=per_class[0],
        num_examples=total,
        per_class_num_examples=per_class[1],
        per_group_accuracy=per_group[0],
        per_group_num_examples=per_group[1],
    )


def _shares(
    is_right: Tensor, members: Tensor, names: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, int]]:
    """Returns accuracy and number of examples of every class or group, by name."""
    count = torch.bincount(members, minlength=len(names))
    right = torch.bincount(members[is_right], minlength=len(names))
    shares = (right.double() / count).tolist()
    return (
        dict(zip(names, shares, strict=True)),
        dict(zip(names, count.tolist(), strict=True)),
    )


def evaluator(
    config: Config,
    splits: DataSplits,
    model: nn.Module,
    class_names: tuple[str, ...],
    device: torch.device,
) -> Callable[..., Evaluation]:
    """Returns what measures weights on the public test set of a run.

    Args:
        config: Settings, of which normalisation and decoding are used.
        splits: Data.
        model: Network, whose parameters the weights replace.
        class_names: Name of each output.
        device: Where to measure.
    """
    workers = num_decode_workers(config.runtime.decode_workers)
    most = max(1, _PIXELS // math.prod(splits.test.image_shape[1:]))
    return partial(
        evaluate,
        model,
        dataset=splits.test.placed(device, num_workers=workers),
        normalize=partial(normalize, mean=config.data.mean, std=config.data.std),
        class_names=class_names,
        batch_size=min(_LARGEST_BATCH, most),
    )
