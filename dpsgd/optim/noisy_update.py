"""Noise on the sum, one public divisor: the lines "Add noise" and "Descent".

Abadi et al. 2016, Algorithm 1.
"""

from dpsgd.errors import fault
from dpsgd.kernels import add_gaussian_noise_
from dpsgd.privacy import DPSGDMechanism
from dpsgd.trees import Params

__all__ = ["noisy_grad"]


def noisy_grad(
    clipped_sum: Params,
    mechanism: DPSGDMechanism,
    *,
    l2_sensitivity: float,
    noise_key: int,
) -> Params:
    r"""Turns the clipped sum of a whole draw into the private gradient, in place.

    $\tilde g = \frac{1}{B} \left( \sum_i \bar g_i + \mathcal N(0, \sigma^2 S^2 I)
    \right)$, S the sensitivity of the sum and B the expected batch size.

    Guarantees:
        The noise has standard deviation `mechanism.noise_std`, is float32, drawn
        once for the whole sum, independent in every coordinate. The divisor is the
        public `expected_batch_size`, never the size of this draw. An empty draw gives
        noise alone.

    Args:
        clipped_sum: Float32 leaves, the sum over all microbatches of one draw; they
            are overwritten, so that no copy without noise outlives the step.
        mechanism: Says noise and divisor.
        l2_sensitivity: What the sum's engine says of it, `ClippedGrad.l2_sensitivity`.
        noise_key: The step's key, `RandomStreams.noise_key(step)`. Never use one key
            for two different sums: their difference would have no noise.

    Returns:
        The same leaves, now (sum + noise) / B.

    Raises:
        ValueError: The mechanism is for a sum of another sensitivity, or a leaf is not
            contiguous float32.

    Source: Abadi et al. 2016, Algorithm 1, "Add noise" (arXiv:1607.00133).
    """
    if l2_sensitivity != mechanism.l2_sensitivity:
        rule = f"the mechanism's noise is for {mechanism.l2_sensitivity}"
        remedy = "give engine and mechanism one clipping norm and rescaling"
        raise ValueError(fault("l2_sensitivity", l2_sensitivity, rule, remedy))
    for leaf, name in enumerate(sorted(clipped_sum)):
        total = clipped_sum[name]
        add_gaussian_noise_(total, std=mechanism.noise_std, key=noise_key, leaf=leaf)
        total.div_(mechanism.expected_batch_size)
    return clipped_sum
