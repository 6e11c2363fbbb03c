"""A run gets the engine of its plan, and the choice changes nothing but rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import start

from dpsgd.clipping import GhostClippedGrad, VmapClippedGrad
from dpsgd.train import train


@pytest.mark.parametrize(
    ("changes", "kind", "execution"),
    [
        ({}, GhostClippedGrad, "eager"),
        ({"runtime.engine": "vmap"}, VmapClippedGrad, "eager"),
        ({"runtime.execution": "compile"}, VmapClippedGrad, "compile"),
    ],
)
def test_a_run_has_the_engine_of_its_plan(
    tmp_path: Path, changes: dict[str, Any], kind: type, execution: str
) -> None:
    run, _, plan = start(tmp_path, changes)

    assert type(run.grad_fn) is kind
    assert isinstance(run.grad_fn, GhostClippedGrad | VmapClippedGrad)
    assert run.grad_fn.execution == plan.execution == execution


def test_a_run_learns_the_same_with_either_engine(tmp_path: Path) -> None:
    params = []
    for engine in ("vmap", "ghost"):
        run, state, _ = start(tmp_path / engine, {"runtime.engine": engine})
        train(run, state)
        params.append(state.params)

    for name, leaf in params[0].items():
        # Four steps of size 0.5; the ghost engine bounds the rounding of its norms.
        torch.testing.assert_close(params[1][name], leaf, rtol=1e-3, atol=1e-4)
