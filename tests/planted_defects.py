"""Defects that have voided guarantees elsewhere, planted one by one into our code.

    python tests/planted_defects.py            # what each detector says of each defect
    python tests/planted_defects.py --write    # the same, into docs/audit.md

They are of the noise, the clipped sum and the steps, in a file each, `defects_of_*.py`.
A defect replaces one function of the training path while it is planted, in this process
and in those that a detector starts. Of several ranks, two defects are planted where
ranks meet the noise, in its scale and in its counters, and one process plays both; four
are planted into two real ranks.
"""

import argparse
import re
import sys

import defects_of_noise
import defects_of_steps
import defects_of_sums
import detectors
import torch
from detectors import DETECTORS, Caught
from planting import Defect, Patch
from small_runs import ROOT, remembering

DOCUMENT = ROOT / "docs" / "audit.md"
_TABLE = re.compile(r"(?<=<!-- defects -->\n).*?(?=<!-- end -->)", re.DOTALL)
DEFECTS: dict[str, Defect] = {
    **defects_of_noise.DEFECTS,
    **defects_of_sums.DEFECTS,
    **defects_of_steps.DEFECTS,
}


def told_by(name: str, planted: Defect | None) -> tuple[bool, str]:
    """Whether a detector catches a defect, and what it measured."""
    with Patch.context() as patch, remembering():
        if planted is not None:
            planted.plant(patch)
            patch.setattr(detectors, "plant_in_ranks", planted.plant)
        try:
            return False, DETECTORS[name]()
        except Caught as caught:
            return True, str(caught)


def rows_of_table() -> list[tuple[str, str, str]]:
    """One row for each defect and each detector that catches it, among all of them."""
    rows = []
    for planted in DEFECTS.values():
        found = {name: told_by(name, planted) for name in DETECTORS}
        caught = [(name, told) for name, (yes, told) in found.items() if yes]
        for number, (name, told) in enumerate(caught or [("nothing", "missed")]):
            rows.append(("" if number else planted.name, f"`{name}`", told))
    return rows


def main() -> int:
    """Prints the table, and writes it into the document if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="update docs/audit.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of_table()
    head = ["| planted defect | caught by | what it says |", "|--|--|--|"]
    text = "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
    print(text)
    if arguments.write:
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(_TABLE.sub(lambda _: text, document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
