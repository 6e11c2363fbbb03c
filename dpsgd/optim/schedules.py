"""Learning rate as a function of the step: public, computed from public numbers."""

import math

from dpsgd.config import OptimizerConfig

__all__ = ["learning_rate_at"]


def learning_rate_at(step: int, config: OptimizerConfig, *, num_steps: int) -> float:
    """Returns the learning rate of one step.

    Args:
        step: Step number, 0 <= step < num_steps.
        config: Schedule, top of it, and length of the linear warm-up.
        num_steps: Length of the run, of which the cosine spans what the warm-up leaves.

    Returns:
        The rate: it rises linearly to `learning_rate` over the warm-up, and is then
        constant, or falls along half a cosine towards 0.
    """
    top = config.learning_rate
    if step < config.warmup_steps:
        return top * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return top
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return top * 0.5 * (1.0 + math.cos(math.pi * done))
