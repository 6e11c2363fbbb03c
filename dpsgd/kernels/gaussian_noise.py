"""Adds Gaussian noise from a counter-based stream: every element has its own draw.

Philox4x32-10 turns (key, element, leaf) into four 32-bit words, Box-Muller turns them
into four normals. A draw depends on its counter alone, so the noise is the same on
every device, for every split of a tensor, and after a restart. The 32-bit uniforms
bound a draw at 6.77 standard deviations (probability of more: 1.3e-11).

Philox is not cryptographic, and float32 sums leak their low bits: this noise does not
claim to withstand floating-point attacks (Mironov 2012).

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and
Muller 1958.
"""

import math

import torch
from torch import Tensor

from dpsgd.kernels.dispatch import runs_on_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
    "add_gaussian_noise_",
    "add_gaussian_noise_reference_",
    "add_gaussian_noise_triton_",
    "philox_4x32",
]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_UNIFORM_SCALE = 2.0**-32
_UNIFORM_SHIFT = 2.0**-33
_TWO_PI = 2 * math.pi
_DRAWS = 4
_QUADS_PER_CHUNK = 1 << 16  # the reference's temporaries stay in cache
_QUADS_PER_PROGRAM = 256


def add_gaussian_noise_(
    total: Tensor, *, std: float, key: int, leaf: int, offset: int = 0
) -> None:
    """Adds independent N(0, std^2) noise to every element, in place.

    Guarantees:
        The same (key, leaf) gives the same noise on every device, to float32
        rounding of log, sin and cos; different keys or leaves give unrelated noise.
        A part of a tensor gets the noise of its place in the whole.

    Args:
        total: (...) float32 tensor, contiguous, of fewer than 2**34 elements.
        std: Standard deviation, >= 0, in units of `total`.
        key: Secret Philox key in [0, 2**64), used for one step and no other data.
        leaf: Which tensor of the step this is, in [0, 2**32).
        offset: Elements of the whole tensor that lie before this part of it, >= 0.

    Raises:
        ValueError: `total` is not contiguous float32.
    """
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f"total={total.dtype}: noise is added to contiguous float32 sums; "
            "convert the sum first"
        )
    on_triton = runs_on_triton(total)
    run = add_gaussian_noise_triton_ if on_triton else add_gaussian_noise_reference_
    run(total, std=std, key=key, leaf=leaf, offset=offset)


def add_gaussian_noise_reference_(
    total: Tensor, *, std: float, key: int, leaf: int, offset: int = 0
) -> None:
    """Does what `add_gaussian_noise_` does, in PyTorch."""
    flat = total.view(-1)
    skipped = offset % _DRAWS  # of the first quad, draws of elements before this part
    for start in range(-skipped, flat.numel(), _DRAWS * _QUADS_PER_CHUNK):
        stop = min(start + _DRAWS * _QUADS_PER_CHUNK, flat.numel())
        first = (offset + start) // _DRAWS
        num_quads = math.ceil((stop - start) / _DRAWS)
        quad = torch.arange(first, first + num_quads, device=total.device)
        normals = _box_muller(philox_4x32(quad, leaf=leaf, key=key)).flatten()
        chunk = flat[max(start, 0) : stop]
        chunk.add_(normals[max(-start, 0) : stop - start], alpha=std)


def philox_4x32(quad: Tensor, *, leaf: int, key: int) -> list[Tensor]:
    """Returns the four output words of Philox4x32-10 at counter (quad, leaf, 0).

    Args:
        quad: (Q,) int64, the low 64 bits of the counter.
        leaf: The third word of the counter, in [0, 2**32).
        key: Key in [0, 2**64).

    Returns:
        Four (Q,) int64 tensors of values in [0, 2**32).
    """
    words = [
        quad & _WORD,
        (quad >> 32) & _WORD,
        torch.full_like(quad, leaf),
        torch.zeros_like(quad),
    ]
    keys = [key & _WORD, (key >> 32) & _WORD]
    for _ in range(_ROUNDS):
        # int64 products wrap, and keep the bits that unsigned ones have.
        products = [words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]]
        words = [
            ((products[1] >> 32) & _WORD) ^ words[1] ^ keys[0],
            products[1] & _WORD,
            ((products[0] >> 32) & _WORD) ^ words[3] ^ keys[1],
            products[0] & _WORD,
        ]
        keys = [(k + step) & _WORD for k, step in zip(keys, _KEY_STEPS, strict=True)]
    return words


