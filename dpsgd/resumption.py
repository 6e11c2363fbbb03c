"""What must be so for a run to go on: nothing is assumed, everything is compared.

A step repeated with its old noise key but other arithmetic would release two sums whose
difference has no noise. So a resumed run keeps its noise key only where it repeats the
interrupted one bit for bit; elsewhere the noise gets a new key. Secure noise is new in
every piece of a run. A sum over two ranks is the same in either order; that one over
more is formed in the same order every time is nothing to rest a guarantee on.
"""

import dataclasses
import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from dpsgd.checkpoint import Checkpoint, differences
from dpsgd.config import (
    Config,
    config_to_dict,
    with_absolute_paths,
    with_later_settings,
)
from dpsgd.data import DataSplits
from dpsgd.errors import CheckpointError, fault
from dpsgd.planning import Plan, build_mechanism
from dpsgd.rng import RandomStreams

__all__ = [
    "arithmetic_of",
    "check_mechanism",
    "check_same_run",
    "constants_of",
    "continued_streams",
    "identity_of",
    "with_microbatch_size",
]

_FORMAT = 3
_MOST_REPEATABLE_RANKS = 2
# Where the data lie, how fast, how often and how closely we look may change between
# the pieces of a run; everything else decides what is learned or guaranteed.
_MAY_CHANGE = ("runtime", "eval", "report")
_DATA_MAY_CHANGE = ("root", "train", "test", "group_column")
# What sets one kind of processor apart, as /proc/cpuinfo calls it on x86 and on ARM.
_OF_PROCESSOR = frozenset(
    {"vendor_id", "cpu family", "model", "model name", "stepping", "flags"}
    | {"CPU implementer", "CPU variant", "CPU part", "CPU revision", "Features"}
)
_CHANGES_KERNELS = ("DNNL_", "MKL_", "ONEDNN_")  # how such variables begin
_REMEDY = "go on with what the run began with, or start a new one"


def identity_of(config: Config, splits: DataSplits) -> dict[str, Any]:
    """Returns what must be the same in every piece of a run."""
    settings = config_to_dict(with_absolute_paths(config))
    for section in _MAY_CHANGE:
        del settings[section]
    for key in _DATA_MAY_CHANGE:
        del settings["data"][key]
    fingerprints = {
        "train": splits.train.fingerprint(),
        "test": splits.test.fingerprint(),
    }
    return {"format": _FORMAT, "settings": settings, "data": fingerprints}


