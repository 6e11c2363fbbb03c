"""How the passes of a run are taken: device, engine and execution of its settings."""

import torch

from dpsgd.clipping import Engine, Execution
from dpsgd.config import Config
from dpsgd.errors import ConfigError, fault

__all__ = ["choose_device", "choose_passes"]


def choose_device(name: str) -> torch.device:
    """Returns the device that `runtime.device` means.

    Raises:
        ConfigError: CUDA is asked for and absent, or the name is not one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    # torch takes cpu:N, but there is one CPU, and no device to make the current one.
    if name != "cpu" and device.type != "cuda":
        rule = "must be auto, cpu, cuda or cuda:N"
        raise ConfigError(fault("runtime.device", name, rule, "take one of them"))
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        rule = f"this machine has {count} CUDA devices"
        raise ConfigError(fault("runtime.device", name, rule, "take cpu or auto"))
    return device


def choose_passes(config: Config, device: torch.device) -> tuple[Engine, Execution]:
    """Returns what takes the passes and how they run, and what `auto` means for both.

    Args:
        config: Settings.
        device: Where passes run.

    Returns:
        How per-sample gradients are bounded, which a run without privacy does not do,
        and how a pass is executed.

    Raises:
        ConfigError: The ghost engine is asked for with torch.compile or for secure
            noise, torch.compile without privacy, or a CUDA graph without CUDA; one
            line for each.
    """
    runtime = config.runtime
    is_compiled = runtime.execution == "compile"
    is_secure = config.privacy.noise == "secure"
    faults = _engine_faults(config) + _execution_faults(config, device)
    if faults:
        raise ConfigError("\n".join(faults))
    engine: Engine = "vmap" if is_compiled or is_secure else "ghost"
    execution: Execution = "cuda_graph" if device.type == "cuda" else "eager"
    return (
        engine if runtime.engine == "auto" else runtime.engine,
        execution if runtime.execution == "auto" else runtime.execution,
    )


def _engine_faults(config: Config) -> list[str]:
    """Returns what the ghost engine does not do, if it is asked to."""
    if config.runtime.engine != "ghost":
        return []
    faults = []
    if config.runtime.execution == "compile":
        rule = "records layers, which torch.compile cannot follow"
        remedy = "take runtime.execution=auto or runtime.engine=vmap"
        faults.append(fault("runtime.engine", "ghost", rule, remedy))
    if config.privacy.noise == "secure":
        rule = "sums in float32, which secure noise does not take"
        remedy = "take runtime.engine=auto or vmap"
        faults.append(fault("runtime.engine", "ghost", rule, remedy))
    return faults


def _execution_faults(config: Config, device: torch.device) -> list[str]:
    """Returns why passes cannot run as they are asked to."""
    execution = config.runtime.execution
    faults = []
    if execution == "compile" and not config.privacy.enabled:
        rule = "a run without privacy records its passes or takes them eagerly"
        faults.append(fault("runtime.execution", execution, rule, "take auto"))
    if execution == "cuda_graph" and device.type != "cuda":
        rule = f"needs a CUDA device, and the run is on {device}"
        faults.append(fault("runtime.execution", execution, rule, "take auto"))
    return faults
