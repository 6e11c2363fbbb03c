"""What every account says of many settings, and whether they agree.

    python benchmarks/accountants.py --save benchmarks/results/accountants.json

writes the table and, beside it, what it comes to in words. `faults` says what must
hold of a row and `disorder` what must hold between rows; the tests ask both of the
committed table, and compute some of its rows again; `overview` is what
docs/accounting.md quotes. Seconds are of one core.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from dpsgd.privacy import (
    Phase,
    PLDAccountant,
    PRVAccountant,
    RDPAccountant,
    estimate_epsilon,
)
from dpsgd.privacy.bounds import DIRECTIONS, Composition, gaussian_epsilon
from dpsgd.privacy.estimator import contour_epsilon
from dpsgd.privacy.gdp import gdp_epsilon
from dpsgd.privacy.lattice import lattice_epsilon
from dpsgd.privacy.peer import peer_distribution, peer_interval, peer_rdp

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

Row = dict[str, Any]

RATES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0)
NOISES = (0.3, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0)
STEPS = (1, 10, 100, 1000, 10_000, 100_000)
DELTAS = (1e-5, 1e-6, 1e-8, 1e-10)
# Lines in all four directions go through these (rate, noise, steps, delta).
CENTRES = [(0.01, 1.0, 1000, 1e-5), (0.1, 3.0, 100, 1e-8), (1e-4, 0.7, 10_000, 1e-10)]
CORNERS = [
    (1e-6, 0.3, 1, 1e-10),
    (1e-6, 0.3, 100_000, 1e-10),
    (1e-6, 1.0, 100_000, 1e-8),
    (1e-5, 100.0, 100_000, 1e-10),
    (0.5, 0.3, 1, 1e-10),
    (0.5, 100.0, 100_000, 1e-10),
    (0.5, 3.0, 100_000, 1e-5),
    (0.2, 1.0, 500, 1e-10),
]
CIFAR, IMAGENET = 50_000, 1_281_167
PUBLISHED = [
    (4096 / CIFAR, 10.0, 875, 1e-5),
    (4096 / CIFAR, 6.0, 1125, 1e-5),
    (4096 / CIFAR, 5.0, 1593, 1e-5),
    (4096 / CIFAR, 4.0, 1687, 1e-5),
    (4096 / CIFAR, 3.0, 1843, 1e-5),
    (4096 / CIFAR, 3.0, 2468, 1e-5),
    (16_384 / CIFAR, 40.0, 906, 1e-5),
    (16_384 / CIFAR, 9.4, 2000, 1e-5),
    (16_384 / CIFAR, 21.1, 250, 1e-5),
    (16_384 / IMAGENET, 2.5, 71_589, 8e-7),
    (256 / 60_000, 1.1, 14_062, 1e-5),
]
PHASES = [
    ([(4096 / CIFAR, 4.0, 800), (2048 / CIFAR, 2.0, 600)], 1e-5),
    ([(0.01, 0.8, 100), (0.01, 1.2, 500), (0.01, 2.0, 1000)], 1e-6),
    ([(1e-4, 0.6, 1000), (1e-3, 1.0, 100)], 1e-8),
    ([(0.2, 5.0, 50), (1.0, 10.0, 4)], 1e-5),
    ([(0.5, 30.0, 100), (0.1, 100.0, 10_000), (0.01, 3.0, 10)], 1e-10),
    ([(1.0, 20.0, 16), (1.0, 5.0, 1)], 1e-8),
]
# A rate of steps x 1e-15 of delta is about what dp-accounting loses to rounding.
PEER_ROUNDING, TRUSTED = 1e-15, 2e-4
STATED_ERROR = 1e-6  # of the estimate where contours settle, and of rounding
LATTICE_ERROR = 3e-4  # of the lattice that stands in elsewhere, over that of pld
PEER_ERROR = 2e-3  # of what dp-accounting, with its rounding, says to be the largest
SHOWN = ("numpy", "scipy", "prv-accountant", "dp-accounting")  # of the versions
MAX_SECONDS, MAX_MEGABYTES = 10.0, 2048.0


def settings() -> list[tuple[list[Phase], float]]:
    """Returns the runs of the table, each once."""
    single = [*CENTRES, *CORNERS, *PUBLISHED]
    for rate, noise, steps, delta in CENTRES:
        single += [(q, noise, steps, delta) for q in RATES]
        single += [(rate, sigma, steps, delta) for sigma in NOISES]
        single += [(rate, noise, count, delta) for count in STEPS]
        single += [(rate, noise, steps, value) for value in DELTAS]
    runs = [([Phase(q, sigma, n)], delta) for q, sigma, n, delta in sorted({*single})]
    return runs + [([Phase(*p) for p in phases], delta) for phases, delta in PHASES]


def ours(phases: Sequence[Phase], delta: float) -> Row:
    """Asks our accounts, as a run would that has asked nothing before."""
    row: Row = {
        "phases": [[p.sample_rate, p.noise_multiplier, p.num_steps] for p in phases],
        "delta": delta,
    }
    bound, seconds = timed(lambda: PRVAccountant().epsilon(phases, delta))
    row["prv"] = {"lower": bound.lower, "upper": bound.upper, "seconds": seconds}
    bound, seconds = timed(lambda: PLDAccountant().epsilon(phases, delta))
    row["pld"] = {"upper": bound.upper, "seconds": seconds}
    for direction in DIRECTIONS:
        composition = Composition.of(phases)
        row["pld"][direction] = lattice_epsilon(composition, delta, direction)
    row["estimate"], row["estimate_seconds"] = timed(
        lambda: estimate_epsilon(phases, delta)
    )
    # Elsewhere the estimate is a lattice bound, coarser than that of pld.
    row["settled"] = contour_epsilon(phases, delta) is not None
    row["rdp"] = RDPAccountant().epsilon(phases, delta).upper
    row["gdp"] = gdp_epsilon(phases, delta)
    # The most that this process ever held: an upper bound for the row.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["peak_megabytes"] = peak / 1024
    return row


def theirs(phases: Sequence[Phase], delta: float) -> Row:
    """Asks dp-accounting, in both directions and from both sides."""
    interval = peer_interval(phases, delta)
    row: Row = {"interval": interval}
    for side in ("optimistic", "pessimistic"):
        distribution = peer_distribution(
            phases, interval, pessimistic=side == "pessimistic"
        )
        # The package composes both directions, and answers for the larger only.
        for direction in DIRECTIONS:
            losses = getattr(distribution, f"_pmf_{direction}")
            try:
                answer = float(losses.get_epsilon_for_delta(delta))
            except OverflowError:  # exp(-loss) of a loss below -709
                answer = None
            row[f"{side}_{direction}"] = answer
    row["rdp"] = peer_rdp(phases, delta)
    return row


def timed(ask: Callable[[], Any]) -> tuple[Any, float]:
    """Returns an answer, and the seconds of this process that it took.

    What comes near the limit is asked again, and the less counts: another process on
    the same core can make an answer slower, and nothing makes it faster.
    """
    seconds = math.inf
    for _ in range(2):
        started = time.process_time()
        answer = ask()
        seconds = min(seconds, time.process_time() - started)
        if seconds < MAX_SECONDS / 2:
            break
    return answer, seconds


def phases_of(row: Row) -> list[Phase]:
    """Returns the run of a row."""
    return [Phase(*phase) for phase in row["phases"]]


def trusted(row: Row) -> bool:
    """Tells whether dp-accounting answers, and can resolve the delta of a row."""
    steps = sum(phase.num_steps for phase in phases_of(row))
    resolved = steps * PEER_ROUNDING / row["delta"] < TRUSTED
    return resolved and None not in row["peer"].values()


def faults(row: Row) -> list[str]:
    """Returns what does not hold of a row and should, in words."""
    prv, pld, peer, estimate = row["prv"], row["pld"], row["peer"], row["estimate"]
    sound = {
        "the certificate encloses the estimate": prv["lower"]
        <= estimate * (1 + STATED_ERROR),
        "no bound is below the estimate": min(prv["upper"], pld["upper"], row["rdp"])
        >= estimate * (1 if row["settled"] else 1 - LATTICE_ERROR),
        "no bound is looser than Renyi's": max(prv["upper"], pld["upper"])
        <= min(row["rdp"], peer["rdp"]) * (1 + STATED_ERROR),
        "our Renyi bound is not looser than theirs": row["rdp"]
        <= peer["rdp"] * (1 + STATED_ERROR),
        "answers take less than ten seconds": max(prv["seconds"], pld["seconds"])
        < MAX_SECONDS,
        "answers take less than 2 GB": row["peak_megabytes"] < MAX_MEGABYTES,
    }
    if trusted(row):
        optimistic = max(peer["optimistic_remove"], peer["optimistic_add"])
        pessimistic = max(peer["pessimistic_remove"], peer["pessimistic_add"])
        sound |= {
            "no bound is below the optimist": min(prv["upper"], pld["upper"])
            >= optimistic * (1 - STATED_ERROR),
            "the estimate is not below the optimist": estimate
            >= optimistic * (1 - STATED_ERROR),
            "the estimate is not above the pessimist": estimate
            <= pessimistic * (1 + PEER_ERROR),
        }
        for direction in DIRECTIONS:
            sound[f"{direction} is not below the optimist"] = pld[direction] >= peer[
                f"optimistic_{direction}"
            ] * (1 - STATED_ERROR)
    if all(phase.sample_rate == 1 for phase in phases_of(row)):
        mu = Composition.of(phases_of(row)).unamplified_mu
        exact = gaussian_epsilon(mu, row["delta"])
        sound |= {
            "full batches are the Gaussian mechanism": abs(estimate - exact)
            <= 1e-8 * exact,
            "and certified so": exact <= prv["upper"] <= exact * (1 + 1e-8),
        }
    return [
        f"{name_of(row)}: not so: {claim}"
        for claim, holds in sound.items()
        if not holds
    ]


def disorder(rows: Sequence[Row]) -> list[str]:
    """Returns pairs of runs of which the one that reveals more is said to reveal less.

    A run reveals more with a higher rate, more steps, less noise, a smaller delta.
    """
    found = []
    for low, high in permutations([r for r in rows if len(r["phases"]) == 1], 2):
        (q, sigma, steps), delta = low["phases"][0], low["delta"]
        (q2, sigma2, steps2), delta2 = high["phases"][0], high["delta"]
        if not (q <= q2 and sigma >= sigma2 and steps <= steps2 and delta >= delta2):
            continue
        for account, value in _figures(low).items():
            if value > _figures(high)[account]:
                found.append(f"{account}: {name_of(low)} above {name_of(high)}")
    return found


def _figures(row: Row) -> dict[str, float]:
    """Returns what must rise with what a run reveals."""
    return {
        "prv": row["prv"]["upper"],
        "pld": row["pld"]["upper"],
        "rdp": row["rdp"],
        "estimate": row["estimate"],
        "gdp": row["gdp"],
    }


def name_of(row: Row) -> str:
    """Returns a run in words."""
    phases = " + ".join(f"{n} x ({q:g}, {sigma:g})" for q, sigma, n in row["phases"])
    return f"{phases} at {row['delta']:g}"


def excess(row: Row, value: float) -> float:
    """Returns how far a figure is above the estimate, relatively."""
    return value / row["estimate"] - 1


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Returns how far the accounts agree, over all rows."""
    settled = [row for row in rows if row["settled"]]
    gdp = [excess(row, row["gdp"]) for row in rows]
    rdp = [excess(row, row["rdp"]) for row in rows]
    return {
        "settings": len(rows),
        "settings where contours settle": len(settled),
        "settings dp-accounting can resolve": sum(map(trusted, rows)),
        "least pld / estimate - 1 where they do not": min(
            excess(row, row["pld"]["upper"]) for row in rows
        ),
        "least rdp / estimate - 1": min(rdp),
        "largest rdp / estimate - 1": max(rdp),
        "gdp below the estimate": sum(x < -1e-9 for x in gdp),
        "least gdp / estimate - 1": min(gdp),
        "addition above removal": sum(
            row["pld"]["add"] > row["pld"]["remove"] * (1 + LATTICE_ERROR)
            for row in rows
        ),
        "estimates above 0.2 s": sum(row["estimate_seconds"] > 0.2 for row in rows),
        "most megabytes": max(row["peak_megabytes"] for row in rows),
    }


