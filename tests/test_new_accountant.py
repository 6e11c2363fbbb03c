"""A new accountant is a class and an entry in the registry, and all else finds it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from small_runs import dpsgd_train, small_config, write_config

from dpsgd.assembly import plan_of
from dpsgd.cli import privacy
from dpsgd.privacy import ACCOUNTANTS, Accountant, EpsilonBound, Phase, RDPAccountant
from dpsgd.report import read_run
from dpsgd.report.statement import statement_of


class DoublingAccountant(Accountant):
    """Certifies twice what Renyi divergences do, so that its answers are told apart."""

    name: ClassVar[str] = "doubling"
    description: ClassVar[str] = "twice the Renyi bound (Somebody 2026)"

    def epsilon(self, phases: Sequence[Phase], delta: float) -> EpsilonBound:
        bound = RDPAccountant().epsilon(phases, delta)
        return EpsilonBound(bound.lower, bound.estimate, 2 * bound.upper)


@pytest.fixture(autouse=True)
def _is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACCOUNTANTS, DoublingAccountant.name, DoublingAccountant)


def test_a_target_is_calibrated_and_planned_with_it() -> None:
    changes = {
        "privacy.accountant": "doubling",
        "privacy.noise_multiplier": None,
        "privacy.target_epsilon": 3.0,
    }
    config = small_config(changes)
    plan = plan_of(config)

    assert dict(plan.rows(config))["accountant"] == "doubling"
    assert 2.9 < plan.epsilon.upper <= 3.0
    phases, delta = [plan.mechanism.phase()], plan.mechanism.delta
    assert plan.epsilon.upper == 2 * RDPAccountant().epsilon(phases, delta).upper


def test_a_run_states_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = {"privacy.accountant": "doubling", "train.seed": None}
    assert dpsgd_train(write_config(tmp_path, changes), "--run-dir", folder) == 0
    stated = statement_of(read_run(folder))

    told = "doubling: twice the Renyi bound (Somebody 2026)"
    assert dict(stated.facts)["Accountant"] == told


def test_commands_take_it_and_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    setting = "--sample-rate 0.01 --noise-multiplier 1 --num-steps 1 --delta 1e-5"

    def told(line: str) -> str:
        assert privacy.main(line.split()) == 0
        return capsys.readouterr().out

    epsilons = [
        json.loads(told(f"epsilon {setting} --accountant {name} --json"))
        for name in ("rdp", "doubling")
    ]
    assert epsilons[1]["epsilon_upper"] == 2 * epsilons[0]["epsilon_upper"]
    accounts = json.loads(told(f"compare {setting} --json"))["accounts"]
    assert "doubling" in {account["method"] for account in accounts}
    with pytest.raises(SystemExit):
        privacy.main(["epsilon", "--help"])
    assert "prv, pld, rdp or doubling;" in capsys.readouterr().out


def test_a_name_near_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = "epsilon --sample-rate 1 --noise-multiplier 1 --num-steps 1 --delta 1e-5"

    assert privacy.main([*line.split(), "--accountant", "dubling"]) == 2
    told = "accountant=dubling: is not known; did you mean `doubling`?\n"
    assert capsys.readouterr().err == told
