"""The noise: a known generator, a normal law, and for each element its own draw."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dpsgd.kernels.gaussian_noise import (
    add_gaussian_noise_,
    add_gaussian_noise_reference_,
    add_gaussian_noise_triton_,
    philox_4x32,
)

Words = tuple[int, ...]
KEY = 0x9D39247E33776D41
NUM_ELEMENTS = 200_000

# Known answers of the authors' library Random123, file kat_vectors, philox4x32 10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_by_the_paper(counter: Words, key: Words) -> Words:
    """Philox4x32-10 in whole numbers, one counter at a time."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = second >> 32 ^ c1 ^ k0, second & 0xFFFFFFFF
        c2, c3 = first >> 32 ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def ours(quads: list[int], leaf: int, key: int) -> list[Words]:
    signed = [quad - 2**64 if quad >= 2**63 else quad for quad in quads]
    words = philox_4x32(torch.tensor(signed), leaf=leaf, key=key)
    return list(zip(*(word.tolist() for word in words), strict=True))


def noise(
    num_elements: int = NUM_ELEMENTS, *, std: float = 1.0, key: int = KEY, leaf: int = 0
) -> NDArray[np.float64]:
    total = torch.zeros(num_elements)
    add_gaussian_noise_(total, std=std, key=key, leaf=leaf)
    return total.double().numpy()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_oracle_gives_the_known_answers(
    counter: Words, key: Words, answer: Words
) -> None:
    assert philox_by_the_paper(counter, key) == answer


def test_philox_gives_the_known_answer() -> None:
    assert ours([0], leaf=0, key=0) == [KNOWN_ANSWERS[0][2]]


def test_philox_equals_the_oracle_at_any_counter_and_key() -> None:
    rng = random.Random(0)
    edges = [0, 1, 2**31, 2**32 - 1]
    for leaf, low, high in [
        (rng.choice([*edges, rng.getrandbits(32)]), *rng.choices(edges, k=2))
        for _ in range(50)
    ]:
        quads = [rng.getrandbits(64) for _ in range(20)] + [0, 2**32 - 1, 2**32]
        expected = [
            philox_by_the_paper((quad % 2**32, quad >> 32, leaf, 0), (low, high))
            for quad in quads
        ]
        assert ours(quads, leaf, low + (high << 32)) == expected


def box_muller(words: Words) -> list[float]:
    """Four normals in float64 from four words."""
    u = (np.array(words, dtype=np.float64) + 0.5) / 2**32
    length = np.sqrt(-2 * np.log(u[[0, 0, 2, 2]]))
    angle = 2 * np.pi * u[[1, 1, 3, 3]]
    return list(length * np.where([1, 0, 1, 0], np.cos(angle), np.sin(angle)))


def test_each_element_has_the_normal_of_its_own_counter() -> None:
    expected = [
        value
        for quad in range(50)
        for value in box_muller(
            philox_by_the_paper((quad, 0, 3, 0), (KEY % 2**32, KEY >> 32))
        )
    ]

    # float32 angles up to 2 pi are off by 2^-22; no draw here is beyond 5.
    np.testing.assert_allclose(noise(200, leaf=3), expected, atol=5e-6)


@pytest.mark.parametrize("num_elements", [0, 1, 3, 4, 5, 1_023, 1_024, 1_025, 3_000])
@pytest.mark.parametrize(
    ("key", "leaf"),
    [(0, 0), (1, 1), (2**31, 2**31), (2**63, 7), (2**64 - 1, 2**32 - 1), (KEY, 2)],
)
def test_the_kernel_equals_the_reference(
    kernel_device: torch.device, num_elements: int, key: int, leaf: int
) -> None:
    pytest.importorskip("triton")
    start = torch.linspace(-1, 1, num_elements, device=kernel_device)
    kernel, reference = start.clone(), start.clone()
    add_gaussian_noise_triton_(kernel, std=3.0, key=key, leaf=leaf)
    add_gaussian_noise_reference_(reference, std=3.0, key=key, leaf=leaf)

    # Two float32 evaluations of log, sin and cos, times std 3 and a length up to 7.
    torch.testing.assert_close(kernel, reference, rtol=0, atol=2e-5)


def test_the_kernel_writes_nothing_beyond_its_tensor(
    kernel_device: torch.device,
) -> None:
    pytest.importorskip("triton")
    memory = torch.zeros(100, device=kernel_device)
    add_gaussian_noise_triton_(memory[8:61], std=1.0, key=KEY, leaf=0)

    assert memory[8:61].all()
    assert not memory[:8].any()
    assert not memory[61:].any()


def test_noise_is_the_same_however_long_the_tensor() -> None:
    whole = noise(600_000)  # more than two chunks of the reference

    for length in (1, 4, 7, 262_144, 262_145, 599_999):
        np.testing.assert_array_equal(noise(length), whole[:length])
    chunk = 1 << 18
    assert (whole[:chunk] == whole[chunk : 2 * chunk]).mean() < 1e-3


@pytest.fixture(params=["reference", "triton"])
def kernel(request: pytest.FixtureRequest) -> Callable[..., None]:
    if request.param == "reference":
        return add_gaussian_noise_reference_
    pytest.importorskip("triton")
    return add_gaussian_noise_triton_


