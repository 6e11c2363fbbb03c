"""Builds the parts of a run from its settings: each once, in one place."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dpsgd.checkpoint import Checkpoint, CheckpointStore
from dpsgd.clipping import clipping_slack
from dpsgd.config import Config, config_to_dict
from dpsgd.data import (
    DataSplits,
    PoissonSampler,
    PublicFacts,
    load_datasets,
    published_facts,
)
from dpsgd.declared import declared_network, facts_of, require_outputs, with_classes
from dpsgd.evaluate import Evaluation, evaluator
from dpsgd.feeding import feed_of
from dpsgd.gradient_engine import build_gradient_engine, loss_of
from dpsgd.models import Network, check_model, freeze, frozen_tensors, initialize
from dpsgd.non_private import NonPrivateStep, ShuffledSampler, SummedGrad
from dpsgd.optim import Optimizer, SecureNoise
from dpsgd.parallel import Layout, Ranks, laid_out
from dpsgd.persistence import check_shapes, restore_state, save_state
from dpsgd.planning import Plan, make_plan, outline
from dpsgd.privacy import DPSGDMechanism, PrivacyLedger
from dpsgd.resumption import (
    arithmetic_of,
    check_mechanism,
    check_same_run,
    constants_of,
    continued_streams,
    identity_of,
    with_microbatch_size,
)
from dpsgd.rng import RandomStreams
from dpsgd.run import Run, TrainState
from dpsgd.trees import Params, num_elements
from dpsgd.weights import Initialization, fit, read_weights

__all__ = ["assemble", "load_network", "plan_of"]


def plan_of(config: Config) -> Plan:
    """Returns the plan of a run, reading the data only where facts are not published.

    Raises:
        UserError: Settings or data are at fault.
    """
    facts = published_facts(config.data)
    if facts is None:
        facts = facts_of(config, load_datasets(config.data))
    facts = with_classes(config, facts)
    return make_plan(config, facts, initialization=_initialization(config, facts))


def assemble(
    config: Config,
    *,
    store: CheckpointStore,
    checkpoint: Checkpoint | None = None,
    shown_step: int = 0,
    ranks: Ranks | None = None,
) -> tuple[Run, TrainState, Plan]:
    """Builds a run, at its start or where a checkpoint left it.

    Ranks begin alike or not at all: settings, data, mechanism, arithmetic, parameters
    and step are compared, and all take the keys of the first one.

    Args:
        config: Settings.
        store: Where checkpoints go.
        checkpoint: Where to go on from; None starts anew.
        shown_step: Last step whose evaluation was recorded.
        ranks: The processes that train together; None is this one alone.

    Raises:
        UserError: Settings, data or checkpoint are at fault, or ranks do not agree.
    """
    ranks = ranks or Ranks()
    with ranks.one_first("data"):
        splits = load_datasets(config.data)
    identity = identity_of(config, splits)
    if checkpoint is not None:
        check_same_run(checkpoint, identity)
        config = with_microbatch_size(config, checkpoint)
    plan = _plan(config, splits, checkpoint, ranks)
    _work_on(plan.device)
    feed = feed_of(config, splits.train)
    arithmetic = arithmetic_of(
        plan, config, features=feed.features, decoder=feed.decoder, num_ranks=ranks.size
    )
    streams = _streams(config, plan, arithmetic, checkpoint, shown_step, ranks)
    model = _begun_network(config, plan, splits, streams)
    frozen = frozen_tensors(model)
    stays = plan.execution == "cuda_graph"
    layout, params = laid_out(model, ranks, config.runtime.parallel, stays=stays)
    state = _initial_state(config, params)
    if checkpoint is not None:
        restore_state(state, frozen, checkpoint, layout)
    constants = {**identity, **constants_of(plan, streams), "arithmetic": arithmetic}
    ranks.require_same({**constants, **config_to_dict(config), "step": state.step})
    run = Run(
        config=config,
        mechanism=plan.mechanism,
        streams=streams,
        layout=layout,
        frozen=frozen,
        save=partial(
            save_state, store, frozen=frozen, constants=constants, layout=layout
        ),
        keep_best=store.mark_best if ranks.is_first else lambda step: None,
        evaluate=_evaluator_of_parts(config, plan, splits, model, layout),
        ledger=_ledger(config, plan),
        sampler=_sampler(plan, splits, streams),
        load_views=feed.loader(plan, model, streams=streams, share=ranks.share),
        grad_fn=build_gradient_engine(config, plan, model),
        secure_noise=_secure_noise(config, plan, state.params),
        unaccounted_step=_unaccounted_step(config, plan, splits, streams, model),
    )
    return run, state, plan


def load_network(
    config: Config,
    splits: DataSplits,
    params: Params,
    device: torch.device,
    *,
    name: str = "weights",
) -> tuple[nn.Module, tuple[str, ...]]:
    """Returns the network that fits given weights, and the names of its outputs.

    Args:
        config: Settings of the run.
        splits: Its data.
        params: Weights, whose shapes must be the network's.
        device: Where the network shall be.
        name: What the weights are, for messages.

    Raises:
        UserError: Settings, data and weights do not fit together.
    """
    facts = with_classes(config, facts_of(config, splits))
    model = _network(config, facts, splits)
    remedy = "use the network that the run began with, and data of its classes"
    check_shapes(name, params, model.state_dict(), remedy=remedy)
    return model.to(device), facts.class_names


def _work_on(device: torch.device) -> None:
    """Makes a GPU the current device, as kernels run there."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _network(config: Config, facts: PublicFacts, splits: DataSplits) -> Network:
    """Returns the network, parameters undrawn, once every label has an output."""
    require_outputs(splits, facts.num_classes)
    return declared_network(config, facts)


