"""Exponential moving average of the parameters. Post-processing: costs no privacy."""

import torch

from dpsgd.trees import Params

__all__ = ["ema_decay_at", "update_ema_"]


def ema_decay_at(step: int, decay: float, warmup: float = 10.0) -> float:
    """Returns the decay of one update, warmed up so that the start is forgotten.

    Args:
        step: Updates done before this one, >= 0.
        decay: Decay reached in the end, in [0, 1).
        warmup: Length > 1 of the warm-up. While it lasts, update s of t has a weight
            that grows as s**(warmup - 2): 2 weighs all alike.

    Source: De et al. 2022 (arXiv:2204.13650), reference code: min(mu, (1+t)/(10+t));
    with other lengths, polynomial-decay averaging, Shamir and Zhang 2013
    (arXiv:1212.1824), section 4.

    >>> ema_decay_at(0, 0.9999), ema_decay_at(3, 0.9999, warmup=2.0)
    (0.1, 0.8)
    """
    return min(decay, (1 + step) / (warmup + step))


def update_ema_(
    ema: Params, params: Params, *, step: int, decay: float, warmup: float = 10.0
) -> None:
    """Moves the average towards the parameters, once an update, in place.

    Args:
        ema: Average so far, leaves like `params`.
        params: Parameters after the update of this step.
        step: Updates done before this one, >= 0.
        decay: Decay reached in the end, in [0, 1).
        warmup: Length of the warm-up, > 1, as for `ema_decay_at`.
    """
    weight = 1.0 - ema_decay_at(step, decay, warmup)
    leaves = [params[name] for name in ema]
    torch._foreach_lerp_(list(ema.values()), leaves, weight)
