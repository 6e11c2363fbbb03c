"""What a run would cost on more GPUs than were measured: a calculation, not a result.

python benchmarks/run_cost.py configs/imagenet_nf-resnet-50_eps8.yaml SCALING.json

SCALING.json is what benchmarks/scaling.py saved of the same network and views, on one
GPU alone and on W ranks, at any batch. From it come v, the views a second of one GPU,
and s, the seconds of a step on W ranks beyond 1/W of its work: sums, gathering,
waiting. With n GPUs, batch B and K views a step is taken to last

    B K / (n v) + s

so that s, the same for any n, weighs more the more GPUs there are. Assumed and not
measured: that s does not grow with n, nor between machines, which are slower to reach;
that data come as fast as they are used; that shares of a draw fill their microbatches.
Evaluation, checkpoints and the start of a run are left out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpsgd.config import Config, load_config
from dpsgd.errors import ConfigError, UserError, fault
from dpsgd.report.drawing import LIGHT, SERIES, new_axes, to_svg

MODES = ["ddp", "fsdp"]


def read_measured(path: Path, config: Config, mode: str) -> tuple[float, float]:
    """Returns (v, s), of one GPU and of the most ranks that were measured.

    Args:
        path: What benchmarks/scaling.py saved.
        config: Settings of the run whose cost is asked for.
        mode: `ddp` or `fsdp`.

    Raises:
        UserError: There is no such file or no such row, or another network or other
            views were measured.
    """
    try:
        saved = json.loads(path.read_text())
        rows, was = saved["rows"], load_config(Path(saved["config"]), saved["set"])
    except (OSError, KeyError, json.JSONDecodeError) as error:
        rule = f"is nothing that benchmarks/scaling.py saved ({error})"
        raise ConfigError(fault("SCALING", path, rule, "measure first")) from error
    if (was.model, shape_of(was)) != (config.model, shape_of(config)):
        rule = "measured another network, image size or number of views"
        raise ConfigError(fault("SCALING", path, rule, "measure those of the run"))
    alone = [row for row in rows if row["parallel"] == "none"]
    several = [row for row in rows if row["parallel"] == mode and row["ranks"] > 1]
    if not alone or not several:
        rule = f"has no row of {mode} on several ranks beside one of none"
        raise ConfigError(fault("SCALING", path, rule, "measure two ranks or more"))
    speed = alone[0]["views_per_second"]
    most = max(several, key=lambda row: row["ranks"])
    views = most["views_per_second"] * most["seconds_per_step"]
    return speed, max(0.0, most["seconds_per_step"] - views / most["ranks"] / speed)


def shape_of(config: Config) -> tuple[Any, ...]:
    """Returns what of the data decides the speed of a view."""
    data = config.data
    return data.image_size, data.augmentation, data.augmentation_multiplicity


def cost(config: Config, ranks: int, *, speed: float, rest: float) -> dict[str, Any]:
    """Returns what all steps take.

    Args:
        config: Settings of the run.
        ranks: GPUs n.
        speed: Views v a second of one GPU, > 0.
        rest: Seconds s of a step that more GPUs do not shorten, >= 0.
    """
    views = config.privacy.expected_batch_size * config.views_per_unit
    work = views / (ranks * speed)
    hours = (work + rest) * config.train.num_steps / 3600
    return {
        "ranks": ranks,
        "seconds_per_step": work + rest,
        "efficiency": work / (work + rest),
        "days": hours / 24,
        "gpu_hours": hours * ranks,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Returns what is shown."""
    table = Table("GPUs", "seconds a step", "efficiency", "days", "GPU hours")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            f"{row['seconds_per_step']:.3g}",
            f"{row['efficiency']:.0%}",
            f"{row['days']:.3g}",
            f"{row['gpu_hours']:,.0f}",
        )
    return table


def draw(
    config: Config, measured: dict[str, tuple[float, float]], most: int, path: Path
) -> None:
    """Draws efficiency over 1, 2, 4, ... GPUs up to `most` as SVG, a line a mode."""
    counts = [2**power for power in range(most.bit_length())]
    with new_axes("Efficiency, %, computed") as axes:
        for (mode, (speed, rest)), role in zip(measured.items(), SERIES, strict=False):
            rows = [cost(config, n, speed=speed, rest=rest) for n in counts]
            shares = [100 * row["efficiency"] for row in rows]
            axes.plot(counts, shares, color=LIGHT[role], label=mode)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xlabel("GPUs")
        axes.set_ylim(0, 105)
        axes.legend()
        path.write_text(to_svg(axes.figure, path.stem, is_inline=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("scaling", type=Path, metavar="SCALING.json")
    parser.add_argument("--mode", choices=MODES, default="ddp")
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 256])
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="of all modes")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config)
        if min(arguments.ranks) < 1:
            rule = "must be at least 1"
            raise ConfigError(fault("--ranks", min(arguments.ranks), rule, "raise it"))
        speed, rest = read_measured(arguments.scaling, config, arguments.mode)
        if arguments.plot:
            measured = {
                mode: read_measured(arguments.scaling, config, mode) for mode in MODES
            }
            draw(config, measured, max(arguments.ranks), arguments.plot)
    except UserError as error:
        parser.error(str(error))
    views = config.privacy.expected_batch_size * config.views_per_unit
    console = Console(width=100)
    console.print(
        f"{config.train.num_steps * views:,.0f} views; measured: {speed:,.0f} views/s "
        f"on one GPU, {rest:.3g} s a step that more GPUs do not shorten"
    )
    rows = [cost(config, n, speed=speed, rest=rest) for n in arguments.ranks]
    console.print(table_of(rows))


if __name__ == "__main__":
    main()
