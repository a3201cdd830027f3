"""What a figure needs beside it: hardware, versions, the machine's matmul rate, peak memory."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import subprocess
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import torch


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        chip = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers"))
    return f"{chip}; Python {platform.python_version()}, {packages}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run, device: torch.device, repeat: int) -> float:
    """The fastest of `repeat` runs after one warm-up: noise only ever adds time."""
    run()
    best = float("inf")
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(n: int, h: int, i: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of [n, H] x [H, I] products, the shape that the layers multiply, over two seconds.

    Sustained, as what it is compared with: the best of many products would be the machine's luck.
    """
    a = torch.randn(n, h, dtype=dtype, device=device)
    w = torch.randn(i, h, dtype=dtype, device=device)
    torch.nn.functional.linear(a, w)
    synchronize(device)
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 2:
        for _ in range(10):
            torch.nn.functional.linear(a, w)
        synchronize(device)
        count += 10
    return 2 * n * h * i * count / seconds


class PeakMemory:
    """Peak bytes above the start: allocated memory on a GPU, resident memory on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left would hide this one's need
            self._start, self._on = _resident(), True
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self):
        while self._on:
            self.peak = max(self.peak, _resident() - self._start)
            time.sleep(0.005)

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self._on = False
            self._thread.join()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def authors(clone: str, what: str, name: str):
    """A module of the authors' repository, read from a clone; none of it is kept here."""
    source = subprocess.run(
        ["git", "-C", clone, "show", what], check=True, capture_output=True, text=True
    ).stdout
    file = Path(tempfile.mkdtemp()) / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
