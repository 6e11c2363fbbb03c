"""What is seen of a small run: its parameters, its releases, and its records."""

from typing import Any

import pytest
import torch

import dpsgd.train
from dpsgd.config import Config
from dpsgd.models import build_model, initialize
from dpsgd.run import EvaluationRecord, Run, StepRecord
from dpsgd.trees import Params

# One-ulp differences of float32 sums, grown over a few steps of learning rate 0.5.
ROUNDING = 1e-5


def copies(params: Params) -> Params:
    """What no later step changes."""
    return {name: leaf.clone() for name, leaf in params.items()}


def l2_norm(leaves: Params) -> float:
    """The norm of all leaves together."""
    return float(torch.cat([leaf.flatten() for leaf in leaves.values()]).norm())


def assert_same(first: Params, second: Params, tolerance: float = 0.0) -> None:
    """Asserts equal leaves, or as near as the tolerance."""
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        torch.testing.assert_close(leaf, second[name], rtol=0, atol=tolerance)


def network(config: Config, run: Run) -> torch.nn.Module:
    """The network of a run, initialised as the run does it."""
    model = build_model(config.model, image_shape=(1, 8, 8), num_classes=10)
    initialize(model, run.streams.generator("init"))
    return model


def record_releases(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes every step leave its clipped sum, noise key and released gradient."""
    releases: list[dict[str, Any]] = []
    release = dpsgd.train.noisy_descent_

    def recorded(
        clipped_sum: Params, mechanism: Any, optimizer: Any, **settings: Any
    ) -> None:
        before = copies(clipped_sum)
        release(clipped_sum, mechanism, optimizer, **settings)
        releases.append(
            {
                "clipped_sum": before,
                "mechanism": mechanism,
                "noise_key": settings["noise_key"],
                "grads": copies(clipped_sum),  # it was made private in place
            }
        )

    monkeypatch.setattr(dpsgd.train, "noisy_descent_", recorded)
    return releases


class Watcher:
    """Keeps what it is told."""

    def __init__(
        self,
        evaluations: list[EvaluationRecord] | None = None,
        steps: list[StepRecord] | None = None,
    ) -> None:
        self.evaluations = [] if evaluations is None else evaluations
        self.steps = [] if steps is None else steps

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)
