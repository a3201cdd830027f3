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
    launcher = subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
    )
    try:
        said, _ = launcher.communicate(timeout=600)
    except subprocess.TimeoutExpired as late:
        launcher.terminate()  # it ends its ranks, which would hold the pipe open
        said, _ = launcher.communicate(timeout=60)
        raise AssertionError(f"two ranks were not through in 600 s:\n{said[-6000:]}") from late
    assert not check or launcher.returncode == 0, said[-6000:]
    return said
