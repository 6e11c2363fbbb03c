"""Lower bounds of audits beside the claims they test, on digits, from fixed seeds.

    python benchmarks/audit.py --save benchmarks/results/audit_NAME.json

Single steps with every example are known Gaussian mechanisms: what an audit shows of
them is what it can show. Whole runs are those of configs/digits.yaml. The picture goes
beside the file, as a PNG.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpsgd.assembly import assemble
from dpsgd.audit import audit, audited_config
from dpsgd.checkpoint import CheckpointStore
from dpsgd.config import load_config
from dpsgd.data import load_datasets
from dpsgd.privacy import Trials
from dpsgd.report import to_json

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits.yaml"
EPSILONS = (1.0, 2.0, 4.0, 8.0)
ONE_STEP = (
    "privacy.expected_batch_size=1437",
    "train.num_steps=1",
    "ema.decay=null",
)
# Name, settings, gradient canaries, image canaries.
SETTINGS: list[tuple[str, tuple[str, ...], int, int]] = [
    ("one step", ONE_STEP, 10_000, 0),
    ("whole run", (), 1_000, 300),
]
BOUNDS = {
    ("one step", "trials"): "one step, trials",
    ("one step", "gradients_if_gaussian"): "one step, guesses if Gaussian",
    ("one step", "gradients"): "one step, guesses",
    ("whole run", "gradients_if_gaussian"): "whole run, gradients if Gaussian",
    ("whole run", "gradients"): "whole run, gradients",
    ("whole run", "images"): "whole run, images",
}
MARKERS = ("o-", "s-", "^-", "s--", "^--", "v:")


def measure(
    name: str, settings: tuple[str, ...], canaries: tuple[int, int], epsilon: float
) -> dict[str, Any]:
    """Audits one run from seed 0."""
    overrides = [*settings, f"privacy.target_epsilon={epsilon}", "train.seed=0"]
    config = audited_config(load_config(CONFIG, overrides), canaries[0])
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), keep=1)
        run, state, plan = assemble(config, store=store)
        result = audit(
            run,
            state,
            load_datasets(config.data),
            num_classes=plan.facts.num_classes,
            num_gradient_canaries=canaries[0],
            num_image_canaries=canaries[1],
            confidence=0.95,
        )
    shown: dict[str, float] = {}
    for kind, found in result.canaries.items():
        shown[kind] = found.epsilon_lower_bound
        shown[f"{kind}_if_gaussian"] = found.epsilon_if_gaussian
    if state.step == 1:
        found = result.canaries["gradients"]
        trials = Trials(
            with_canary=found.scores[found.is_in], without=found.scores[~found.is_in]
        )
        stated = {"delta": result.delta, "confidence": result.confidence}
        shown["trials"] = trials.epsilon_if_gaussian(**stated)
        shown["trials_any_mechanism"] = trials.epsilon_lower_bound(**stated)
    return {
        "setting": name,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "noise_multiplier": run.mechanism.noise_multiplier,
        "num_steps": state.step,
        "shown": shown,
        "is_refuted": result.is_refuted,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws what was shown over what is claimed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 8.5], [0, 8.5], color="#333333", linewidth=1, label="claim")
    for marker, ((name, bound), label) in zip(MARKERS, BOUNDS.items(), strict=True):
        mine = [row for row in rows if row["setting"] == name]
        claimed = [row["epsilon"] for row in mine]
        axes.plot(claimed, [row["shown"][bound] for row in mine], marker, label=label)
    axes.set(
        xlabel="claimed epsilon (upper bound)",
        ylabel="shown epsilon (lower bound, 95 %)",
        xlim=(0, 8.5),
        ylim=(0, 8.5),
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    table = Table("setting", "claimed", "shown by", "at least", "of claim")
    rows = []
    for name, settings, *canaries in SETTINGS:
        for epsilon in EPSILONS:
            row = measure(name, settings, tuple(canaries), epsilon)
            rows.append(row)
            for bound, value in row["shown"].items():
                share = f"{value / row['epsilon']:.0%}"
                claimed = f"{row['epsilon']:.4f}"
                table.add_row(name, claimed, bound, f"{value:.4f}", share)
    Console().print(table)
    if arguments.save:
        facts = {**machine.facts(), "rows": rows}
        arguments.save.write_text(to_json(facts, indent=1) + "\n")
        draw(rows, arguments.save.with_suffix(".png"))


if __name__ == "__main__":
    main()
