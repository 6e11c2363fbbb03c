"""Exponential moving average of the parameters. Post-processing: costs no privacy."""

import torch

from dpsgd.trees import Params

__all__ = ["ema_decay_at", "update_ema_"]


def ema_decay_at(step: int, decay: float) -> float:
    """Returns the decay of one update, warmed up so that the start is forgotten.

    Args:
        step: Updates done before this one, >= 0.
        decay: Decay reached in the end, in [0, 1).

    Source: De et al. 2022 (arXiv:2204.13650), reference code: min(mu, (1+t)/(10+t)).

    >>> ema_decay_at(0, 0.9999)
    0.1
    """
    return min(decay, (1 + step) / (10 + step))


def update_ema_(ema: Params, params: Params, *, step: int, decay: float) -> None:
    """Moves the average towards the parameters, once an update, in place.

    Args:
        ema: Average so far, leaves like `params`.
        params: Parameters after the update of this step.
        step: Updates done before this one, >= 0.
        decay: Decay reached in the end, in [0, 1).
    """
    weight = 1.0 - ema_decay_at(step, decay)
    leaves = [params[name] for name in ema]
    torch._foreach_lerp_(list(ema.values()), leaves, weight)
