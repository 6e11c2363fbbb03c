"""Noise on the sum, one public divisor: the lines "Add noise" and "Descent".

Abadi et al. 2016, Algorithm 1.
"""

from collections.abc import Mapping

from torch import Tensor

from dpsgd.errors import fault
from dpsgd.kernels import SGDStep, add_gaussian_noise_, noisy_sgd_
from dpsgd.optim.ema import ema_decay_at, update_ema_
from dpsgd.optim.optimizers import Optimizer
from dpsgd.optim.secure_noise import SecureNoise
from dpsgd.privacy import DPSGDMechanism
from dpsgd.trees import Params

__all__ = ["noisy_descent_", "noisy_grad"]


def noisy_grad(
    clipped_sum: Params,
    mechanism: DPSGDMechanism,
    *,
    l2_sensitivity: float,
    noise_key: int,
    secure_noise: SecureNoise | None = None,
    offsets: Mapping[str, int] | None = None,
) -> Params:
    r"""Turns the clipped sum of a whole draw into the private gradient, in place.

    $\tilde g = \frac{1}{B} \left( \sum_i \bar g_i + \mathcal N(0, \sigma^2 S^2 I)
    \right)$, S the sensitivity of the sum and B the expected batch size.

    Guarantees:
        The noise has standard deviation `mechanism.noise_std`, is float32, drawn
        once for the whole sum, independent in every coordinate. The divisor is the
        public `expected_batch_size`, never the size of this draw. An empty draw gives
        noise alone. Secure noise is at least as large, and as `SecureNoise` says.

    Args:
        clipped_sum: Float32 leaves, float64 for secure noise, the sum over all
            microbatches of one draw; they are overwritten, so that no copy without
            noise outlives the step.
        mechanism: Says noise and divisor.
        l2_sensitivity: What the sum's engine says of it, `ClippedGrad.l2_sensitivity`.
        noise_key: The step's key, `RandomStreams.noise_key(step)`. Never use one key
            for two different sums: their difference would have no noise.
        secure_noise: Takes the place of the noise of the key; None keeps that.
        offsets: Elements of each whole leaf that lie before the given part of it; None
            if all are whole. The parts of all ranks then get the noise of the whole,
            each element its own draw. Secure noise is for whole leaves, on one rank.

    Returns:
        (sum + noise) / B, float32: the same leaves, or with secure noise others.

    Raises:
        ValueError: Mechanism or secure noise is for a sum of another sensitivity, or a
            leaf is not contiguous float32, or float64 for secure noise.

    Source: Abadi et al. 2016, Algorithm 1, "Add noise" (arXiv:1607.00133).
    """
    _check_sensitivity(l2_sensitivity, mechanism)
    if secure_noise is not None:
        return _securely_noisy(clipped_sum, mechanism, secure_noise)
    std = mechanism.noise_std
    for leaf, name in enumerate(sorted(clipped_sum)):
        total, offset = clipped_sum[name], (offsets or {}).get(name, 0)
        add_gaussian_noise_(total, std=std, key=noise_key, leaf=leaf, offset=offset)
        total.div_(mechanism.expected_batch_size)
    return clipped_sum


