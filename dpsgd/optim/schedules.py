"""Learning rate as a function of the step: public, computed from public numbers."""

import math

from dpsgd.config import OptimizerConfig

__all__ = ["learning_rate_at"]


def learning_rate_at(step: int, config: OptimizerConfig, *, num_steps: int) -> float:
    """Returns the learning rate of one step.

    Args:
        step: Step number, 0 <= step < num_steps.
        config: Schedule, top of it, and lengths of the linear warm-up and of the decay.
        num_steps: Length of the run, at whose end the decay ends.

    Returns:
        The rate: it rises linearly to `learning_rate` over the warm-up, is constant,
        and falls towards 0 over the last `decay_steps`, or all that the warm-up leaves,
        along half a cosine or a line.
    """
    top = config.learning_rate
    if step < config.warmup_steps:
        return top * (step + 1) / (config.warmup_steps + 1)
    decay_steps = config.decay_steps or max(1, num_steps - config.warmup_steps)
    done = max(0, step - (num_steps - decay_steps)) / decay_steps
    if config.schedule == "constant":
        return top
    if config.schedule == "linear":
        return top * (1.0 - done)
    return top * 0.5 * (1.0 + math.cos(math.pi * done))
