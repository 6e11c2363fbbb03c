"""Settings of the machine and of the report: they change nothing that is learned."""

from dataclasses import dataclass
from typing import Literal

from dpsgd.config.rules import NonNegativeInt, PositiveInt

__all__ = ["ReportConfig", "RuntimeConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how fast: nothing here changes what is learned beyond rounding."""

    device: str = "auto"
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`."""

    parallel: Literal["none", "ddp", "fsdp"] = "none"
    """How processes that torchrun started train one network: `ddp` keeps it whole on
    each, `fsdp` keeps parameters, momenta and average in shards. At set-up a device
    holds the network twice, and in a step whole parameters and a whole sum; on a GPU,
    whose passes are recorded, one whole float32 copy of the parameters stays."""

    microbatch_size: PositiveInt | Literal["auto"] = "auto"
    """Examples or users a pass: memory only; the update never depends on it."""

    engine: Literal["auto", "vmap", "ghost"] = "auto"
    """How gradients of examples are bounded: `vmap` holds those of a pass, `ghost`
    takes norms layer by layer and stores what is cheap to store. `auto` is `ghost`,
    unless passes are compiled or noise is secure."""

    execution: Literal["auto", "eager", "compile", "cuda_graph"] = "auto"
    """How the gradient pass runs: operator by operator, compiled with torch.compile, or
    recorded once and replayed. `auto` replays on CUDA and is eager elsewhere."""

    decode_workers: NonNegativeInt | Literal["auto"] = "auto"
    """Processes that decode the images of a store; 0 decodes in the training process.
    `auto` is one a CPU core on Linux, and 0 elsewhere."""

    feature_cache: str | None = None
    """File that keeps the features of frozen layers, made if it is not there, for
    `finetune.train: classifier` and views that are the same in every step. It is as
    private as the training data."""

    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints; every evaluation is preceded by one as well."""

    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept, besides the best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What a run writes about itself."""

    unprotected_metrics: bool = False
    """Also record train loss, gradient norms, share of clipped examples and realised
    batch sizes. They are computed from private data without noise: the guarantee
    does not cover them."""