def check_same_run(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raises if a checkpoint is of other settings, data or format.

    Raises:
        CheckpointError: One line for each difference. Of data it names the set alone:
            a fingerprint would confirm a guessed example.
    """
    saved = checkpoint.facts
    lines = differences({"format": saved.get("format")}, {"format": _FORMAT})
    settings = _completed(saved.get("settings", {}), identity["settings"])
    lines += differences(settings, identity["settings"])
    for name, fingerprint in identity["data"].items():
        if saved.get("data", {}).get(name) != fingerprint:
            lines.append(f"data.{name}=...: holds other examples than the run's")
    if lines:
        raise CheckpointError("\n".join(f"{line}; {_REMEDY}" for line in lines))


def _completed(
    saved: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns settings of a checkpoint, with defaults for those that came later.

    A default trains as it was trained before there was the setting; where it did not,
    `_FORMAT` would tell.
    """
    sections = get_type_hints(Config)
    completed = {name: dict(values) for name, values in saved.items()}
    for name, values in present.items():
        section = completed.get(name, {})
        later = with_later_settings(section, sections[name])
        kept = {key: later[key] for key in later if key in section or key in values}
        completed[name] = kept
    return completed


def check_mechanism(config: Config, plan: Plan) -> None:
    """Raises if a checkpoint's mechanism is not the one that the settings ask for.

    Args:
        config: Settings.
        plan: Made with the checkpoint's mechanism.

    Raises:
        CheckpointError: A member differs, or the target is passed; calibrated noise
            may differ from today's as long as it keeps the target.
    """
    saved, privacy = plan.mechanism, config.privacy
    noise = privacy.noise_multiplier
    fixed = dataclasses.replace(
        privacy,
        target_epsilon=None,
        noise_multiplier=saved.noise_multiplier if noise is None else noise,
    )
    expected = build_mechanism(
        dataclasses.replace(config, privacy=fixed),
        plan.facts.num_examples,
        plan.accountant,
    )
    lines = [f"mechanism.{line}" for line in saved.differences(expected)]
    target = privacy.target_epsilon
    if target is not None and plan.epsilon.upper > target:
        rule = f"the checkpoint's noise spends {plan.epsilon.upper}"
        lines.append(f"privacy.target_epsilon={target}: {rule}")
    if lines:
        raise CheckpointError("\n".join(f"{line}; {_REMEDY}" for line in lines))


def arithmetic_of(
    plan: Plan,
    config: Config,
    *,
    features: str | None = None,
    decoder: str | None = None,
    num_ranks: int = 1,
) -> dict[str, Any]:
    """Returns what rounding and draws depend on: if equal, a CPU run is repeated.

    It is then, bit for bit; with a checkpoint that lacks a member, nothing is. Nor with
    secure noise, which is never the same twice, and on many ranks.

    Args:
        plan: The plan.
        config: Settings.
        features: Identity of the cached features that stand for views, if any do.
        decoder: What turns encoded images into pixels, if they are not held.
        num_ranks: Processes that sum.
    """
    # A GPU repeats nothing, so that its ranks may be on unlike machines.
    on_cpu = plan.device.type == "cpu"
    return {
        "noise": config.privacy.noise,
        "device": str(plan.device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor() if on_cpu else None,
        "environment": _environment() if on_cpu else None,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "code": _code(),
        "microbatch_size": plan.microbatch_size,
        "engine": config.runtime.engine,
        "execution": config.runtime.execution,
        "features": features,
        "decoder": decoder,
        "parallel": config.runtime.parallel,
        "num_ranks": num_ranks,
    }


@functools.cache
def _processor() -> str:
    """Returns the kind of the CPU, by which libraries choose their kernels."""
    unknown = f"{platform.machine()} {platform.processor()}"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return unknown
    first, _, _ = text.partition("\n\n")
    told = [line.partition(":") for line in first.splitlines()]
    named = {name.strip(): value.strip() for name, _, value in told}
    kind = [f"{name}: {named[name]}" for name in sorted(_OF_PROCESSOR & named.keys())]
    return "\n".join(kind) or unknown


def _environment() -> dict[str, str]:
    """Returns the variables that tell those libraries to choose otherwise."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_CHANGES_KERNELS)
    }


@functools.cache
def _code() -> str:
    """Returns the identity of this package's source, any of which may round."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def continued_streams(
    checkpoint: Checkpoint, *, arithmetic: Mapping[str, Any], shown_step: int
) -> RandomStreams:
    """Returns the streams with which a run goes on.

    Guarantees:
        No step that was shown is taken again, whatever the arithmetic: what was shown
        is forgotten once its steps are behind, so that another resume could not tell.
        The noise key is the checkpoint's only if the steps after it are repeated bit
        for bit. Otherwise the noise gets a new key, from the operating system, which
        is free because nothing of the steps that are taken again was shown.

    Args:
        checkpoint: Where the run goes on.
        arithmetic: What rounding depends on, now.
        shown_step: Last step whose evaluation was recorded.

    Raises:
        CheckpointError: Steps that were shown would be taken again, and so be paid
            for once but, with other noise, released twice.
    """
    step = checkpoint.facts["step"]
    if shown_step > step:
        rule = f"step {shown_step} was shown, the newest checkpoint is of step {step}"
        remedy = "restore the newer checkpoint, or start a new run"
        raise CheckpointError(fault("--resume", "...", rule, remedy))
    streams = RandomStreams.from_dict(checkpoint.facts["streams"])
    repeats = (
        arithmetic["device"] == "cpu"
        and arithmetic["noise"] == "standard"
        and arithmetic["num_ranks"] <= _MOST_REPEATABLE_RANKS
    )
    if repeats and checkpoint.facts["arithmetic"] == dict(arithmetic):
        return streams
    return streams.with_new_noise()


def constants_of(plan: Plan, streams: RandomStreams) -> dict[str, Any]:
    """Returns what every checkpoint of the run says of it."""
    return {
        "initialization": plan.initialization and plan.initialization.to_dict(),
        "mechanism": plan.mechanism.to_dict(),
        "streams": streams.to_dict(),
    }


def with_microbatch_size(config: Config, checkpoint: Checkpoint) -> Config:
    """Returns settings whose `auto` is what it was, so that rounding is the same."""
    if config.runtime.microbatch_size != "auto":
        return config
    saved = checkpoint.facts["arithmetic"]["microbatch_size"]
    runtime = dataclasses.replace(config.runtime, microbatch_size=saved)
    return dataclasses.replace(config, runtime=runtime)
