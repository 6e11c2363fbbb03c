"""Adds clipped per-sample gradients to a running sum in one pass over them.

The norms are the other pass: two reads of the per-sample gradients in all.
"""

from torch import Tensor

from dpsgd.kernels.dispatch import runs_on_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = ["clip_accumulate_", "clip_accumulate_reference_", "clip_accumulate_triton_"]

# Rows by columns that a program holds: many loads are under way at a time, and a row of
# bfloat16 is a whole cache line.
_ROWS, _COLUMNS = 128, 64


def clip_accumulate_(
    total: Tensor, per_sample_grads: Tensor, clip_factors: Tensor
) -> None:
    """Adds `sum_m clip_factors[m] * per_sample_grads[m]` to `total` in place.

    Guarantees:
        A row whose factor is 0 is left out, not multiplied: inf and NaN in it cannot
        reach the sum. The sum is formed in the type of `total`: in float64, products
        are exact, and n terms are off by at most n * 2**-53 of their absolute values.

    Args:
        total: (...) float32 or float64 running sum, contiguous.
        per_sample_grads: (M, ...) gradients, contiguous.
        clip_factors: (M,) float32, >= 0 and finite.
    """
    assert total.is_contiguous()
    assert per_sample_grads.is_contiguous()
    if runs_on_triton(per_sample_grads):
        clip_accumulate_triton_(total, per_sample_grads, clip_factors)
    else:
        clip_accumulate_reference_(total, per_sample_grads, clip_factors)


def clip_accumulate_reference_(
    total: Tensor, per_sample_grads: Tensor, clip_factors: Tensor
) -> None:
    """Does what `clip_accumulate_` does, in PyTorch."""
    kept = clip_factors > 0
    if not kept.all():  # a copy only where a row is padding or not finite
        per_sample_grads, clip_factors = per_sample_grads[kept], clip_factors[kept]
    rows = per_sample_grads.unsqueeze(1).flatten(1)  # (M, P), also of scalars
    total.view(-1).addmv_(rows.to(total.dtype).T, clip_factors.to(total.dtype))


def clip_accumulate_triton_(
    total: Tensor, per_sample_grads: Tensor, clip_factors: Tensor
) -> None:
    """Does what `clip_accumulate_` does, in one Triton launch."""
    rows, columns = per_sample_grads.shape[0], total.numel()
    if rows == 0 or columns == 0:
        return
    grid = (triton.cdiv(columns, _COLUMNS),)
    _clip_accumulate_kernel[grid](
        total,
        per_sample_grads,
        clip_factors,
        rows,
        columns,
        ROWS=_ROWS,
        COLS=_COLUMNS,
        num_warps=4,
    )


if triton is not None:

    @triton.jit
    def _clip_accumulate_kernel(
        total,
        grads,
        factors,
        num_rows,
        num_columns,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        """One program sums all rows of COLS columns; nothing else writes them."""
        column = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
        inside = column < num_columns
        dtype = total.dtype.element_ty
        partial_sum = tl.zeros((COLS,), dtype)
        for start in range(0, num_rows, ROWS):
            row = start + tl.arange(0, ROWS)
            factor = tl.load(factors + row, mask=row < num_rows, other=0.0).to(dtype)
            mask = (row < num_rows)[:, None] & inside[None, :]
            offset = row.to(tl.int64)[:, None] * num_columns + column[None, :]
            grad = tl.load(grads + offset, mask=mask, other=0.0).to(dtype)
            # Chosen, not multiplied: inf and NaN stay where they are. A masked load
            # would do as well, but waits for the factor.
            grad = tl.where((factor > 0)[:, None], grad, 0.0)
            partial_sum += tl.sum(grad * factor[:, None], axis=0)
        before = tl.load(total + column, mask=inside, other=0.0)
        tl.store(total + column, before + partial_sum, mask=inside)
