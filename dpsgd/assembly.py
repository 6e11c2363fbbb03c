"""Builds the parts of a run from its settings: each once, in one place."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpsgd.checkpoint import Checkpoint, CheckpointStore
from dpsgd.clipping import clipping_slack
from dpsgd.config import Config
from dpsgd.data import (
    Dataset,
    DataSplits,
    LoadViews,
    PoissonSampler,
    PublicFacts,
    UserViewLoader,
    ViewLoader,
    declared_num_examples,
    load_datasets,
    normalize,
    num_decode_workers,
    published_facts,
)
from dpsgd.errors import ConfigError, DataError, fault
from dpsgd.evaluate import Evaluation, evaluate
from dpsgd.features import FeatureCache, FeatureLoader
from dpsgd.gradient_engine import build_gradient_engine, execution_of, loss_of
from dpsgd.models import (
    build_model,
    check_model,
    draws_per_view,
    freeze,
    frozen_tensors,
    initialize,
    trainable_params,
)
from dpsgd.non_private import NonPrivateStep, ShuffledSampler, SummedGrad
from dpsgd.optim import Optimizer, SecureNoise
from dpsgd.persistence import check_shapes, restore_state, save_state
from dpsgd.planning import Plan, make_plan, outline
from dpsgd.privacy import DPSGDMechanism, PrivacyLedger
from dpsgd.resumption import (
    arithmetic_of,
    check_mechanism,
    check_same_run,
    continued_streams,
    identity_of,
)
from dpsgd.rng import RandomStreams
from dpsgd.train import Run, TrainState
from dpsgd.trees import Params, num_elements
from dpsgd.weights import Initialization, fit, read_weights

__all__ = ["assemble", "evaluator", "load_network", "plan_of"]

_EVALUATION_BATCH = 500
_EVALUATION_PIXELS = 1 << 23  # 167 images of 224x224


def plan_of(config: Config) -> Plan:
    """Returns the plan of a run, reading the data only where facts are not published.

    Raises:
        UserError: Settings or data are at fault.
    """
    facts = published_facts(config.data)
    if facts is None:
        facts = _facts(config, load_datasets(config.data))
    facts = _with_classes(config, facts)
    return make_plan(config, facts, initialization=_initialization(config, facts))


def assemble(
    config: Config,
    *,
    store: CheckpointStore,
    checkpoint: Checkpoint | None = None,
    shown_step: int = 0,
) -> tuple[Run, TrainState, Plan]:
    """Builds a run, at its start or where a checkpoint left it.

    Args:
        config: Settings.
        store: Where checkpoints go.
        checkpoint: Where to go on from; None starts anew.
        shown_step: Last step whose evaluation was recorded.

    Raises:
        UserError: Settings, data or checkpoint are at fault.
    """
    splits = load_datasets(config.data)
    identity = identity_of(config, splits)
    mechanism = None
    if checkpoint is not None:
        check_same_run(checkpoint, identity)
        mechanism = DPSGDMechanism.from_dict(checkpoint.facts["mechanism"])
        config = _with_microbatch_size(config, checkpoint)
    facts = _with_classes(config, _facts(config, splits))
    start = _initialization(config, facts, checkpoint)
    plan = make_plan(config, facts, mechanism=mechanism, initialization=start)
    cache = _feature_cache(config)
    features = cache.identity if cache is not None else None
    decoder = splits.train.decoder
    arithmetic = arithmetic_of(plan, config, features=features, decoder=decoder)
    streams = _streams(config, plan, arithmetic, checkpoint, shown_step)
    model = _begun_network(config, plan, splits, streams)
    frozen = frozen_tensors(model)
    state = _initial_state(config, trainable_params(model))
    if checkpoint is not None:
        restore_state(state, frozen, checkpoint)
    constants = {
        **identity,
        "initialization": start and start.to_dict(),
        "arithmetic": arithmetic,
        "mechanism": plan.mechanism.to_dict(),
        "streams": streams.to_dict(),
    }
    run = Run(
        config=config,
        mechanism=plan.mechanism,
        streams=streams,
        frozen=frozen,
        save=partial(save_state, store, frozen=frozen, constants=constants),
        keep_best=store.mark_best,
        evaluate=evaluator(config, splits, model, facts.class_names, plan.device),
        ledger=_ledger(config, plan),
        sampler=_sampler(plan, splits, streams),
        load_views=_loader(config, plan, splits, streams, model, cache),
        grad_fn=build_gradient_engine(config, plan, model),
        secure_noise=_secure_noise(config, plan, state.params),
        unaccounted_step=_unaccounted_step(config, splits, streams, model),
    )
    return run, state, plan


def load_network(
    config: Config, splits: DataSplits, params: Params, device: torch.device
) -> tuple[nn.Module, tuple[str, ...]]:
    """Returns the network that fits given weights, and the names of its outputs.

    Args:
        config: Settings of the run.
        splits: Its data.
        params: Weights, whose shapes must be the network's.
        device: Where the network shall be.

    Raises:
        UserError: Settings, data and weights do not fit together.
    """
    facts = _with_classes(config, _facts(config, splits))
    model = _network(config, facts, splits)
    check_shapes("weights", params, model.state_dict())
    return model.to(device), facts.class_names


def _network(config: Config, facts: PublicFacts, splits: DataSplits) -> nn.Module:
    """Returns the network, parameters undrawn, once every label has an output."""
    _check_labels(splits, facts.num_classes)
    return build_model(
        config.model, image_shape=facts.image_shape, num_classes=facts.num_classes
    )


def _initialization(
    config: Config, facts: PublicFacts, checkpoint: Checkpoint | None = None
) -> Initialization | None:
    """Returns what the network starts from, whose values a checkpoint has already."""
    if config.model.init_from is None:
        return None
    if checkpoint is not None:
        return Initialization.from_dict(checkpoint.facts["initialization"])
    return fit(read_weights(config.model), outline(config, facts), config)


def _streams(
    config: Config,
    plan: Plan,
    arithmetic: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    shown_step: int,
) -> RandomStreams:
    """Returns new streams, or those with which a checkpoint's run goes on."""
    if checkpoint is None:
        return RandomStreams.from_seed(config.train.seed)
    check_mechanism(config, plan)
    return continued_streams(checkpoint, arithmetic=arithmetic, shown_step=shown_step)


