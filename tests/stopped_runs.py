"""Runs that a signal stops in the middle, and what is left of them."""

import os
from pathlib import Path
from typing import Any

import pytest

import dpsgd.train


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Makes a real signal arrive in the middle of one step."""
    take_step = dpsgd.train.train_step

    def interrupted(run: Any, state: Any) -> Any:
        passes = take_step(run, state)
        if state.step == step:
            os.kill(os.getpid(), number)
        return passes

    monkeypatch.setattr(dpsgd.train, "train_step", interrupted)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their paths inside it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
