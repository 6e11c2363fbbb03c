"""Noise, SGD and parameter average in one pass over all parameters, in one launch.

The leaves of a network are many and mostly small, so a launch for each costs more than
the work. One launch walks over all of them by a table of their addresses.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dpsgd.kernels.dispatch import runs_on_triton
from dpsgd.kernels.gaussian_noise import add_gaussian_noise_reference_, signed

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = ["SGDStep", "noisy_sgd_", "noisy_sgd_reference_", "noisy_sgd_triton_"]

_DRAWS = 4
_QUADS_PER_PROGRAM = 256
_NEVER = 1 << 62  # first program of the leaves that fill up the table


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SGDStep:
    """The numbers of one step.

    Args:
        noise_std: Standard deviation of the noise on the sum, >= 0.
        noise_key: Secret Philox key in [0, 2**64), used for this step alone.
        divisor: Of the noisy sum, > 0: the public expected batch size.
        learning_rate: Step size.
        momentum: Decay of the momenta, in [0, 1).
        weight_decay: Multiple of the parameters that is added to the gradient, >= 0.
        ema_weight: Weight of the new parameters in their average, in [0, 1].
    """

    noise_std: float
    noise_key: int = dataclasses.field(repr=False)
    divisor: float
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    ema_weight: float = 0.0


def noisy_sgd_(
    params: Sequence[Tensor],
    clipped_sums: Sequence[Tensor],
    *,
    step: SGDStep,
    momenta: Sequence[Tensor] | None = None,
    averages: Sequence[Tensor] | None = None,
    offsets: Sequence[int] | None = None,
) -> None:
    r"""Makes sums private and steps parameters along them, all in place.

    Of a sum s, parameters w, momenta m and averages a of them:

    * "Add noise": $s \leftarrow (s + \mathcal N(0, \sigma^2)) / B$;
    * "Descent": $m \leftarrow \mu m + s + \lambda w$ and $w \leftarrow w - \eta m$, or
      without momenta $w \leftarrow w - \eta (s + \lambda w)$, the rule of
      torch.optim.SGD;
    * average: $a \leftarrow a + \omega (w - a)$.

    Guarantees:
        The noise is that of `add_gaussian_noise_`, where `leaf` is the place in the
        lists. The sums are overwritten, so that no copy without noise outlives the
        step.

    Args:
        params: Float32 leaves, contiguous.
        clipped_sums: Their sums over one draw, alike.
        step: Noise, divisor and rates.
        momenta: One a leaf, alike, 0 before the first step; None without momentum.
        averages: One a leaf, alike; None keeps no average.
        offsets: For each leaf the elements of the whole tensor that lie before this
            part of it; None if the leaves are whole.

    Raises:
        ValueError: A tensor is not contiguous float32 or not like its parameters, the
            lists differ in length, or there is momentum without momenta.

    Source: Abadi et al. 2016, Algorithm 1, "Add noise", "Descent" (arXiv:1607.00133).
    """
    if offsets is None:
        offsets = [0] * len(params)
    kept = [leaves for leaves in (momenta, averages) if leaves is not None]
    if any(len(one) != len(params) for one in (clipped_sums, offsets, *kept)):
        raise ValueError(
            f"params=<{len(params)} leaves>: sums, momenta, averages and offsets must "
            "have one entry a leaf; pair them by name"
        )
    for alike in zip(params, clipped_sums, *kept, strict=True):
        _check_alike(alike, params[0].device)
    if step.momentum and momenta is None:
        raise ValueError(f"momentum={step.momentum}: needs momenta; give one a leaf")
    on_triton = len(params) > 0 and runs_on_triton(params[0])
    run = noisy_sgd_triton_ if on_triton else noisy_sgd_reference_
    run(
        params,
        clipped_sums,
        step=step,
        momenta=momenta,
        averages=averages,
        offsets=offsets,
    )


def _check_alike(leaves: tuple[Tensor, ...], device: torch.device) -> None:
    """Raises unless all are contiguous float32 of one shape on the device."""
    for leaf in leaves:
        if leaf.dtype != torch.float32 or not leaf.is_contiguous():
            raise ValueError(
                f"leaf={leaf.dtype}: noise is added to contiguous float32 sums, and "
                "parameters are stepped in that form; convert the leaf"
            )
        if leaf.shape != leaves[0].shape or leaf.device != device:
            raise ValueError(
                f"leaf=<{tuple(leaf.shape)} on {leaf.device}>: must have its "
                f"parameters' shape, {tuple(leaves[0].shape)}, and be on {device}; "
                "pair the lists by name"
            )


def noisy_sgd_reference_(
    params: Sequence[Tensor],
    clipped_sums: Sequence[Tensor],
    *,
    step: SGDStep,
    momenta: Sequence[Tensor] | None,
    averages: Sequence[Tensor] | None,
    offsets: Sequence[int],
) -> None:
    """Does what `noisy_sgd_` does, in PyTorch."""
    for leaf, (param, total) in enumerate(zip(params, clipped_sums, strict=True)):
        # "Add noise", and divide by the expected batch size
        add_gaussian_noise_reference_(
            total,
            std=step.noise_std,
            key=step.noise_key,
            leaf=leaf,
            offset=offsets[leaf],
        )
        grad = total.div_(step.divisor)
        # "Descent"
        if step.weight_decay:
            grad = grad.add(param, alpha=step.weight_decay)
        if momenta is not None:
            grad = momenta[leaf].mul_(step.momentum).add_(grad)
        param.add_(grad, alpha=-step.learning_rate)
        if averages is not None:
            averages[leaf].lerp_(param, step.ema_weight)


def noisy_sgd_triton_(
    params: Sequence[Tensor],
    clipped_sums: Sequence[Tensor],
    *,
    step: SGDStep,
    momenta: Sequence[Tensor] | None,
    averages: Sequence[Tensor] | None,
    offsets: Sequence[int],
) -> None:
    """Does what `noisy_sgd_` does, in one Triton launch."""
    groups = (params, clipped_sums, momenta or params, averages or params)
    columns, num_programs = _table(groups, offsets)
    if num_programs == 0:
        return
    device = params[0].device
    pinned = torch.tensor(columns, pin_memory=device.type == "cuda")
    _noisy_sgd_kernel[(num_programs,)](
        pinned.to(device, non_blocking=True),
        step.noise_std,
        signed(step.noise_key),
        step.divisor,
        step.learning_rate,
        step.momentum,
        step.weight_decay,
        step.ema_weight,
        LEAVES=len(columns[0]),
        QUADS=_QUADS_PER_PROGRAM,
        HAS_MOMENTA=momenta is not None,
        HAS_AVERAGES=averages is not None,
    )


def _table(
    groups: Sequence[Sequence[Tensor]], offsets: Sequence[int]
) -> tuple[list[list[int]], int]:
    """Returns what the kernel knows of each leaf, in columns, and how many programs.

    The columns are first program, elements, offset, and an address for each group.
    They are filled up to a power of two of leaves, which no program belongs to.
    """
    rows, num_programs = [], 0
    for leaves, offset in zip(zip(*groups, strict=True), offsets, strict=True):
        num_elements = leaves[0].numel()
        addresses = [leaf.data_ptr() for leaf in leaves]
        rows.append([num_programs, num_elements, offset, *addresses])
        covered = num_elements + offset % _DRAWS
        num_programs += triton.cdiv(covered, _DRAWS * _QUADS_PER_PROGRAM)
    missing = triton.next_power_of_2(len(rows)) - len(rows)
    rows += [[_NEVER, 0, 0, *(0 for _ in groups)]] * missing
    return [list(column) for column in zip(*rows, strict=True)], num_programs


if triton is not None:
    from dpsgd.kernels.gaussian_noise import standard_normals

    @triton.jit(do_not_specialize=["key"])
    def _noisy_sgd_kernel(
        table,
        std,
        key,
        divisor,
        learning_rate,
        momentum,
        weight_decay,
        ema_weight,
        LEAVES: tl.constexpr,
        QUADS: tl.constexpr,
        HAS_MOMENTA: tl.constexpr,
        HAS_AVERAGES: tl.constexpr,
    ):
        """One program steps up to 4 * QUADS elements of one leaf."""
        program = tl.program_id(0).to(tl.int64)
        first_programs = tl.load(table + tl.arange(0, LEAVES))
        leaf = tl.sum((first_programs <= program).to(tl.int32)) - 1
        about = table + leaf
        block = program - tl.load(about)
        num_elements = tl.load(about + LEAVES)
        offset = tl.load(about + 2 * LEAVES)
        element = block * QUADS * 4 - offset % 4 + tl.arange(0, 4 * QUADS)
        inside = (element >= 0) & (element < num_elements)
        # "Add noise", and divide by the expected batch size
        total = tl.load(about + 4 * LEAVES).to(tl.pointer_type(tl.float32)) + element
        normals = standard_normals(offset // 4 + block * QUADS, leaf, key, QUADS)
        noisy = tl.load(total, mask=inside, other=0.0) + normals * std
        grad = tl.div_rn(noisy, divisor)
        tl.store(total, grad, mask=inside)
        # "Descent"
        param = tl.load(about + 3 * LEAVES).to(tl.pointer_type(tl.float32)) + element
        value = tl.load(param, mask=inside, other=0.0)
        grad += weight_decay * value
        if HAS_MOMENTA:
            place = tl.load(about + 5 * LEAVES).to(tl.pointer_type(tl.float32))
            grad += momentum * tl.load(place + element, mask=inside, other=0.0)
            tl.store(place + element, grad, mask=inside)
        value -= learning_rate * grad
        tl.store(param, value, mask=inside)
        if HAS_AVERAGES:
            place = tl.load(about + 6 * LEAVES).to(tl.pointer_type(tl.float32))
            average = tl.load(place + element, mask=inside, other=0.0)
            average += ema_weight * (value - average)
            tl.store(place + element, average, mask=inside)
