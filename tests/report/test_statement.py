import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import (
    NO_MECHANISM,
    NON_PRIVATE_RUN,
    PARQUET,
    PLAN,
    WITHOUT_PRIVACY,
    evaluation,
    result,
    write_run,
)

from dpsgd.privacy import ACCOUNTANTS
from dpsgd.report.runs import RunRecord, read_run
from dpsgd.report.statement import Statement, joint_epsilon, statement_of


def run_of(folder: Path, **changes: Any) -> RunRecord:
    return read_run(write_run(folder, **changes))


def statement(folder: Path, **changes: Any) -> Statement:
    return statement_of(run_of(folder, **changes))


def text_of(stated: Statement) -> str:
    rows = [" ".join(row) for row in (*stated.facts, *stated.not_covered)]
    return "\n".join([stated.headline, *stated.paragraphs, *rows])


def test_a_private_run_states_all_that_a_model_card_needs(tmp_path: Path) -> None:
    views = {"data.augmentation_multiplicity": 16}
    stated = statement(tmp_path / "run", settings=views, report=result())

    assert stated.standing == "private"
    assert stated.headline == "(2.9999, 1e-05)-differential privacy per example"
    facts = dict(stated.facts)
    assert "one training example" in facts["Unit of privacy"]
    assert "all 16 augmented views" in facts["Unit of privacy"]
    assert "up to twice the epsilon" in facts["Neighbours"]
    assert facts["Epsilon"] == "2.9999 (certified upper bound)"
    assert facts["Delta"] == "1e-05"
    assert facts["Accountant"].startswith("prv: ")
    assert facts["Noise"].startswith("standard: ")
    assert "Poisson: each step takes each example" in facts["Sampling"]
    assert "standard Gaussian noise of 1.25 times" in facts["Mechanism"]
    assert facts["Training set"] == "1,437 examples, as declared"
    assert facts["Steps"] == "4 of 4"
    # exp(2.9999) = 20.0835 is an upper bound, and is rounded as one.
    assert "at most exp(2.9999), about 20.09, apart" in stated.paragraphs[0]
    uncovered = {what for what, _ in stated.not_covered}
    assert {"The test set", "Times", "checkpoints/"} <= uncovered


@pytest.mark.parametrize("name", [*ACCOUNTANTS])
def test_every_accountant_is_named_with_its_source(tmp_path: Path, name: str) -> None:
    facts = dict(statement(tmp_path / "run", plan={**PLAN, "accountant": name}).facts)

    assert re.match(rf"{name}: .+ \(.+ \d{{4}}\)$", facts["Accountant"])


def test_a_run_whose_unit_is_the_user_speaks_of_users(tmp_path: Path) -> None:
    settings = {
        **PARQUET,
        "data.augmentation_multiplicity": 16,
        "data.user_column": "who",
        "data.num_users": 120,
        "data.num_examples": None,
        "privacy.unit": "user",
        "privacy.max_examples_per_user": 4,
    }
    plan = {**PLAN, "unit": "user", "num_users": 120}
    report = result(unit="user", num_users=120)
    folder = write_run(tmp_path / "run", settings=settings, plan=plan, report=report)
    stated = statement_of(read_run(folder))

    assert stated.headline == "(2.9999, 1e-05)-differential privacy per user"
    assert "one more user than the other, with all examples" in stated.paragraphs[0]
    facts = dict(stated.facts)
    assert "one user, with all its training examples" in facts["Unit of privacy"]
    assert "all 16 augmented views of each" in facts["Unit of privacy"]
    assert "differ by one user" in facts["Neighbours"]
    assert "takes each user independently" in facts["Sampling"]
    assert "at most 4 of its examples" in facts["Sampling"]
    assert "per user and summed" in facts["Mechanism"]
    assert facts["Training set"] == "120 users, as declared"
    assert "whether one user was trained on" in facts["Against attacks"]
    assert "two names of one person" in dict(stated.not_covered)["Correlated users"]
    assert "one example" not in text_of(stated)