@pytest.mark.parametrize("cuts", [(0,), (1,), (4, 5), (1_022, 1_029, 2_500), (3_000,)])
def test_parts_of_a_tensor_get_the_noise_of_their_place(
    kernel: Callable[..., None], kernel_device: torch.device, cuts: tuple[int, ...]
) -> None:
    whole, parts = torch.zeros(2, 3_000, device=kernel_device)
    kernel(whole, std=2.0, key=KEY, leaf=1)
    for start, stop in itertools.pairwise([0, *cuts, 3_000]):
        kernel(parts[start:stop], std=2.0, key=KEY, leaf=1, offset=start)

    assert torch.equal(parts, whole)


def test_places_beyond_32_bits_have_their_own_noise(
    kernel: Callable[..., None], kernel_device: torch.device
) -> None:
    far = 2**34 - 6  # the counter's low word ends within these elements
    expected = [
        value
        for quad in range(far // 4, far // 4 + 4)
        for value in box_muller(
            philox_by_the_paper(
                (quad % 2**32, quad >> 32, 0, 0), (KEY % 2**32, KEY >> 32)
            )
        )
    ]
    total = torch.zeros(12, device=kernel_device)
    kernel(total, std=1.0, key=KEY, leaf=0, offset=far)

    np.testing.assert_allclose(total.cpu(), expected[2:14], atol=5e-6)


def test_noise_is_added_and_scaled() -> None:
    total = torch.full((1_000,), 5.0)
    add_gaussian_noise_(total, std=2.5, key=KEY, leaf=0)

    np.testing.assert_allclose(total.numpy() - 5, 2.5 * noise(1_000), atol=2e-6)


def test_zero_std_adds_nothing() -> None:
    total = torch.linspace(-1, 1, 9)
    add_gaussian_noise_(total, std=0.0, key=KEY, leaf=0)

    assert torch.equal(total, torch.linspace(-1, 1, 9))


def test_shape_does_not_matter() -> None:
    total = torch.zeros(5, 3, 2)
    add_gaussian_noise_(total, std=1.0, key=KEY, leaf=0)

    np.testing.assert_array_equal(total.flatten().numpy(), noise(30))


def test_noise_follows_the_normal_distribution() -> None:
    def p_value(sample: NDArray[np.float64]) -> float:
        return float(stats.kstest(sample, "norm").pvalue)

    assert p_value(noise()) > 1e-3
    assert p_value(noise() * 1.02) < 1e-3
    assert p_value(noise() + 0.02) < 1e-6
    student = np.random.default_rng(0).standard_t(20, NUM_ELEMENTS)
    assert p_value(student) < 1e-6


def test_noise_has_mean_zero_and_unit_variance() -> None:
    sample = noise()
    spread = 1 / np.sqrt(NUM_ELEMENTS)

    assert abs(sample.mean()) < 4 * spread
    assert abs(sample.var() - 1) < 4 * np.sqrt(2) * spread
    # The tail is there, as far as so many draws reach.
    assert 4 < np.abs(sample).max() < 6.77


@pytest.mark.parametrize(
    "other",
    [
        lambda: noise(key=KEY + 1),
        lambda: noise(key=KEY ^ (1 << 63)),
        lambda: noise(leaf=1),
        lambda: noise(leaf=2**31),
        lambda: np.roll(noise(), 1),
        lambda: np.roll(noise(), 2),
        lambda: np.roll(noise(), 4),
        lambda: np.roll(noise(), 1_024),
    ],
    ids=["key", "high_bit", "leaf", "high_leaf", "by_1", "by_2", "by_4", "by_1024"],
)
def test_other_keys_leaves_and_elements_are_independent(
    other: Callable[[], NDArray[np.float64]],
) -> None:
    mine, theirs = noise(), other()

    def score(sample: NDArray[np.float64]) -> float:
        return float((mine * sample).sum() / np.sqrt(NUM_ELEMENTS))

    assert abs(score(theirs)) < 4
    assert score(theirs + 0.03 * mine) > 8
    # Box-Muller pairs share their radius: squares must be uncorrelated too.
    squares = ((mine**2 - 1) * (theirs**2 - 1)).sum() / (2 * np.sqrt(NUM_ELEMENTS))
    assert abs(squares) < 4


@pytest.mark.parametrize(
    "total",
    [
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, 4).T[:, :2],
    ],
    ids=["bfloat16", "float64", "strided"],
)
def test_another_type_or_layout_is_refused(total: Tensor) -> None:
    with pytest.raises(ValueError, match="noise is added to contiguous float32 sums"):
        add_gaussian_noise_(total, std=1.0, key=KEY, leaf=0)


@pytest.mark.gpu
def test_noise_on_a_gpu_equals_noise_on_the_cpu() -> None:
    total = torch.zeros(100_003, device="cuda")
    add_gaussian_noise_(total, std=1.0, key=KEY, leaf=5)

    np.testing.assert_allclose(total.cpu().numpy(), noise(100_003, leaf=5), atol=5e-6)