def _initialization(
    config: Config, facts: PublicFacts, checkpoint: Checkpoint | None = None
) -> Initialization | None:
    """Returns what the network starts from, whose values a checkpoint has already."""
    if config.model.init_from is None:
        return None
    if checkpoint is not None:
        return Initialization.from_dict(checkpoint.facts["initialization"])
    return fit(read_weights(config.model), outline(config, facts), config)


def _plan(
    config: Config, splits: DataSplits, checkpoint: Checkpoint | None, ranks: Ranks
) -> Plan:
    """Returns the plan, with the mechanism of a checkpoint if there is one."""
    mechanism = None
    if checkpoint is not None:
        mechanism = DPSGDMechanism.from_dict(checkpoint.facts["mechanism"])
    facts = with_classes(config, facts_of(config, splits))
    plan = make_plan(
        config,
        facts,
        mechanism=mechanism,
        initialization=_initialization(config, facts, checkpoint),
        num_ranks=ranks.size,
    )
    ranks.meet()  # data were read and noise calibrated, each in its own time
    # Ranks may have different room; the smallest microbatch fits on all.
    fitting = -ranks.largest(-plan.microbatch_size)
    return dataclasses.replace(plan, microbatch_size=fitting)


def _streams(
    config: Config,
    plan: Plan,
    arithmetic: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    shown_step: int,
    ranks: Ranks,
) -> RandomStreams:
    """Returns new streams, or those with which a checkpoint's run goes on.

    Keys may come from the operating system: all ranks take those of the first.
    """
    if checkpoint is None:
        streams = RandomStreams.from_seed(config.train.seed)
    else:
        check_mechanism(config, plan)
        streams = continued_streams(
            checkpoint, arithmetic=arithmetic, shown_step=shown_step
        )
    return RandomStreams.from_dict(ranks.from_first(streams.to_dict()))


def _begun_network(
    config: Config, plan: Plan, splits: DataSplits, streams: RandomStreams
) -> Network:
    """Returns the network with its first parameters, frozen, on the device."""
    model = _network(config, plan.facts, splits)
    initialize(model, streams.generator("init"))
    if plan.initialization is not None:
        plan.initialization.apply(model)
    freeze(model, config.finetune.train)
    check_model(model, plan.facts.image_shape)
    return model.to(plan.device)


def _ledger(config: Config, plan: Plan) -> PrivacyLedger:
    """Returns the account of the run."""
    limit = config.privacy.max_epsilon
    ledger = PrivacyLedger(plan.mechanism, plan.accountant, max_epsilon=limit)
    ledger.require(1)  # a budget that one step exceeds trains nothing
    return ledger


def _sampler(plan: Plan, splits: DataSplits, streams: RandomStreams) -> PoissonSampler:
    """Returns "Take a random sample" for the examples or users of the training set."""
    rate = plan.mechanism.sample_rate
    num_rows = len(splits.train)
    if plan.mechanism.unit == "user":
        num_rows = splits.train.num_users
    return PoissonSampler(num_rows=num_rows, sample_rate=rate, streams=streams)


def _unaccounted_step(
    config: Config,
    plan: Plan,
    splits: DataSplits,
    streams: RandomStreams,
    model: nn.Module,
) -> NonPrivateStep | None:
    """Returns the step of a run without privacy, None for every other."""
    if config.privacy.enabled:
        return None
    size = int(config.privacy.expected_batch_size)
    num_rows = len(splits.train)
    return NonPrivateStep(
        sampler=ShuffledSampler(num_rows=num_rows, batch_size=size, streams=streams),
        grad_fn=SummedGrad(loss_of(config, model), execution=plan.execution),
    )


def _secure_noise(config: Config, plan: Plan, params: Params) -> SecureNoise | None:
    """Returns "Add noise", where it is not the streams' noise."""
    if config.privacy.noise != "secure":
        return None
    return SecureNoise.for_sums(
        plan.mechanism,
        num_parameters=num_elements(params),
        clipping_slack=clipping_slack(params, plan.mechanism.clipping_norm),
    )


def _evaluator_of_parts(
    config: Config, plan: Plan, splits: DataSplits, model: nn.Module, layout: Layout
) -> Callable[[Params], Evaluation]:
    """Returns what measures weights of which each rank has its part."""
    names = plan.facts.class_names
    measure = evaluator(config, splits, model, names, plan.device)
    return lambda parts: measure(layout.whole(parts), ranks=layout.ranks)


def _initial_state(config: Config, params: Params) -> TrainState:
    """Returns the state before the first step."""
    ema = None
    if config.ema.decay is not None:
        ema = {name: leaf.clone() for name, leaf in params.items()}
    num_steps = config.train.num_steps
    optimizer = Optimizer(params, config.optimizer, num_steps=num_steps)
    return TrainState(step=0, params=params, ema=ema, optimizer=optimizer)
