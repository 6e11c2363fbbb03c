"""A draw is a function of key, stream and step, and of nothing else."""

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dpsgd.rng import RandomStreams, StreamName

STREAMS = RandomStreams.from_seed(0)


def draws(streams: RandomStreams, name: StreamName, step: int = 0) -> NDArray[np.int64]:
    return streams.generator(name, step).integers(2**62, size=1_000)


def test_same_seed_stream_and_step_give_the_same_draws() -> None:
    first, second = RandomStreams.from_seed(7), RandomStreams.from_seed(7)
    draws(second, "noise", 3)
    draws(second, "sampling", 2)

    np.testing.assert_array_equal(
        draws(first, "sampling", 3), draws(second, "sampling", 3)
    )
    assert first.noise_key(3) == second.noise_key(3)
    assert first.seeded


def test_every_stream_step_and_seed_draws_something_else() -> None:
    drawn = {
        int(draws(RandomStreams.from_seed(seed), name, step)[0])
        for seed in (0, 1)
        for name in get_args(StreamName)
        for step in (0, 1, 2, 10**9)
    }

    assert len(drawn) == 2 * len(get_args(StreamName)) * 4


def test_steps_of_a_stream_do_not_overlap() -> None:
    first, second = draws(STREAMS, "noise", 0), draws(STREAMS, "noise", 1)

    assert not set(first) & set(second)


@pytest.mark.parametrize("other", ["augmentation", "noise", "init"])
def test_streams_are_uncorrelated(other: StreamName) -> None:
    ours = STREAMS.generator("sampling").standard_normal(20_000)
    theirs = STREAMS.generator(other).standard_normal(20_000)

    assert stats.pearsonr(ours, theirs).pvalue > 1e-4
    assert stats.pearsonr(ours, theirs + 0.1 * ours).pvalue < 1e-12


def test_noise_keys_of_steps_differ_and_fill_64_bits() -> None:
    keys = [STREAMS.noise_key(step) for step in range(2_000)]

    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    ones = np.array([[key >> bit & 1 for bit in range(64)] for key in keys]).mean(0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(len(keys))


def test_without_a_seed_every_run_differs() -> None:
    first, second = RandomStreams.from_seed(), RandomStreams.from_seed()

    assert first.key != second.key
    assert not first.seeded
    assert first.noise_key(0) != second.noise_key(0)


def test_the_key_is_not_shown() -> None:
    shown = repr(STREAMS)

    assert "seeded=True" in shown
    assert "key" not in shown
    assert STREAMS.key.hex() not in shown


@pytest.mark.parametrize("length", [0, 15, 17, 32])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"key of {length} bytes: must have 16"):
        RandomStreams(bytes(length))


def test_a_key_goes_on_where_it_was_saved() -> None:
    restored = RandomStreams(bytes.fromhex(STREAMS.key.hex()), seeded=True)

    assert restored == STREAMS
    np.testing.assert_array_equal(draws(restored, "init"), draws(STREAMS, "init"))


def test_draws_never_change_between_versions() -> None:
    """Golden: a checkpoint of an older version goes on with the same randomness."""
    assert RandomStreams.from_seed(0).key.hex() == "1240a4684403b160e6597a653a88f56c"
    assert STREAMS.noise_key(5) == 3270095704934353160
    assert int(draws(STREAMS, "sampling", 5)[0]) == 686622449971134621
