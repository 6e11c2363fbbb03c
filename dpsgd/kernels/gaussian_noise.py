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


def add_gaussian_noise_(total: Tensor, *, std: float, key: int, leaf: int) -> None:
    """Adds independent N(0, std^2) noise to every element, in place.

    Guarantees:
        The same (key, leaf) gives the same noise on every device, to float32
        rounding of log, sin and cos; different keys or leaves give unrelated noise.

    Args:
        total: (...) float32 tensor, contiguous, of fewer than 2**34 elements.
        std: Standard deviation, >= 0, in units of `total`.
        key: Secret Philox key in [0, 2**64), used for one step and no other data.
        leaf: Which tensor of the step this is, in [0, 2**32).

    Raises:
        ValueError: `total` is not contiguous float32.
    """
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f"total={total.dtype}: noise is added to contiguous float32 sums; "
            "convert the sum first"
        )
    if runs_on_triton(total):
        add_gaussian_noise_triton_(total, std=std, key=key, leaf=leaf)
    else:
        add_gaussian_noise_reference_(total, std=std, key=key, leaf=leaf)


def add_gaussian_noise_reference_(
    total: Tensor, *, std: float, key: int, leaf: int
) -> None:
    """Does what `add_gaussian_noise_` does, in PyTorch."""
    flat = total.view(-1)
    for start in range(0, flat.numel(), _DRAWS * _QUADS_PER_CHUNK):
        chunk = flat[start : start + _DRAWS * _QUADS_PER_CHUNK]
        num_quads = math.ceil(chunk.numel() / _DRAWS)
        first = start // _DRAWS
        quad = torch.arange(first, first + num_quads, device=total.device)
        normals = _box_muller(philox_4x32(quad, leaf=leaf, key=key))
        chunk.add_(normals.flatten()[: chunk.numel()], alpha=std)


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
    total: Tensor, *, std: float, key: int, leaf: int
) -> None:
    """Does what `add_gaussian_noise_` does, in one Triton launch."""
    num_elements = total.numel()
    if num_elements == 0:
        return
    grid = (triton.cdiv(num_elements, _DRAWS * _QUADS_PER_PROGRAM),)
    signed_key = key - (1 << 64) if key >= 1 << 63 else key
    _gaussian_noise_kernel[grid](
        total, num_elements, std, signed_key, leaf, QUADS=_QUADS_PER_PROGRAM
    )


if triton is not None:
    # Key and leaf are data: one compiled kernel serves all their values.
    @triton.jit(do_not_specialize=["key", "leaf"])
    def _gaussian_noise_kernel(
        total, num_elements, std, key, leaf, QUADS: tl.constexpr
    ):
        """One program adds noise to 4 * QUADS elements."""
        quad = tl.program_id(0).to(tl.int64) * QUADS + tl.arange(0, QUADS)
        low = (quad & 0xFFFFFFFF).to(tl.uint32)
        high = (quad >> 32).to(tl.uint32)
        third = low * 0 + leaf.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(key.to(tl.int64), low, high, third, low * 0)
        u0 = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        u1 = w1.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        u2 = w2.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        u3 = w3.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        r0 = tl.sqrt(-2.0 * tl.log(u0)) * std
        r1 = tl.sqrt(-2.0 * tl.log(u2)) * std
        a0 = u1 * 6.283185307179586
        a1 = u3 * 6.283185307179586
        element = quad * 4
        _add(total, element, num_elements, r0 * tl.cos(a0))
        _add(total, element + 1, num_elements, r0 * tl.sin(a0))
        _add(total, element + 2, num_elements, r1 * tl.cos(a1))
        _add(total, element + 3, num_elements, r1 * tl.sin(a1))

    @triton.jit
    def _add(total, element, num_elements, value):
        """Adds one value an element, where the element exists."""
        inside = element < num_elements
        before = tl.load(total + element, mask=inside, other=0.0)
        tl.store(total + element, before + value, mask=inside)
