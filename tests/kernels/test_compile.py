"""The kernels compile for a GPU that is not here, and fit in its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

H100_SHARED_MEMORY = 232_448  # bytes that one program may have


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the other tests compile kernels for the GPU here"
)
def test_every_kernel_compiles_for_an_h100_and_fits_in_its_shared_memory() -> None:
    pytest.importorskip("triton", reason="there are no kernels without triton")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for_h100.py"))],
        env={name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)

    assert len(found["defined"]) > 5
    assert {name for name, _ in found["compiled"]} == set(found["defined"])
    for name, shared_memory in found["compiled"]:
        assert shared_memory <= H100_SHARED_MEMORY, name
