"""What ranks do in the tests: each function is played by every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_processes import Arrays, arrays, run_of_ranks, whole_state
from torch.distributed.fsdp import FSDPModule
from toy_runs import Rows, toy_run, with_draw

import dpsgd.train
from dpsgd.cli.signals import StopSignal
from dpsgd.config import ModelConfig
from dpsgd.models import build_model, initialize
from dpsgd.parallel import Ranks, laid_out
from dpsgd.rng import RandomStreams
from dpsgd.train import train_step

Changes = dict[str, Any]


def by_itself(ranks: Ranks, scenario: Callable[..., Any], *arguments: Any) -> Any:
    """A scenario of a run that nobody joins, where this rank would compute."""
    return scenario(Ranks(device=ranks.device), *arguments)


def toy_steps(ranks: Ranks, mode: str, rows: Rows, options: Changes) -> dict[str, Any]:
    """Steps of the linear model; parameters after each, and how many each part has."""
    run, state = toy_run(rows, ranks=ranks, runtime__parallel=mode, **options)
    steps, unprotected = [], []
    while state.step < run.mechanism.num_steps:
        passes = train_step(run, state)
        steps.append(arrays(run.layout.whole(state.params)))
        unprotected.append(dpsgd.train._unprotected(run, passes))
    held = {name: leaf.numel() for name, leaf in state.params.items()}
    return {"steps": steps, "unprotected": unprotected, "held": held}


def noise_alone(ranks: Ranks, mode: str, num_idle: int) -> Arrays:
    """What one step of an empty draw releases, times the divisor."""
    options = {"noise_multiplier": 2.0, "num_idle": num_idle, "runtime__parallel": mode}
    run, state = toy_run(np.zeros((4, 7)), ranks=ranks, **options)
    train_step(with_draw(run, []), state)
    return arrays(run.layout.whole(state.params))


def num_sharded_modules(ranks: Ranks, settings: Changes) -> int:
    """How many modules of a network are gathered by themselves."""
    config = ModelConfig(**settings)
    model = build_model(config, image_shape=(3, 32, 32), num_classes=4)
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    layout, _ = laid_out(model, ranks, "fsdp")
    assert layout._owner is not None
    return sum(isinstance(one, FSDPModule) for one in layout._owner.modules())


def gathered_in_place(ranks: Ranks, settings: Changes) -> dict[str, Any]:
    """Gathers parameters twice, changed in between, where they are to stay."""
    config = ModelConfig(**settings)
    model = build_model(config, image_shape=(3, 32, 32), num_classes=4)
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    layout, params = laid_out(model, ranks, "fsdp", stays=True)
    found, places = [], []
    for _ in range(2):
        with layout.gathered(params) as whole:
            found.append(arrays(whole))
            places.append([leaf.data_ptr() for leaf in whole.values()])
        assert [*whole] == [*params]
        torch._foreach_mul_(list(params.values()), -2)
    expected = arrays(layout.whole(params))
    return {"found": found, "places": places, "expected": expected}


def trained(
    ranks: Ranks, folder: Path, changes: Changes, num_steps: int
) -> dict[str, Any]:
    """The state after some steps, saved; with the evaluation of the parameters."""
    run, state = run_of_ranks(folder, changes, ranks)
    take_step = run.unaccounted_step or train_step
    while state.step < num_steps:
        take_step(run, state)
    run.save(state)
    run.keep_best(state.step)
    evaluation = run.evaluate(state.params)
    return {
        "state": whole_state(run, state),
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "held": sum(leaf.numel() for leaf in state.params.values()),
    }


def saved(
    ranks: Ranks, folder: Path, changes: Changes, num_steps: int, best: bool
) -> None:
    """Saves a state that says it has taken so many steps, maybe as the best."""
    run, state = run_of_ranks(folder, changes, ranks)
    state.step = num_steps
    run.save(state)
    if best:
        run.keep_best(num_steps)


def restored(ranks: Ranks, folder: Path, changes: Changes) -> dict[str, Any]:
    """The state of the newest checkpoint, and the nonce of its noise from now on."""
    run, state = run_of_ranks(folder, changes, ranks, resume=True)
    nonce = run.streams.noise_nonce
    return {"state": whole_state(run, state), "step": state.step, "nonce": nonce}


def unlike(ranks: Ranks, folder: Path, changes: Changes, odd: Changes) -> str:
    """Starts a run of which the second rank has other settings."""
    run_of_ranks(folder, {**changes, **(odd if ranks.rank == 1 else {})}, ranks)
    return "started"


def drifted(ranks: Ranks) -> str:
    """Compares parameters of which one rank has others, by a last bit or two."""
    run, state = toy_run(np.zeros((4, 5)), ranks=ranks, runtime__parallel="ddp")
    state.params["late"][0] += ranks.rank * 1e-7
    run.layout.require_alike(state.params)
    return "alike"


def stopping(
    ranks: Ranks, folder: Path, changes: Changes, asked: int
) -> tuple[str, int, int]:
    """Trains until one rank is asked to stop, in the third step."""
    run, state = run_of_ranks(folder, changes, ranks)
    stop = StopSignal()

    def requested() -> bool:
        if ranks.rank == asked and state.step == 3:
            stop.received = 15
        return stop.agreed(ranks)

    outcome = dpsgd.train.train(run, state, stop_requested=requested)
    return outcome, state.step, stop.received or 0


def diverging(ranks: Ranks) -> str:
    """Looks at parameters of which the second rank alone has a NaN."""
    run, state = toy_run(np.zeros((4, 5)), ranks=ranks, runtime__parallel="ddp")
    if ranks.rank == 1:
        state.params["late"][0] = torch.nan
    dpsgd.train._check_finite(run, state)
    return "finite"