def _begun_network(
    config: Config, plan: Plan, splits: DataSplits, streams: RandomStreams
) -> nn.Module:
    """Returns the network with its first parameters, frozen, on the device."""
    model = _network(config, plan.facts, splits)
    initialize(model, streams.generator("init"))
    if plan.initialization is not None:
        plan.initialization.apply(model)
    freeze(model, config.finetune.train)
    check_model(model, plan.facts.image_shape)
    return model.to(plan.device)


def _facts(config: Config, splits: DataSplits) -> PublicFacts:
    """Returns the public facts of loaded data, whose size is declared, not counted."""
    if config.privacy.unit == "user":
        size = config.data.num_users
        assert size is not None  # the loader sees to it
    else:
        size = declared_num_examples(config.data, rows_held=len(splits.train))
    return PublicFacts(
        num_examples=size,
        image_shape=splits.train.image_shape,
        class_names=splits.train.class_names,
    )


def _with_classes(config: Config, facts: PublicFacts) -> PublicFacts:
    """Returns the facts with a name for every output of the network."""
    declared, wanted = len(facts.class_names), config.model.num_classes
    if not declared and wanted is None:
        rule = "the data set declares no classes, and labels are never counted"
        raise ConfigError(
            fault("model.num_classes", None, rule, "give the number of classes")
        )
    if declared and wanted not in (None, declared):
        rule = f"the data set declares {declared} classes"
        raise ConfigError(
            fault("model.num_classes", wanted, rule, f"set {declared} or remove it")
        )
    names = facts.class_names or tuple(str(label) for label in range(wanted or 0))
    return dataclasses.replace(facts, class_names=names)


