"""A dry run on a GPU that is not there.

PyTorch's fake tensors have a shape, a type and a device, but no memory and no values. Tensors that
claim to be on a CUDA device show, on any machine: operations that mix devices (they raise), places
where the host waits for the device, the number of kernels, FLOPs, bytes moved, and the peak of
live memory.

A CPU-only PyTorch lacks the device guard that autograd asks about a tensor's device; `guard.cpp`
supplies one. It has to be loaded before PyTorch, hence the process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARY = "LOKI_FAKE_CUDA"  # names the built guard to the process that runs under it


def build(folder: Path) -> Path:
    """Compile the guard into `folder`; needs g++."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    library = folder / "guard.so"
    include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    link = [f"-L{torch}/lib", "-lc10", f"-Wl,-rpath,{torch}/lib"]
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(HERE / "guard.cpp")]
    subprocess.run([*command, *include, *link, "-o", str(library)], check=True)
    return library


def dry_run(library: Path, what: str, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What `__main__.RUNS[what]` finds for every case, in a process under the guard."""
    result = subprocess.run(
        [sys.executable, "-m", "helpers.fake_cuda", what],
        input=json.dumps(cases),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=HERE.parents[2],
        env=os.environ
        | {
            "LD_PRELOAD": str(library),
            LIBRARY: str(library),
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE.parents[1])]),
        },
    )
    return json.loads(result.stdout.splitlines()[-1])
