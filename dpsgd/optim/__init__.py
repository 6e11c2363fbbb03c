"""From the clipped sum to new parameters: noise, divisor, update, average."""

from dpsgd.optim.ema import ema_decay_at, update_ema_
from dpsgd.optim.noise_limits import check_noise
from dpsgd.optim.noisy_update import noisy_descent_, noisy_grad
from dpsgd.optim.optimizers import Optimizer
from dpsgd.optim.schedules import learning_rate_at
from dpsgd.optim.secure_noise import SecureNoise

__all__ = [
    "Optimizer",
    "SecureNoise",
    "check_noise",
    "ema_decay_at",
    "learning_rate_at",
    "noisy_descent_",
    "noisy_grad",
    "update_ema_",
]