def overview(rows: Sequence[Row]) -> list[str]:
    """Returns the table of docs/accounting.md: what the rows come to."""
    settled = [row for row in rows if row["settled"]]
    elsewhere = [row for row in rows if not row["settled"]]
    peers = [row for row in settled if trusted(row)]
    shares = {
        f"`dp-accounting`, pessimistic, from the estimate ({len(peers)} runs)": [
            abs(excess(row, max(row["peer"][f"pessimistic_{d}"] for d in DIRECTIONS)))
            for row in peers
        ],
        f"`prv` above the estimate ({len(settled)} runs)": [
            excess(row, row["prv"]["upper"]) for row in settled
        ],
        f"`pld` above the estimate ({len(settled)} runs)": [
            excess(row, row["pld"]["upper"]) for row in settled
        ],
        f"`prv` above `pld` elsewhere ({len(elsewhere)} runs)": [
            row["prv"]["upper"] / row["pld"]["upper"] - 1 for row in elsewhere
        ],
    }
    seconds = {
        f"seconds, `prv` ({len(rows)} runs)": [row["prv"]["seconds"] for row in rows],
        f"seconds, `pld` ({len(rows)} runs)": [row["pld"]["seconds"] for row in rows],
        f"seconds, estimate where contours settle ({len(settled)} runs)": [
            row["estimate_seconds"] for row in settled
        ],
        f"seconds, estimate elsewhere ({len(elsewhere)} runs)": [
            row["estimate_seconds"] for row in elsewhere
        ],
    }
    lines = ["| one core | largest | median |", "|--|--:|--:|"]
    for name, values in (shares | seconds).items():
        middle = statistics.median(values)
        lines.append(f"| {name} | {max(values):.2g} | {middle:.2g} |")
    return lines


