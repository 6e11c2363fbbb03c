"""Which engine a run gets, and that its choice changes nothing but rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_config, start

from dpsgd.clipping import GhostClippedGrad, VmapClippedGrad
from dpsgd.errors import ConfigError
from dpsgd.gradient_engine import build_gradient_engine, execution_of
from dpsgd.train import train


class OnCuda:
    """As much of a plan as the choice reads, for a device that is not here."""

    device = torch.device("cuda")
    microbatch_size = 4

    class mechanism:
        unit, clipping_norm, rescale_to_unit_norm = "example", 1.0, True


class OnCpu(OnCuda):
    device = torch.device("cpu")


def chosen(plan: Any = OnCuda, **changes: Any) -> tuple[type, str]:
    config = small_config({name.replace("__", "."): v for name, v in changes.items()})
    engine = build_gradient_engine(config, plan, torch.nn.Linear(1, 1))
    return type(engine), execution_of(config, plan)


def test_cuda_gets_the_ghost_engine_recorded() -> None:
    assert chosen() == (GhostClippedGrad, "cuda_graph")
    assert chosen(runtime__parallel="fsdp") == (GhostClippedGrad, "cuda_graph")
    assert chosen(runtime__execution="compile") == (VmapClippedGrad, "compile")
    assert chosen(runtime__engine="vmap") == (VmapClippedGrad, "cuda_graph")


def test_a_cpu_gets_the_ghost_engine_eagerly() -> None:
    assert chosen(OnCpu) == (GhostClippedGrad, "eager")
    assert chosen(OnCpu, runtime__execution="compile") == (VmapClippedGrad, "compile")


def test_secure_noise_gets_the_engine_that_sums_in_float64() -> None:
    secure = {"privacy__noise": "secure", "train__seed": None}

    assert chosen(**secure) == (VmapClippedGrad, "cuda_graph")
    with pytest.raises(ConfigError, match=r"runtime\.engine=ghost: .*secure noise"):
        chosen(runtime__engine="ghost", **secure)


def test_the_ghost_engine_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.engine=ghost: .*torch\.compile"):
        chosen(runtime__engine="ghost", runtime__execution="compile")


def test_a_run_without_privacy_is_recorded_and_never_compiled() -> None:
    public = {"privacy__enabled": False, "privacy__noise_multiplier": None}
    public["privacy__delta"] = None

    assert chosen(**public)[1] == "cuda_graph"
    with pytest.raises(ConfigError, match=r"runtime\.execution=compile: .*records"):
        chosen(runtime__execution="compile", **public)


def test_a_run_learns_the_same_with_either_engine(tmp_path: Path) -> None:
    params = []
    for engine in ("vmap", "ghost"):
        run, state, _ = start(tmp_path / engine, {"runtime.engine": engine})
        train(run, state)
        params.append(state.params)

    for name, leaf in params[0].items():
        # Four steps of size 0.5; the ghost engine bounds the rounding of its norms.
        torch.testing.assert_close(params[1][name], leaf, rtol=1e-3, atol=1e-4)