def _check_labels(splits: DataSplits, num_classes: int) -> None:
    """Raises if a label has no output of the network."""
    for field, dataset in (("data.train", splits.train), ("data.test", splits.test)):
        wrong = (dataset.labels >= num_classes).nonzero()
        if len(wrong):
            row = int(wrong[0])
            rule = f"row {row} has the label {int(dataset.labels[row])}"
            remedy = f"{field} must have labels below it, or raise it"
            raise DataError(fault("model.num_classes", num_classes, rule, remedy))


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
    config: Config, splits: DataSplits, streams: RandomStreams, model: nn.Module
) -> NonPrivateStep | None:
    """Returns the step of a run without privacy, None for every other."""
    if config.privacy.enabled:
        return None
    size = int(config.privacy.expected_batch_size)
    num_rows = len(splits.train)
    return NonPrivateStep(
        sampler=ShuffledSampler(num_rows=num_rows, batch_size=size, streams=streams),
        grad_fn=SummedGrad(loss_of(config, model)),
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


def _view_loader(
    config: Config,
    plan: Plan,
    splits: DataSplits,
    streams: RandomStreams,
    model: nn.Module,
) -> LoadViews:
    """Returns what turns draws of the training set into views."""
    # A draw ends, on average, half a microbatch early. Two sizes are worth recording;
    # but for secure noise no example's gradient may depend on how many are drawn.
    is_recorded = execution_of(config, plan) == "cuda_graph"
    ends_early = is_recorded and config.privacy.noise == "standard"
    half = math.ceil(plan.microbatch_size / 2)
    make_loader: Callable[..., LoadViews] = ViewLoader
    if plan.mechanism.unit == "user":
        most = config.privacy.max_examples_per_user
        assert most is not None  # the loader of settings sees to it
        make_loader = partial(UserViewLoader, max_examples=most)
    return make_loader(
        _placed(config, splits.train, plan.device),
        config=config.data,
        streams=streams,
        microbatch_size=plan.microbatch_size,
        padded_to=half if ends_early else None,
        draws_per_view=draws_per_view(model),
        dtype=getattr(torch, config.model.compute_dtype),
        device=plan.device,
    )


def _placed(config: Config, dataset: Dataset, device: torch.device) -> Dataset:
    """Returns a data set where its rows are got at fastest."""
    workers = num_decode_workers(config.runtime.decode_workers)
    return dataset.placed(device, num_workers=workers)


def _feature_cache(config: Config) -> FeatureCache | None:
    """Returns the features that stand for views, if any do."""
    path = config.runtime.feature_cache
    return FeatureCache(Path(path).expanduser()) if path is not None else None


def _loader(
    config: Config,
    plan: Plan,
    splits: DataSplits,
    streams: RandomStreams,
    model: nn.Module,
    cache: FeatureCache | None,
) -> LoadViews:
    """Returns what turns draws of the training set into views, or their features."""
    if cache is None:
        return _view_loader(config, plan, splits, streams, model)
    return FeatureLoader(
        cache.load(model, _placed(config, splits.train, plan.device), config),
        splits.train.labels,
        microbatch_size=plan.microbatch_size,
        device=plan.device,
    )


def evaluator(
    config: Config,
    splits: DataSplits,
    model: nn.Module,
    class_names: tuple[str, ...],
    device: torch.device,
) -> Callable[[Params], Evaluation]:
    """Returns what measures weights on the public test set.

    Args:
        config: Settings, of which the normalisation is used.
        splits: Data.
        model: Network, whose parameters the weights replace.
        class_names: Name of each output.
        device: Where to measure.
    """
    most = max(1, _EVALUATION_PIXELS // math.prod(splits.test.image_shape[1:]))
    return partial(
        evaluate,
        model,
        dataset=_placed(config, splits.test, device),
        normalize=partial(normalize, mean=config.data.mean, std=config.data.std),
        class_names=class_names,
        batch_size=min(_EVALUATION_BATCH, most),
    )


def _initial_state(config: Config, params: Params) -> TrainState:
    """Returns the state before the first step."""
    contiguous = torch.contiguous_format
    params = {
        name: leaf.clone(memory_format=contiguous) for name, leaf in params.items()
    }
    ema = None
    if config.ema.decay is not None:
        ema = {name: leaf.clone() for name, leaf in params.items()}
    num_steps = config.train.num_steps
    optimizer = Optimizer(params, config.optimizer, num_steps=num_steps)
    return TrainState(step=0, params=params, ema=ema, optimizer=optimizer)


def _with_microbatch_size(config: Config, checkpoint: Checkpoint) -> Config:
    """Returns settings whose `auto` is what it was, so that rounding is the same."""
    if config.runtime.microbatch_size != "auto":
        return config
    saved = checkpoint.facts["arithmetic"]["microbatch_size"]
    runtime = dataclasses.replace(config.runtime, microbatch_size=saved)
    return dataclasses.replace(config, runtime=runtime)
