"""Differentially private training of image classifiers: the parts, for your own loops.

Names are loaded when they are first used, so that `import dpsgd` costs nothing and
epsilon can be computed without torch. Training as a whole is `dpsgd.assembly`,
`dpsgd.train` and the command `bin/dpsgd-train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpsgd.clipping import ClippedGrad, clipped_grad
    from dpsgd.config import Config, load_config, parse_config
    from dpsgd.data import ImageDataset, PoissonSampler, ViewLoader, microbatches
    from dpsgd.errors import UserError
    from dpsgd.models import (
        build_model,
        check_model,
        freeze,
        initialize,
        per_example_loss,
        trainable_params,
    )
    from dpsgd.optim import noisy_grad, update_ema_
    from dpsgd.privacy import (
        DPSGDMechanism,
        Phase,
        PrivacyLedger,
        PRVAccountant,
        calibrate_noise_multiplier,
        calibrate_num_steps,
    )
    from dpsgd.rng import RandomStreams

__all__ = [
    "ClippedGrad",
    "Config",
    "DPSGDMechanism",
    "ImageDataset",
    "PRVAccountant",
    "Phase",
    "PoissonSampler",
    "PrivacyLedger",
    "RandomStreams",
    "UserError",
    "ViewLoader",
    "build_model",
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "check_model",
    "clipped_grad",
    "freeze",
    "initialize",
    "load_config",
    "microbatches",
    "noisy_grad",
    "parse_config",
    "per_example_loss",
    "trainable_params",
    "update_ema_",
]

_HOMES = {
    "clipping": ("ClippedGrad", "clipped_grad"),
    "config": ("Config", "load_config", "parse_config"),
    "data": ("ImageDataset", "PoissonSampler", "ViewLoader", "microbatches"),
    "errors": ("UserError",),
    "models": (
        "build_model",
        "check_model",
        "freeze",
        "initialize",
        "per_example_loss",
        "trainable_params",
    ),
    "optim": ("noisy_grad", "update_ema_"),
    "privacy": (
        "DPSGDMechanism",
        "PRVAccountant",
        "Phase",
        "PrivacyLedger",
        "calibrate_noise_multiplier",
        "calibrate_num_steps",
    ),
    "rng": ("RandomStreams",),
}


def __getattr__(name: str) -> Any:
    """Loads a public name from its room."""
    for room, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dpsgd.{room}"), name)
    raise AttributeError(f"module `dpsgd` has no attribute `{name}`")
