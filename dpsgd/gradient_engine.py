"""Chooses and builds the gradient engine of a run, from its settings and its device."""

from collections.abc import Callable

import torch
from torch import nn

from dpsgd.clipping import ClippedGrad, Engine, Execution, LossFn, clipped_grad
from dpsgd.config import Config
from dpsgd.errors import ConfigError, fault
from dpsgd.models import classifier_loss, per_example_loss, per_user_loss
from dpsgd.planning import Plan

__all__ = ["build_gradient_engine", "execution_of", "loss_of"]


def build_gradient_engine(config: Config, plan: Plan, model: nn.Module) -> ClippedGrad:
    """Returns "Compute gradient" and "Clip gradient" for the network."""
    # Shapes are fixed, so the search for the fastest convolution pays at once.
    torch.backends.cudnn.benchmark = plan.device.type == "cuda"
    return clipped_grad(
        loss_of(config, model),
        clipping_norm=plan.mechanism.clipping_norm,
        rescale_to_unit_norm=plan.mechanism.rescale_to_unit_norm,
        microbatch_size=plan.microbatch_size,
        engine=_engine(config),
        execution=execution_of(config, plan),
    )


def loss_of(config: Config, model: nn.Module) -> LossFn:
    """Returns the loss of one unit: of its views, or of their cached features."""
    loss: Callable[..., LossFn] = per_example_loss
    if config.privacy.unit == "user":
        loss = per_user_loss
    if config.runtime.feature_cache is not None:
        loss = classifier_loss
    return loss(model, label_smoothing=config.train.label_smoothing)


def _engine(config: Config) -> Engine:
    """Returns how per-sample gradients are bounded, and what `auto` takes.

    Raises:
        ConfigError: The ghost engine is asked for with torch.compile, or for secure
            noise.
    """
    runtime = config.runtime
    is_compiled = runtime.execution == "compile"
    if runtime.engine == "ghost" and is_compiled:
        rule = "records layers, which torch.compile cannot follow"
        remedy = "take runtime.execution=auto or runtime.engine=vmap"
        raise ConfigError(fault("runtime.engine", "ghost", rule, remedy))
    is_secure = config.privacy.noise == "secure"
    if runtime.engine == "ghost" and is_secure:
        rule = "sums in float32, which secure noise does not take"
        remedy = "take runtime.engine=auto or vmap"
        raise ConfigError(fault("runtime.engine", "ghost", rule, remedy))
    if runtime.engine != "auto":
        return runtime.engine
    return "vmap" if is_compiled or is_secure else "ghost"


def execution_of(config: Config, plan: Plan) -> Execution:
    """Returns how passes run, which `auto` leaves to the device."""
    on_gpu = plan.device.type == "cuda"
    execution = config.runtime.execution
    if execution == "compile" and not config.privacy.enabled:
        rule = "a run without privacy records its passes or takes them eagerly"
        raise ConfigError(fault("runtime.execution", execution, rule, "take auto"))
    if execution == "cuda_graph" and not on_gpu:
        rule = f"needs a CUDA device, and the run is on {plan.device}"
        raise ConfigError(fault("runtime.execution", execution, rule, "take auto"))
    if execution != "auto":
        return execution
    return "cuda_graph" if on_gpu else "eager"
