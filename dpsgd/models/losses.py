"""The loss of one example, or of one user, as what is differentiated and clipped."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.models.trainable import CLASSIFIER
from dpsgd.trees import Params

__all__ = ["classifier_loss", "per_example_loss", "per_user_loss"]


def per_example_loss(
    model: nn.Module, *, label_smoothing: float = 0.0
) -> Callable[..., Tensor]:
    """Returns the loss of one example as a function of the trainable parameters.

    The K views of the example are averaged inside its loss, so that they are clipped
    together and augmentation costs no privacy.

    Args:
        model: Network that `check_model` accepts.
        label_smoothing: Share of the label that is spread over all classes, in [0, 1).

    Returns:
        `loss(params, views, label)` of `views` (K, C, H, W) and `label` (): the mean
        cross-entropy over the views, a scalar. Parameters that are not in `params`
        are the model's own, and constant. A model with stochastic depth takes as
        fourth `uniforms` (K, draws_per_view), without which no branch is left out.

    Source: De et al. 2022 (arXiv:2204.13650), section 3, "augmentation multiplicity".
    """

    def loss(params: Params, views: Tensor, label: Tensor, *uniforms: Tensor) -> Tensor:
        logits = functional_call(model, params, (views, *uniforms))
        labels = label.expand(logits.shape[0])
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return loss


def classifier_loss(
    model: nn.Module, *, label_smoothing: float = 0.0
) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """Returns the loss of one example as a function of its features.

    Args:
        model: Network, whose last layer is its module `classifier`.
        label_smoothing: As for `per_example_loss`.

    Returns:
        `loss(params, features, label)` of `features` (K, F), what the classifier is
        given for each view, otherwise as that of `per_example_loss`.
    """
    loss_of = per_example_loss(
        model.get_submodule(CLASSIFIER), label_smoothing=label_smoothing
    )

    def loss(params: Params, features: Tensor, label: Tensor) -> Tensor:
        own = {
            name.removeprefix(f"{CLASSIFIER}."): leaf for name, leaf in params.items()
        }
        return loss_of(own, features, label)

    return loss


def per_user_loss(
    model: nn.Module, *, label_smoothing: float = 0.0
) -> Callable[..., Tensor]:
    r"""Returns the loss of one user as a function of the trainable parameters.

    The loss is $\frac{1}{n} \sum_{i=1}^{n} \ell_i$ over the n examples with which the
    user takes part, each the mean over its K views. Its gradient is clipped as one, so
    that all of the user's examples together have norm at most C. Dividing by n costs no
    privacy: it is a function of this user's data alone, like the gradients it divides,
    and whatever it is, the clipping bound holds. The divisor of the noisy sum is
    another one, and public.

    Args:
        model: Network that `check_model` accepts.
        label_smoothing: Share of a label that is spread over all classes, in [0, 1).

    Returns:
        `loss(params, views, labels, present)` of `views` (S, K, C, H, W), `labels` (S,)
        and `present` (S,) bool, False for padding, which counts for nothing; a scalar,
        0 if all is padding. A model with stochastic depth takes as fifth `uniforms`
        (S, K, draws_per_view).

    Source: the gradient of a user, averaged and then clipped: McMahan et al. 2018
    (arXiv:1710.06963), with one step in place of local training.
    """

    def loss(
        params: Params,
        views: Tensor,
        labels: Tensor,
        present: Tensor,
        *uniforms: Tensor,
    ) -> Tensor:
        inputs = tuple(one.flatten(0, 1) for one in (views, *uniforms))
        logits = functional_call(model, params, inputs)  # (S * K, O)
        repeated = labels[:, None].expand(views.shape[:2]).flatten()
        losses = F.cross_entropy(
            logits, repeated, reduction="none", label_smoothing=label_smoothing
        )
        of_examples = losses.view(views.shape[:2]).mean(dim=1)  # (S,)
        kept = torch.where(present, of_examples, 0.0)
        return kept.sum() / present.sum().clamp(min=1)

    return loss