def test_secure_noise_is_named_and_not_said_to_be_float32(tmp_path: Path) -> None:
    plan = {**PLAN, "noise": "secure"}
    stated = statement(tmp_path / "run", plan=plan, report=result(noise="secure"))

    facts, uncovered = dict(stated.facts), dict(stated.not_covered)
    assert facts["Noise"].startswith("secure: drawn from the operating system")
    assert "secure Gaussian noise of 1.25 times" in facts["Mechanism"]
    assert "Floating point" not in uncovered
    assert "not cryptographic" in uncovered["Randomness"]
    assert "key of the noise" not in uncovered["checkpoints/"]


def test_a_run_of_before_unit_and_noise_were_a_choice_had_the_only_ones(
    tmp_path: Path,
) -> None:
    report = result()
    del report["unit"], report["noise"]
    folder = write_run(tmp_path / "run", plan=None, report=report)
    lines = (folder / "config.yaml").read_text().splitlines()
    kept = [one for one in lines if one.split(":")[0] not in ("  unit", "  noise")]
    assert len(kept) == len(lines) - 2
    (folder / "config.yaml").write_text("\n".join(kept))
    stated = statement_of(read_run(folder))

    assert stated.headline.endswith("privacy per example")
    assert dict(stated.facts)["Noise"].startswith("standard: ")


@pytest.mark.parametrize("epsilon", [1e-3, 0.5, 1.0, 3.0, 8.0, 50.0, 800.0])
def test_no_figure_is_rounded_down(tmp_path: Path, epsilon: float) -> None:
    stated = statement(tmp_path / "run", report=result(epsilon=epsilon))
    shown = re.search(r"of at most ([\d.]+) %", dict(stated.facts)["Against attacks"])
    factor = re.search(r"about ([\d.,e+]+),", stated.paragraphs[0])

    assert shown is not None
    assert factor is not None
    # The largest true positive rate at 1 % false positives (Kairouz et al. 2015).
    power = min(math.exp(min(epsilon, 99)) * 0.01 + 1e-5, 1)
    power = min(power, 1 - math.exp(-epsilon) * (1 - 1e-5 - 0.01))
    assert power <= float(shown[1]) / 100 <= power + 1e-4
    if epsilon < 10:
        assert float(factor[1].replace(",", "")) >= math.exp(epsilon)


def test_without_noise_there_is_no_guarantee_and_nothing_else_is_said(
    tmp_path: Path,
) -> None:
    noiseless = result(epsilon=None, noise_multiplier=0.0)
    stated = statement(tmp_path / "run", report=noiseless)

    assert stated.standing == "none"
    assert "summed; no noise is added; divided by" in dict(stated.facts)["Mechanism"]
    assert stated.headline == "NO privacy guarantee"
    assert stated.not_covered == ()
    assert "Epsilon" not in dict(stated.facts)
    assert "differential" not in text_of(stated)


def test_an_unfinished_run_without_noise_has_none_either(tmp_path: Path) -> None:
    noiseless = {"plan": {**PLAN, "epsilon": None}, "lines": []}

    assert statement(tmp_path / "run", **noiseless).standing == "none"


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_without_privacy_says_what_it_did_instead(
    tmp_path: Path, is_finished: bool
) -> None:
    unfinished = {} if is_finished else {"report": None}
    stated = statement(tmp_path / "run", **{**NON_PRIVATE_RUN, **unfinished})
    facts = dict(stated.facts)

    assert (stated.standing, stated.headline) == ("none", "NO privacy guarantee")
    assert facts["Sampling"] == "batches of 16, every epoch in a new order"
    assert facts["Mechanism"] == "none: gradients are neither clipped nor noised"
    assert facts["Training set"] == "1,437 examples, as declared"
    assert "not recorded" not in text_of(stated)


def test_a_seeded_run_is_not_called_private(tmp_path: Path) -> None:
    stated = statement(
        tmp_path / "run", settings={"train.seed": 7}, report=result(seeded=True)
    )

    assert stated.standing == "seeded"
    assert "Not to be released" in stated.headline
    assert "train.seed=7" in stated.paragraphs[0]
    assert "do not know the seed" in dict(stated.facts)["Epsilon"]
    assert "Released" not in dict(stated.facts)
    stopped = statement(
        tmp_path / "stopped", settings={"train.seed": 7}, lines=[evaluation(2)]
    )
    assert dict(stopped.facts)["Epsilon"].startswith("2.9999 (certified upper bound),")


