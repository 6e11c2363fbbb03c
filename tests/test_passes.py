"""Which engine and which execution a run gets, on either kind of device."""

from typing import Any

import pytest
import torch
from small_runs import small_config

from dpsgd.errors import ConfigError
from dpsgd.passes import choose_device, choose_passes

WITHOUT_PRIVACY = {
    "privacy.enabled": False,
    "privacy.noise_multiplier": None,
    "privacy.delta": None,
}
SECURE = {"privacy.noise": "secure", "train.seed": None}


def chosen(device: str = "cuda", **runtime: str) -> tuple[str, str]:
    return chosen_for({}, device, **runtime)


def chosen_for(
    changes: dict[str, Any], device: str = "cuda", **runtime: str
) -> tuple[str, str]:
    passes = {f"runtime.{name}": value for name, value in runtime.items()}
    return choose_passes(small_config({**changes, **passes}), torch.device(device))


def test_cuda_gets_the_ghost_engine_recorded() -> None:
    assert chosen() == ("ghost", "cuda_graph")
    assert chosen(parallel="fsdp") == ("ghost", "cuda_graph")
    assert chosen(execution="compile") == ("vmap", "compile")
    assert chosen(execution="eager") == ("ghost", "eager")
    assert chosen(engine="vmap") == ("vmap", "cuda_graph")


def test_a_cpu_gets_the_ghost_engine_eagerly() -> None:
    assert chosen("cpu") == ("ghost", "eager")
    assert chosen("cpu", execution="compile") == ("vmap", "compile")
    with pytest.raises(ConfigError, match=r"execution=cuda_graph: .*the run is on cpu"):
        chosen("cpu", execution="cuda_graph")


def test_secure_noise_gets_the_engine_that_sums_in_float64() -> None:
    assert chosen_for(SECURE) == ("vmap", "cuda_graph")
    with pytest.raises(ConfigError, match=r"runtime\.engine=ghost: .*secure noise"):
        chosen_for(SECURE, engine="ghost")


def test_the_ghost_engine_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.engine=ghost: .*torch\.compile"):
        chosen(engine="ghost", execution="compile")


def test_a_run_without_privacy_is_recorded_and_never_compiled() -> None:
    assert chosen_for(WITHOUT_PRIVACY)[1] == "cuda_graph"
    with pytest.raises(ConfigError, match=r"runtime\.execution=compile: .*records"):
        chosen_for(WITHOUT_PRIVACY, execution="compile")


def test_all_faults_of_passes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_for(SECURE, engine="ghost", execution="compile")

    first, second = str(caught.value).splitlines()
    assert first.endswith("take runtime.execution=auto or runtime.engine=vmap")
    assert second.endswith("take runtime.engine=auto or vmap")


def test_choose_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    rule = "this machine has 0 CUDA devices; take cpu or auto"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"runtime.device={name}: {rule}"):
            choose_device(name)
    for name in ("gpu", "meta", "mps", "cuda:x", "cpu:0", "cpu:1"):
        with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:N"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="this machine has 1 CUDA devices"):
        choose_device("cuda:1")
