"""Two real ranks on this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def two_ranks(script: Path, *arguments, check: bool = True, **environment) -> str:
    """Run `script` under torchrun with two ranks; returns all that both have said.

    Accelerate trains two CPU ranks as one only where ACCELERATE_USE_CPU is set.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), *(str(a) for a in arguments)]
    path = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        command,
        text=True,
        timeout=600,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done.stdout
