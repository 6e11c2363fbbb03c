"""Update rules of torch.optim over a dict of parameters, with a flat state."""

from typing import Any, Final

import torch
from torch import Tensor

from dpsgd.config import OptimizerConfig
from dpsgd.optim.schedules import learning_rate_at
from dpsgd.trees import Params

__all__ = ["Optimizer"]

_MOMENTUM = "momentum_buffer"  # torch.optim's name, and so that in checkpoints


class Optimizer:
    """Steps parameters in place along a private gradient: post-processing.

    Args:
        params: Parameters to step, kept by reference.
        config: Rule, rates and schedule.
        num_steps: Length of the run, for the schedule.
    """

    def __init__(
        self, params: Params, config: OptimizerConfig, *, num_steps: int
    ) -> None:
        self.params: Final = params
        self.config: Final = config
        self._num_steps = num_steps
        self._rule = _build_rule(list(params.values()), config)

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step, 0 <= step < num_steps."""
        return learning_rate_at(step, self.config, num_steps=self._num_steps)

    def momenta(self) -> Params | None:
        """Returns SGD's momenta by parameter name, to be changed in place.

        They are 0 before the first step; None if the rule has none.
        """
        if self.config.name != "sgd" or not self.config.momentum:
            return None
        state = self._rule.state
        for leaf in self.params.values():
            if _MOMENTUM not in state[leaf]:
                state[leaf][_MOMENTUM] = torch.zeros_like(leaf)
        return {name: state[leaf][_MOMENTUM] for name, leaf in self.params.items()}

    def step(self, grads: Params, *, step: int) -> None:
        """Takes one update with the learning rate of `step`.

        Args:
            grads: Private gradients by parameter name.
            step: Step number, 0 <= step < num_steps.
        """
        for group in self._rule.param_groups:
            group["lr"] = self.learning_rate(step)
        for name, leaf in self.params.items():
            leaf.grad = grads[name]
        self._rule.step()
        self._rule.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Returns momenta and step counts as a flat dict, for a checkpoint."""
        names = list(self.params)
        return {
            f"{names[index]}.{key}": torch.as_tensor(value).clone()
            for index, values in self._rule.state_dict()["state"].items()
            for key, value in values.items()
            if value is not None
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over a state that `state` gave."""
        indices = {name: index for index, name in enumerate(self.params)}
        per_leaf: dict[int, dict[str, Tensor]] = {}
        for full_name, value in state.items():
            name, _, key = full_name.rpartition(".")
            per_leaf.setdefault(indices[name], {})[key] = value
        groups = self._rule.state_dict()["param_groups"]
        self._rule.load_state_dict({"state": per_leaf, "param_groups": groups})


def _build_rule(leaves: list[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns the torch.optim rule that the configuration names."""
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "foreach": True,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(leaves, betas=config.betas, **common)
    return torch.optim.SGD(leaves, momentum=config.momentum, **common)
