"""The curves of a metrics.jsonl as SVG files beside it, drawn as reports draw them.

    python benchmarks/curves.py benchmarks/results/cifar10_wrn16-4_eps8_h100.jsonl

Each file follows the colour scheme of whoever looks at it.
"""

import argparse
from pathlib import Path

from dpsgd.report.drawing import to_svg
from dpsgd.report.figures import accuracy_figure, epsilon_figure
from dpsgd.report.runs import RunRecord, read_evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, nargs="+")
    for path in parser.parse_args().metrics:
        run = RunRecord(
            name=path.stem,
            path=path.parent,
            settings={},
            plan={},
            result={},
            environment={},
            evaluations=read_evaluations(path),
            num_unprotected=0,
        )
        for name, draw in (("accuracy", accuracy_figure), ("epsilon", epsilon_figure)):
            figure = draw([run])
            if figure is not None:
                target = path.with_name(f"{path.stem}_{name}.svg")
                target.write_text(to_svg(figure, name, is_inline=False))
                print(target)


if __name__ == "__main__":
    main()
