"""Operators are found, so that none is left out where one implementation is forced."""

from collections.abc import Callable
from pathlib import Path

from small_runs import benchmark_of

from dpsgd import kernels
from dpsgd.kernels.dispatch import operator_modules


def test_every_module_that_asks_where_it_runs_is_found() -> None:
    files = Path(kernels.__file__).parent.glob("*.py")
    asking = {path.stem for path in files if "runs_on_triton(" in path.read_text()}

    assert {*operator_modules()} == asking - {"dispatch"}
    assert len(asking) > 10


def test_plain_operators_leave_the_clipped_sum_alone() -> None:
    before = {name: one.runs_on_triton for name, one in operator_modules().items()}
    throughput = benchmark_of("throughput_paths")
    with throughput.plain_operators():
        kept = {
            name
            for name, module in operator_modules().items()
            if module.runs_on_triton is before[name]
        }

    assert kept == {"clip_accumulate"}
    for name, module in operator_modules().items():
        assert module.runs_on_triton is before[name]


def test_kernels_are_forced_in_every_module(on_kernels: Callable[[], None]) -> None:
    on_kernels()

    assert all(one.runs_on_triton(None) for one in operator_modules().values())