def markdown(rows: Sequence[Row], facts: Row) -> str:
    """Returns the summary and the whole table for reading."""
    lines = ["# What every account says", ""]
    lines += [f"* {name}: {value:.4g}" for name, value in summary(rows).items()]
    lines += ["", *overview(rows), ""]
    versions = {name: facts["versions"][name] for name in SHOWN}
    told = {name: facts[name] for name in ("processor", "python")} | versions
    lines += [", ".join(f"{name} {value}" for name, value in told.items()), ""]
    lines += [
        "`steps x (rate, noise multiplier)`. estimate, prv, pld and rdp are ours, of "
        "which the last three are upper bounds; then what dp-accounting brackets; gdp "
        "is an approximation. `~`: no contour settles, the estimate is a bound coarser "
        "than pld. `?`: dp-accounting overflows, or loses more than 2e-4 of this delta "
        "to rounding.",
        "",
        "| run | delta | estimate | prv | pld | rdp | optimistic | pessimistic | gdp |",
        "|--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        run = " + ".join(f"{n:,} x ({q:g}, {s:g})" for q, s, n in row["phases"])
        peer = [
            max(row["peer"][f"{side}_{d}"] or 0.0 for d in DIRECTIONS)
            for side in ("optimistic", "pessimistic")
        ]
        mine = [row["estimate"], row["prv"]["upper"], row["pld"]["upper"], row["rdp"]]
        cells = [f"{value:.6g}" for value in (*mine, *peer, row["gdp"])]
        cells[0] += "" if row["settled"] else " ~"
        doubt = "" if trusted(row) else " ?"
        lines.append(f"| {run} | {row['delta']:g}{doubt} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="JSON file; .md is written beside it")
    arguments = parser.parse_args()
    runs = settings()
    # Ours first, so that the most memory held is ours.
    rows = [ours(phases, delta) for phases, delta in runs]
    for row, (phases, delta) in zip(rows, runs, strict=True):
        row["peer"] = theirs(phases, delta)
    facts = machine.facts("scipy", "dp-accounting")
    if arguments.save:
        text = json.dumps({**facts, "rows": rows}, indent=1, allow_nan=False)
        arguments.save.write_text(text + "\n")
        arguments.save.with_suffix(".md").write_text(markdown(rows, facts))
    print(markdown(rows, facts))
    for fault in [*(f for row in rows for f in faults(row)), *disorder(rows)]:
        print(fault)


if __name__ == "__main__":
    main()