def noisy_descent_(
    clipped_sum: Params,
    mechanism: DPSGDMechanism,
    optimizer: Optimizer,
    *,
    l2_sensitivity: float,
    noise_key: int,
    secure_noise: SecureNoise | None = None,
    offsets: Mapping[str, int] | None = None,
    step: int,
    ema: Params | None,
    ema_decay: float | None,
    ema_warmup: float = 10.0,
) -> None:
    """Adds noise, divides, steps the parameters and averages them, all in place.

    That is `noisy_grad`, `Optimizer.step` and `update_ema_`, one after the other; with
    SGD and the noise of a key, the three are one pass over the parameters, the same to
    float32 rounding.

    Guarantees:
        Those of `noisy_grad`. The clipped sum is overwritten by the private gradient,
        or with secure noise by the noisy sum, and parameters, momenta and average
        depend on it through that alone.

    Args:
        clipped_sum: As for `noisy_grad`; leaves like the optimizer's parameters.
        mechanism: As for `noisy_grad`.
        optimizer: Holds parameters, rule and momenta.
        l2_sensitivity: As for `noisy_grad`.
        noise_key: As for `noisy_grad`.
        secure_noise: As for `noisy_grad`.
        offsets: As for `noisy_grad`; parameters, momenta and average are parts alike.
        step: Step number, 0 <= step < num_steps.
        ema: Average so far, leaves like the parameters; None keeps none.
        ema_decay: Decay reached in the end, in [0, 1); None keeps no average.
        ema_warmup: Length of its warm-up, > 1, as for `ema_decay_at`.

    Raises:
        ValueError: As `noisy_grad`, or a leaf is not like its parameters.

    Source: Abadi et al. 2016, Algorithm 1, "Add noise", "Descent" (arXiv:1607.00133).
    """
    if optimizer.config.name != "sgd" or secure_noise is not None:
        grads = noisy_grad(
            clipped_sum,
            mechanism,
            l2_sensitivity=l2_sensitivity,
            noise_key=noise_key,
            secure_noise=secure_noise,
            offsets=offsets,
        )
        optimizer.step(grads, step=step)
        if ema is not None and ema_decay is not None:
            update_ema_(
                ema, optimizer.params, step=step, decay=ema_decay, warmup=ema_warmup
            )
        return
    _check_sensitivity(l2_sensitivity, mechanism)
    names, momenta = sorted(clipped_sum), optimizer.momenta()
    averages = None if ema is None or ema_decay is None else _leaves(ema, names)
    noisy_sgd_(
        _leaves(optimizer.params, names),
        _leaves(clipped_sum, names),
        step=SGDStep(
            noise_std=mechanism.noise_std,
            noise_key=noise_key,
            divisor=mechanism.expected_batch_size,
            learning_rate=optimizer.learning_rate(step),
            momentum=optimizer.config.momentum,
            weight_decay=optimizer.config.weight_decay,
            ema_weight=1 - ema_decay_at(step, ema_decay or 0.0, ema_warmup),
        ),
        momenta=None if momenta is None else _leaves(momenta, names),
        averages=averages,
        offsets=[(offsets or {}).get(name, 0) for name in names],
    )


def _check_sensitivity(l2_sensitivity: float, mechanism: DPSGDMechanism) -> None:
    """Raises unless the mechanism's noise is for a sum of this sensitivity."""
    if l2_sensitivity != mechanism.l2_sensitivity:
        rule = f"the mechanism's noise is for {mechanism.l2_sensitivity}"
        remedy = "give engine and mechanism one clipping norm and rescaling"
        raise ValueError(fault("l2_sensitivity", l2_sensitivity, rule, remedy))


def _leaves(tree: Params, names: list[str]) -> list[Tensor]:
    """Returns the leaves of these names, which must be all."""
    if tree.keys() != set(names):
        odd = sorted(tree.keys() ^ set(names))
        rule = "the sum must have the leaves of parameters and average, and no others"
        raise ValueError(fault("clipped_sum", odd, rule, "sum over all parameters"))
    return [tree[name] for name in names]


def _securely_noisy(
    clipped_sum: Params, mechanism: DPSGDMechanism, noise: SecureNoise
) -> Params:
    """Returns the private gradient with secure noise, overwriting the sum."""
    if noise.std * noise.spacing < mechanism.noise_std:
        rule = f"the mechanism wants at least {mechanism.noise_std}"
        remedy = "make both from one mechanism"
        raise ValueError(fault("secure_noise", noise.std * noise.spacing, rule, remedy))
    noise.add_(clipped_sum)
    divisor = mechanism.expected_batch_size
    return {name: (total / divisor).float() for name, total in clipped_sum.items()}
