"""The curves of a metrics.jsonl as SVG files beside it, drawn as reports draw them.

    python benchmarks/curves.py benchmarks/results/cifar10_wrn16-4_eps1_h100.jsonl

Each file follows the colour scheme of whoever looks at it. Of a run directory, or where
a report.json lies beside the metrics, accuracy by class is drawn as well.
"""

import argparse
import json
from pathlib import Path

from dpsgd.report.drawing import to_svg
from dpsgd.report.figures import (
    accuracy_figure,
    epsilon_figure,
    loss_figure,
    outcomes_figure,
)
from dpsgd.report.runs import RunRecord, read_evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, nargs="+", help="or a run directory")
    for path in parser.parse_args().metrics:
        if path.is_dir():
            path = path / "metrics.jsonl"
        report = path.with_name("report.json")
        run = RunRecord(
            name=path.stem,
            path=path.parent,
            settings={},
            plan={},
            result=json.loads(report.read_text()) if report.is_file() else {},
            environment={},
            evaluations=read_evaluations(path),
            num_unprotected=0,
        )
        figures = {
            "accuracy": accuracy_figure([run]),
            "loss": loss_figure([run]),
            "epsilon": epsilon_figure([run]),
            "classes": outcomes_figure(run.by_class),
        }
        for name, figure in figures.items():
            if figure is not None:
                target = path.with_name(f"{path.stem}_{name}.svg")
                target.write_text(to_svg(figure, name, is_inline=False))
                print(target)


if __name__ == "__main__":
    main()