def test_an_unfinished_run_states_what_it_will_be_and_has_spent(tmp_path: Path) -> None:
    stated = statement(tmp_path / "run", lines=[evaluation(2)])

    assert stated.standing == "unfinished"
    assert "will be (2.9999, 1e-05)-differentially private per" in stated.paragraphs[0]
    assert "1.4998 was spent at the last evaluation, step 2." in stated.paragraphs[0]
    assert dict(stated.facts)["Steps"] == "2 of 4"
    names = ["step-00000003.safetensors"]
    saved = statement(tmp_path / "saved", lines=[evaluation(2)], checkpoints=names)
    assert dict(saved.facts)["Steps"] == "3 of 4, evaluated at 2"
    early = statement(tmp_path / "early", lines=[])
    assert "recorded with the first evaluation" in early.paragraphs[0]


def test_what_was_not_recorded_is_not_made_up(tmp_path: Path) -> None:
    stated = statement(tmp_path / "run", plan=None, lines=[])

    assert stated.standing == "unknown"
    assert "No guarantee is recorded" in stated.headline
    assert "exp(" not in text_of(stated)


def test_a_sentence_whose_number_is_missing_says_so(tmp_path: Path) -> None:
    plan = {"epsilon": 2.9999, "delta": 1e-5}
    settings = {"privacy.noise_multiplier": None, "privacy.target_epsilon": 3.0}
    lines = [evaluation(2)]
    stated = statement(tmp_path / "run", settings=settings, plan=plan, lines=lines)
    facts = dict(stated.facts)

    assert "training sets (of which kind is not recorded)." in stated.paragraphs[1]
    assert "noise whose multiplier is not recorded; divided by" in facts["Mechanism"]
    assert facts["Training set"] == "not recorded"


def test_data_of_earlier_training_are_not_covered(tmp_path: Path) -> None:
    settings = {"model.init_from": "weights.npz"}
    tuned = statement(tmp_path / "tuned", settings=settings, report=result())
    fresh = statement(tmp_path / "fresh", report=result())

    why = dict(tuned.not_covered)["The weights it started from"]
    assert why == "the data that they were trained on count as public"
    assert "The weights it started from" not in dict(fresh.not_covered)


def test_an_adjacency_of_another_kind_is_named_as_it_is(tmp_path: Path) -> None:
    stated = statement(tmp_path / "run", report=result(adjacency="replace-one"))

    assert "(replace-one)" in stated.paragraphs[0]
    assert dict(stated.facts)["Neighbours"] == "replace-one"
    assert dict(stated.facts)["Unit of privacy"] == "not recorded"


def test_unprotected_values_are_warned_of(tmp_path: Path) -> None:
    lines = [{"step": 1, "unprotected": {"train_loss": 1.0}}, evaluation(4)]
    stated = statement(tmp_path / "run", lines=lines, report=result())

    assert "must not be published" in dict(stated.not_covered)["metrics.jsonl"]


def test_runs_on_the_same_data_add_up(tmp_path: Path) -> None:
    finished = run_of(tmp_path / "finished", report=result(epsilon=1.0))
    unfinished = run_of(tmp_path / "unfinished", lines=[evaluation(2)])
    unknown = run_of(tmp_path / "unknown", plan=None, lines=[])
    noiseless = run_of(tmp_path / "noiseless", report=result(epsilon=None))

    assert joint_epsilon([finished, unfinished]) == pytest.approx((3.9999, 2e-5))
    assert joint_epsilon([finished, unknown]) is None
    of_users = run_of(tmp_path / "users", report=result(unit="user"))
    assert joint_epsilon([of_users, of_users]) == pytest.approx((5.9998, 2e-5))
    assert joint_epsilon([finished, of_users]) is None
    assert joint_epsilon([finished, noiseless]) == (math.inf, 2e-5)
    without = run_of(
        tmp_path / "without", settings=WITHOUT_PRIVACY, report=result(**NO_MECHANISM)
    )
    for others in ([], [finished], [unknown], [finished, of_users]):
        joint = joint_epsilon([*others, without])
        assert joint is not None
        assert joint[0] == math.inf
