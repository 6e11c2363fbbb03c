"""Groups of two and four ranks, which all tests of this folder share."""

from collections.abc import Callable, Iterator

import pytest
from rank_processes import RankGroup


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankGroup]]:
    """A group of a size, started when it is first asked for."""
    groups: dict[int, RankGroup] = {}

    def of(size: int) -> RankGroup:
        if size not in groups:
            groups[size] = RankGroup(size)
        return groups[size]

    yield of
    for group in groups.values():
        group.close()
