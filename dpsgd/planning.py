"""What a run will do and guarantee, from its settings and public facts alone."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dpsgd.clipping import (
    Engine,
    Execution,
    MicrobatchMemory,
    clipping_slack,
    measure_microbatch,
)
from dpsgd.config import Config, DataConfig
from dpsgd.data import PublicFacts
from dpsgd.declared import declared_network
from dpsgd.errors import ConfigError, fault
from dpsgd.models import CLASSIFIER, MODELS, freeze, trainable_params
from dpsgd.optim import check_noise
from dpsgd.passes import choose_device, choose_passes
from dpsgd.privacy import (
    Accountant,
    DPSGDMechanism,
    EpsilonBound,
    build_accountant,
    calibrate_noise_multiplier,
    rounded_up,
)
from dpsgd.trees import num_elements
from dpsgd.weights import Initialization

__all__ = ["Plan", "build_mechanism", "make_plan", "outline"]

_MEMORY_SHARE = 0.6
_CPU_MICROBATCH_BYTES = 1 << 30
_FLOAT32_BYTES = 4
_VIEWS_PER_PASS = {"cpu": 256, "cuda": 2048}
_NO_GUARANTEE = [
    ("privacy", "NONE: nothing is clipped, no noise is added, nothing is guaranteed"),
    ("epsilon (upper bound)", "infinite: NO privacy guarantee"),
]
# Any will do for a mechanism without noise, whose epsilon is infinite at all of them.
_ANY_DELTA = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run, before it starts.

    Attributes:
        facts: Public facts of the data set.
        mechanism: What is guaranteed.
        accountant: Certifies epsilon.
        epsilon: Bounds on epsilon after all steps; the upper one is promised.
        num_parameters: Trainable scalars.
        num_frozen: Scalars that stay as they are.
        initialization: Weights that the network starts from; None draws all of them.
        memory: Bytes on the device, an upper bound.
        microbatch_size: Units, examples or users, a pass.
        device: Where.
        engine: How per-sample gradients are bounded, if they are.
        execution: How a pass runs.
    """

    facts: PublicFacts
    mechanism: DPSGDMechanism
    accountant: Accountant
    epsilon: EpsilonBound
    num_parameters: int
    num_frozen: int
    initialization: Initialization | None
    memory: MicrobatchMemory
    microbatch_size: int
    device: torch.device
    engine: Engine
    execution: Execution

    @property
    def title(self) -> str:
        """What the plan is of."""
        private = self.mechanism.noise_multiplier > 0
        return "Privacy plan" if private else "Plan: NO privacy guarantee"

    def rows(self, config: Config) -> list[tuple[str, str]]:
        """Returns what to show, as (name, value) in words."""
        units = f"{self.mechanism.unit}s"
        most = math.ceil(self.memory.total(self.microbatch_size) / 2**20)
        seeded = config.train.seed is not None
        private, cache = config.privacy.enabled, config.runtime.feature_cache
        return [
            (units, f"{self.facts.num_examples:,} (public, declared)"),
            *(self._sampling_rows(config) if private else self._shuffling_rows()),
            ("views an example", _views(config.data)),
            ("normalisation", _constants(config)),
            ("steps", f"{self.mechanism.num_steps:,}"),
            *(self._guarantee_rows(config) if private else _NO_GUARANTEE),
            ("network", f"{config.model.name}, {config.model.compute_dtype}"),
            *(self.initialization.rows() if self.initialization else []),
            ("parameters", self._parameters(config)),
            *([("features", f"kept in {cache}")] if cache else []),
            (
                "microbatch",
                f"{self.microbatch_size} {units}, up to {most:,} MiB on {self.device}",
            ),
            ("random streams", _streams(seeded=seeded, private=private)),
        ]

    def _sampling_rows(self, config: Config) -> list[tuple[str, str]]:
        """Returns how a private run draws."""
        mechanism = self.mechanism
        most = f"at most {config.privacy.max_examples_per_user}"
        return [
            ("sample rate", f"{mechanism.sample_rate:.6g} (Poisson)"),
            (
                "expected batch",
                f"{mechanism.expected_batch_size:,g} {mechanism.unit}s",
            ),
            *([("examples a user", most)] if mechanism.unit == "user" else []),
        ]

    def _shuffling_rows(self) -> list[tuple[str, str]]:
        """Returns how a run without privacy draws."""
        size = self.mechanism.expected_batch_size
        epochs = self.mechanism.num_steps * size / self.facts.num_examples
        return [
            ("batch", f"{size:,g} examples, shuffled every epoch"),
            ("epochs", f"{epochs:,.1f}"),
        ]

    def _guarantee_rows(self, config: Config) -> list[tuple[str, str]]:
        """Returns what a private run guarantees, and by what means."""
        mechanism = self.mechanism
        return [
            ("noise multiplier", f"{mechanism.noise_multiplier:.7g}"),
            ("noise", config.privacy.noise),
            ("clipping norm", f"{mechanism.clipping_norm:g}"),
            ("epsilon (upper bound)", _epsilon(self.epsilon.upper)),
            ("delta", f"{mechanism.delta:g}"),
            ("accountant", config.privacy.accountant),
            ("neighbours", f"{mechanism.adjacency} {mechanism.unit}"),
        ]

    def to_dict(self, config: Config) -> dict[str, Any]:
        """Returns what plan.json keeps of it: public facts as plain values."""
        start = self.initialization
        claim: dict[str, Any] = {
            **self.mechanism.to_dict(),
            "adjacency": self.mechanism.adjacency,
            "accountant": config.privacy.accountant,
            "noise": config.privacy.noise,
            "epsilon": self.epsilon.upper,
        }
        if not config.privacy.enabled:
            kept = ("num_steps", "expected_batch_size")
            claim = {key: claim[key] if key in kept else None for key in claim}
        return {
            **claim,
            "private": self.mechanism.noise_multiplier > 0,
            "seeded": config.train.seed is not None,
            f"num_{self.mechanism.unit}s": self.facts.num_examples,
            "num_classes": self.facts.num_classes,
            "network": MODELS[config.model.name].title(config.model),
            "num_parameters": self.num_parameters,
            "num_frozen": self.num_frozen,
            "initialization": start.to_dict() if start is not None else None,
            "microbatch_size": self.microbatch_size,
            "device": str(self.device),
        }

    def _parameters(self, config: Config) -> str:
        """Returns how many parameters are trained, and which."""
        if not self.num_frozen:
            return f"{self.num_parameters:,}"
        trained = f"{self.num_parameters:,} trained ({config.finetune.train})"
        return f"{trained}, {self.num_frozen:,} frozen"


