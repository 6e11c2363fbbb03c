"""`bin/dpsgd-train` whose rank 1 is killed in its third step, the first time.

With `fails` as the first argument it finds an image that does not decode instead.
"""

import os
import signal
import sys
from typing import Any

from rank_processes import without_account

import dpsgd.train
from dpsgd.cli import train
from dpsgd.errors import DataError, fault

TAKE_STEP = dpsgd.train.train_step
FAILS = sys.argv[1:2] == ["fails"]


def dying(run: Any, state: Any) -> Any:
    dies = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.ranks.rank == 1
    if dies and state.step == 2:
        if FAILS:
            raise DataError(
                fault("data.train", "...", "row 3 does not decode", "mend it")
            )
        os.kill(os.getpid(), signal.SIGKILL)
    return TAKE_STEP(run, state)


if __name__ == "__main__":
    dpsgd.train.train_step = dying
    with without_account():
        sys.exit(train.main(sys.argv[2:] if FAILS else None))
