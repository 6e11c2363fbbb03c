import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from small_runs import ROOT, remembering, small_config

from dpsgd.assembly import plan_of
from dpsgd.config import load_config
from dpsgd.data import PublicFacts, published_facts
from dpsgd.errors import ConfigError
from dpsgd.planning import Plan, build_mechanism, make_plan
from dpsgd.privacy import EpsilonBound, PRVAccountant

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DIGITS = PublicFacts(
    num_examples=1437, image_shape=(1, 8, 8), class_names=tuple("0123456789")
)


def plan(changes: dict[str, Any] | None = None) -> Plan:
    with remembering():
        return make_plan(small_config(changes), DIGITS)


@pytest.fixture
def no_data_and_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses to load data; noise and epsilon, which take seconds, are made up."""
    monkeypatch.setattr("dpsgd.assembly.load_datasets", None)
    monkeypatch.setattr(
        "dpsgd.planning.calibrate_noise_multiplier", lambda **facts: 3.0
    )
    bound = EpsilonBound(1.0, 1.0, 1.0)
    monkeypatch.setattr(PRVAccountant, "epsilon", lambda *_: bound)


@pytest.mark.usefixtures("no_data_and_no_calibration")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_plans_without_data(path: Path) -> None:
    config = load_config(path, ["runtime.device=cpu"])
    facts = published_facts(config.data)
    if facts is None:  # Tiny ImageNet at 32x32, whose files would tell
        assert config.data.num_examples is not None
        facts = PublicFacts(
            num_examples=config.data.num_examples,
            image_shape=(3, 32, 32),
            class_names=tuple(map(str, range(200))),
        )
    made = make_plan(config, facts)

    parameters = {
        (16, 4, 10): 2_753_818,
        (40, 4, 10): 8_961_306,
        (28, 10, 10): 36_500_378,
        (28, 10, 100): 36_558_068,
    }
    network = (config.model.depth, config.model.width, facts.num_classes)
    num_parameters = made.num_parameters + made.num_frozen
    assert num_parameters == parameters.get(network, num_parameters)
    mechanism = made.mechanism
    batch = mechanism.sample_rate * made.facts.num_examples
    assert batch == pytest.approx(mechanism.expected_batch_size)
    assert mechanism.delta < 1 / made.facts.num_examples
    assert made.microbatch_size >= 1
    assert config.train.seed is None  # a shipped config makes a private run


def test_the_papers_config_is_calibrated_to_its_target() -> None:
    made = plan_of(load_config(ROOT / "configs" / "cifar10_wrn16-4_eps8.yaml"))

    assert 7.99 < made.epsilon.upper <= 8.0
    assert made.mechanism.noise_multiplier == pytest.approx(2.56, abs=0.02)
    assert made.mechanism.sample_rate == 4096 / 50_000


def test_rows_say_all_that_the_guarantee_rests_on() -> None:
    config = small_config()
    rows = dict(plan().rows(config))

    assert rows["examples"] == "1,437 (public, declared)"
    assert rows["sample rate"] == "0.0111343 (Poisson)"
    assert rows["expected batch"] == "16 examples"
    assert rows["steps"] == "4"
    assert rows["noise multiplier"] == "1"
    assert rows["delta"] == "0.0001"
    assert rows["parameters"] == "78,650"
    assert "MiB on cpu" in rows["microbatch"]
    assert "NOT to be released as private" in rows["random streams"]
    unseeded = dict(plan().rows(small_config({"train.seed": None})))
    assert unseeded["random streams"] == "from the operating system"


def test_the_epsilon_shown_is_not_below_the_bound() -> None:
    made = plan()
    exact = made.epsilon.upper
    shown = float(dict(made.rows(small_config()))["epsilon (upper bound)"])

    assert exact <= shown < exact + 1e-4
    nudged = dataclasses.replace(made, epsilon=EpsilonBound(1, 1, 1.00001))
    assert dict(nudged.rows(small_config()))["epsilon (upper bound)"] == "1.0001"


def test_no_noise_is_said_to_guarantee_nothing() -> None:
    made = plan({"privacy.noise_multiplier": 0})
    rows = dict(made.rows(small_config()))

    assert made.epsilon.upper == math.inf
    assert rows["epsilon (upper bound)"] == "infinite: NO privacy guarantee"


def test_the_sample_rate_follows_from_the_declared_size() -> None:
    mechanism = build_mechanism(small_config(), 2000, PRVAccountant())

    assert mechanism.sample_rate == 16 / 2000
    assert mechanism.expected_batch_size == 16


def test_all_faults_of_the_guarantee_are_told_at_once() -> None:
    config = small_config({"privacy.delta": 0.05, "privacy.expected_batch_size": 30})

    with pytest.raises(ConfigError) as caught:
        build_mechanism(config, 20, PRVAccountant())
    assert str(caught.value).splitlines() == [
        "privacy.delta=0.05: must be below 1/num_examples (5.0e-02); lower delta",
        "privacy.expected_batch_size=30.0: the sample rate would pass 1: "
        "must be at most 20 examples; lower it",
    ]


def test_delta_just_below_and_a_batch_of_all_are_allowed() -> None:
    config = small_config({"privacy.delta": 0.049, "privacy.expected_batch_size": 20})

    assert build_mechanism(config, 20, PRVAccountant()).sample_rate == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"noise_multiplier": 1e9, "noise": "secure"},
            r"privacy\.noise_multiplier=1000000000\.0: secure noise for [\d,]+ "
            r"parameters must be at most about \d\S*; lower it, or "
            r"take privacy\.noise=standard",
        ),
        (
            {"clipping_norm": 1e300, "rescale_to_unit_norm": False},
            r"privacy\.clipping_norm=1e\+300: the noise's standard deviation of "
            r"1e\+300 must be at most 2\*\*120; set privacy\.rescale_to_unit_norm",
        ),
        (
            {"noise_multiplier": 1e300, "noise": "secure"},
            r"privacy\.noise_multiplier=1e\+300: .* at most 2\*\*120; lower it",
        ),
    ],
)
def test_noise_that_no_number_holds_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    bound = EpsilonBound(1.0, 1.0, 1.0)
    monkeypatch.setattr(PRVAccountant, "epsilon", lambda *_: bound)
    settings = {f"privacy.{name}": value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=told):
        make_plan(small_config({**settings, "train.seed": None}), DIGITS)


def test_noise_as_large_as_its_numbers_hold_is_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound = EpsilonBound(1.0, 1.0, 1.0)
    monkeypatch.setattr(PRVAccountant, "epsilon", lambda *_: bound)
    largest = 2.0**46 / 2.0**16 / 2 / math.sqrt(plan().num_parameters)
    for changes in (
        {"noise_multiplier": largest, "noise": "secure"},
        {"clipping_norm": 2.0**120, "rescale_to_unit_norm": False},
        {"clipping_norm": 1e300, "rescale_to_unit_norm": True},
    ):
        settings = {f"privacy.{name}": value for name, value in changes.items()}
        made = make_plan(small_config({**settings, "train.seed": None}), DIGITS)
        assert made.mechanism.noise_std <= 2.0**120


def test_a_plan_says_what_takes_the_passes_and_refuses_what_cannot() -> None:
    made = plan()
    assert (made.engine, made.execution) == ("ghost", "eager")
    compiled = plan({"runtime.execution": "compile"})
    assert (compiled.engine, compiled.execution) == ("vmap", "compile")
    with pytest.raises(ConfigError, match=r"runtime\.execution=cuda_graph: needs a"):
        plan({"runtime.execution": "cuda_graph"})


def test_a_microbatch_that_does_not_fit_names_the_largest_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = plan().memory
    available = memory.total(37) + memory.per_example // 2
    monkeypatch.setattr("dpsgd.planning._memory_of", lambda device: available)

    assert plan({"runtime.microbatch_size": 37}).microbatch_size == 37
    with pytest.raises(ConfigError, match="the largest that fits is about 37"):
        plan({"runtime.microbatch_size": 38})


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"privacy.expected_batch_size": 16}, 16),
        ({"privacy.expected_batch_size": 20}, 16),
        ({"privacy.expected_batch_size": 0.5}, 1),
        ({"privacy.expected_batch_size": 1000}, 256),
        (
            {
                "privacy.expected_batch_size": 1000,
                "data.augmentation_multiplicity": 16,
            },
            16,
        ),
    ],
)
def test_auto_takes_a_power_of_two_from_public_facts(
    changes: dict[str, Any], size: int
) -> None:
    assert plan(changes).microbatch_size == size


def test_auto_stays_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"privacy.expected_batch_size": 1000}
    memory = plan().memory
    available = int(memory.total(20) / 0.6)
    monkeypatch.setattr("dpsgd.planning._memory_of", lambda device: available)

    made = plan(changes)
    assert made.microbatch_size == 16
    assert made.memory.total(made.microbatch_size) <= available