def build_mechanism(
    config: Config, num_examples: int, accountant: Accountant
) -> DPSGDMechanism:
    """Builds the one mechanism of a run, calibrating the noise if a target is set.

    Without privacy it has no noise, so that no account can call the run private, even
    if its reader forgets to ask.

    Args:
        config: Settings.
        num_examples: Public size N of the training set, in units.
        accountant: Certifies that the target is kept.

    Raises:
        ConfigError: The batch exceeds N, delta is not below 1/N, or no noise reaches
            the target; one line for each.
    """
    privacy = config.privacy
    units = f"{privacy.unit}s"
    delta = _ANY_DELTA if privacy.delta is None else privacy.delta
    faults = []
    if privacy.enabled and delta >= 1 / num_examples:
        rule = f"must be below 1/num_{units} ({1 / num_examples:.1e})"
        faults.append(fault("privacy.delta", delta, rule, "lower delta"))
    if privacy.expected_batch_size > num_examples:
        rule = f"the sample rate would pass 1: must be at most {num_examples} {units}"
        value = privacy.expected_batch_size
        faults.append(fault("privacy.expected_batch_size", value, rule, "lower it"))
    if faults:
        raise ConfigError("\n".join(faults))
    sample_rate = privacy.expected_batch_size / num_examples
    noise_multiplier = privacy.noise_multiplier if privacy.enabled else 0.0
    if noise_multiplier is None:
        assert privacy.target_epsilon is not None  # the loader sees to one of the two
        noise_multiplier = calibrate_noise_multiplier(
            target_epsilon=privacy.target_epsilon,
            sample_rate=sample_rate,
            num_steps=config.train.num_steps,
            delta=delta,
            accountant=accountant,
        )
    return DPSGDMechanism(
        sample_rate=sample_rate,
        num_steps=config.train.num_steps,
        noise_multiplier=noise_multiplier,
        clipping_norm=privacy.clipping_norm,
        expected_batch_size=privacy.expected_batch_size,
        delta=delta,
        rescale_to_unit_norm=privacy.rescale_to_unit_norm,
        unit=privacy.unit,
    )


