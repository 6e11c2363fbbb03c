"""Groups of ranks, which all tests of this folder share."""

from collections.abc import Callable, Iterator

import pytest
from rank_processes import RankGroup


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., RankGroup]]:
    """A group of a size, on the CPU or on GPUs, started when it is first asked for."""
    groups: dict[tuple[int, str], RankGroup] = {}

    def of(size: int, device: str = "cpu") -> RankGroup:
        if (size, device) not in groups:
            groups[size, device] = RankGroup(size, device)
        return groups[size, device]

    yield of
    for group in groups.values():
        group.close()