def _box_muller(words: list[Tensor]) -> Tensor:
    """Returns (Q, 4) float32 standard normals from four (Q,) words of 32 bits."""
    first, second, third, fourth = (
        word.to(torch.float32) * _UNIFORM_SCALE + _UNIFORM_SHIFT for word in words
    )
    normals = []
    for radius, angle in ((first, second), (third, fourth)):
        length = torch.sqrt(-2.0 * torch.log(radius))
        normals += [length * torch.cos(_TWO_PI * angle)]
        normals += [length * torch.sin(_TWO_PI * angle)]
    return torch.stack(normals, dim=1)  # (Q, 4)


def add_gaussian_noise_triton_(
    total: Tensor, *, std: float, key: int, leaf: int, offset: int = 0
) -> None:
    """Does what `add_gaussian_noise_` does, in one Triton launch."""
    num_elements = total.numel()
    if num_elements == 0:
        return
    first_quad, skipped = divmod(offset, _DRAWS)
    grid = (triton.cdiv(num_elements + skipped, _DRAWS * _QUADS_PER_PROGRAM),)
    _gaussian_noise_kernel[grid](
        total,
        num_elements,
        std,
        signed(key),
        leaf,
        first_quad,
        skipped,
        QUADS=_QUADS_PER_PROGRAM,
    )


def signed(key: int) -> int:
    """Returns the number in [-2**63, 2**63) with the 64 bits of a key."""
    return key - (1 << 64) if key >= 1 << 63 else key


if triton is not None:
    # Key, leaf and place are data: one compiled kernel serves all their values.
    @triton.jit(do_not_specialize=["key", "leaf", "first_quad"])
    def _gaussian_noise_kernel(
        total,
        num_elements,
        std,
        key,
        leaf,
        first_quad,
        skipped,
        QUADS: tl.constexpr,
    ):
        """One program adds noise to 4 * QUADS elements."""
        block = tl.program_id(0).to(tl.int64)
        normals = standard_normals(first_quad + block * QUADS, leaf, key, QUADS)
        element = block * QUADS * 4 - skipped + tl.arange(0, 4 * QUADS)
        inside = (element >= 0) & (element < num_elements)
        before = tl.load(total + element, mask=inside, other=0.0)
        tl.store(total + element, before + normals * std, mask=inside)

    @triton.jit
    def standard_normals(first_quad, leaf, key, QUADS: tl.constexpr):
        """Returns the normals of the 4 * QUADS elements from 4 * first_quad."""
        quad = first_quad.to(tl.int64) + tl.arange(0, QUADS)
        low = (quad & 0xFFFFFFFF).to(tl.uint32)
        high = (quad >> 32).to(tl.uint32)
        third = low * 0 + leaf.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(key.to(tl.int64), low, high, third, low * 0)
        cosine0, sine0 = _box_muller_pair(w0, w1)
        cosine1, sine1 = _box_muller_pair(w2, w3)
        return tl.interleave(
            tl.interleave(cosine0, cosine1), tl.interleave(sine0, sine1)
        )

    @triton.jit
    def _box_muller_pair(first, second):
        """Returns two standard normals for each pair of words of 32 bits."""
        radius = first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        angle = second.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        length = tl.sqrt(-2.0 * tl.log(radius))
        angle = angle * 6.283185307179586
        return length * tl.cos(angle), length * tl.sin(angle)
