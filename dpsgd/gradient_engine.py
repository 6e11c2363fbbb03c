"""Builds the gradient engine of a run, as its plan chose it."""

from collections.abc import Callable

import torch
from torch import nn

from dpsgd.clipping import ClippedGrad, LossFn, clipped_grad
from dpsgd.config import Config
from dpsgd.models import classifier_loss, per_example_loss, per_user_loss
from dpsgd.planning import Plan

__all__ = ["build_gradient_engine", "loss_of"]


def build_gradient_engine(config: Config, plan: Plan, model: nn.Module) -> ClippedGrad:
    """Returns "Compute gradient" and "Clip gradient" for the network."""
    # Shapes are fixed, so the search for the fastest convolution pays at once.
    torch.backends.cudnn.benchmark = plan.device.type == "cuda"
    return clipped_grad(
        loss_of(config, model),
        clipping_norm=plan.mechanism.clipping_norm,
        rescale_to_unit_norm=plan.mechanism.rescale_to_unit_norm,
        microbatch_size=plan.microbatch_size,
        engine=plan.engine,
        execution=plan.execution,
    )


def loss_of(config: Config, model: nn.Module) -> LossFn:
    """Returns the loss of one unit: of its views, or of their cached features."""
    loss: Callable[..., LossFn] = per_example_loss
    if config.privacy.unit == "user":
        loss = per_user_loss
    if config.runtime.feature_cache is not None:
        loss = classifier_loss
    return loss(model, label_smoothing=config.train.label_smoothing)
