import pytest

from dpsgd.report.intervals import wilson_interval


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_the_published_ones(
    right: int, total: int, low: float, high: float
) -> None:
    # Half a unit of the last digit that is published.
    assert wilson_interval(right / total, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("total", [1, 3, 10_000])
def test_an_interval_stays_within_0_and_1_and_is_never_empty(total: int) -> None:
    for right in {0, 1, total // 2, total}:
        low, high = wilson_interval(right / total, total)
        assert 0 <= low < high <= 1
        assert low - 1e-12 <= right / total <= high + 1e-12  # rounding at 0 and 1