def make_plan(
    config: Config,
    facts: PublicFacts,
    *,
    mechanism: DPSGDMechanism | None = None,
    initialization: Initialization | None = None,
    num_ranks: int = 1,
) -> Plan:
    """Says what a run will do.

    Args:
        config: Settings.
        facts: Public facts of the data set.
        mechanism: That of a checkpoint; None builds it from the settings.
        initialization: Weights that the network starts from, if there are any.
        num_ranks: Processes that share every draw: a matter of memory and speed only.

    Raises:
        ConfigError: Settings and facts do not fit together.
    """
    device = choose_device(config.runtime.device)
    engine, execution = choose_passes(config, device)
    model = outline(config, facts)
    memory = _memory(config, facts, model, device, engine)
    microbatch_size = _choose_microbatch_size(config, memory, device, num_ranks)
    trained = trainable_params(model)
    accountant = build_accountant(config.privacy.accountant)
    if mechanism is None:
        mechanism = build_mechanism(config, facts.num_examples, accountant)
    is_secure = config.privacy.noise == "secure"
    slack = clipping_slack(trained, mechanism.clipping_norm) if is_secure else None
    num_parameters = num_elements(trained)
    check_noise(mechanism, num_parameters=num_parameters, clipping_slack=slack)
    return Plan(
        facts=facts,
        mechanism=mechanism,
        accountant=accountant,
        epsilon=accountant.epsilon([mechanism.phase()], mechanism.delta),
        num_parameters=num_parameters,
        num_frozen=num_elements(dict(model.named_parameters())) - num_parameters,
        initialization=initialization,
        memory=memory,
        microbatch_size=microbatch_size,
        device=device,
        engine=engine,
        execution=execution,
    )


def outline(config: Config, facts: PublicFacts) -> nn.Module:
    """Returns the network without values, frozen as it will be.

    Raises:
        ConfigError: The architecture or the choice of parameters is refused.
    """
    with torch.device("meta"):
        model = declared_network(config, facts)
    freeze(model, config.finetune.train)
    return model


def _memory(
    config: Config,
    facts: PublicFacts,
    model: nn.Module,
    device: torch.device,
    engine: Engine,
) -> MicrobatchMemory:
    """Returns what a microbatch takes, of images or of their cached features."""
    shape: tuple[int, ...] = facts.image_shape
    storing, held = engine if config.privacy.enabled else None, 0
    if config.runtime.feature_cache is not None:
        model = model.get_submodule(CLASSIFIER)
        shape = model.get_parameter("weight").shape[1:]
        num_features = config.data.augmentation_multiplicity * math.prod(shape)
        held = _FLOAT32_BYTES * facts.num_examples * num_features
        if engine == "ghost":  # which stores no gradients of a linear layer
            storing = None
    memory = measure_microbatch(
        model,
        image_shape=shape,
        num_views=config.views_per_unit,
        engine=storing,
        device=device.type,
    )
    return replace(memory, fixed=memory.fixed + held)


def _choose_microbatch_size(
    config: Config, memory: MicrobatchMemory, device: torch.device, num_ranks: int
) -> int:
    """Returns the configured size if it fits, or a good one for `auto`."""
    available = _memory_of(device)
    wanted = config.runtime.microbatch_size
    if wanted != "auto":
        if memory.total(wanted) <= available:
            return wanted
        largest = memory.largest_fitting(available)
        needed = memory.total(wanted) / 2**30
        rule = f"needs about {needed:,.1f} GiB, {device} has {available / 2**30:,.1f}"
        remedy = f"the largest that fits is about {largest}"
        raise ConfigError(fault("runtime.microbatch_size", wanted, rule, remedy))
    share = int(_MEMORY_SHARE * available)
    if device.type == "cpu":
        share = min(share, memory.fixed + _CPU_MICROBATCH_BYTES)
    expected = math.ceil(config.privacy.expected_batch_size / num_ranks)
    most = min(memory.largest_fitting(share), expected)
    if config.runtime.feature_cache is None:
        most = min(most, _VIEWS_PER_PASS[device.type] // config.views_per_unit)
    return 1 << max(0, most.bit_length() - 1)  # a power of two, at least 1


def _memory_of(device: torch.device) -> int:
    """Returns the bytes that a run may take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _epsilon(value: float) -> str:
    """Returns a bound on epsilon in words."""
    return rounded_up(value) if value < math.inf else "infinite: NO privacy guarantee"


def _streams(*, seeded: bool, private: bool) -> str:
    """Returns where randomness comes from, and what follows."""
    if not seeded:
        return "from the operating system"
    return "from a seed: repeatable" + ", NOT to be released as private" * private


def _views(data: DataConfig) -> str:
    """Returns how many views there are, and of which kind, in words."""
    mixed = f", {data.mixed_views} of them mixed" if data.mixed_views else ""
    fixed = ", the same in every step" if data.fixed_views else ""
    return f"{data.augmentation_multiplicity} ({data.augmentation}){mixed}{fixed}"


def _constants(config: Config) -> str:
    """Returns the public constants that pixels are normalised with."""
    mean = ", ".join(f"{value:.4g}" for value in config.data.mean)
    std = ", ".join(f"{value:.4g}" for value in config.data.std)
    return f"mean {mean}; std {std} (public constants)"
