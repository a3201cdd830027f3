"""How fast an analysis goes: its bar, and a word early where it will take long for no reason."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# Seconds that an analysis may take on a CPU before another way is proposed.
LIMIT = 60.0
# Seconds of work from which its pace is known.
ENOUGH = 5.0


class Pace:
    """Told of every batch; tells once, from the pace so far, that the whole will take long.

    Args:
        total: prompts in all.
        tell: called once with the seconds that the whole is going to take, if over `LIMIT`.
    """

    def __init__(
        self,
        total: int,
        tell: Callable[[float], None],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._total, self._tell, self._clock = total, tell, clock
        self._started = clock()
        self._done, self._told = 0, False

    def update(self, count: int) -> None:
        """`count` more prompts are done."""
        self._done += count
        elapsed = self._clock() - self._started
        whole = elapsed * self._total / self._done
        if not self._told and elapsed >= ENOUGH and whole > LIMIT:
            self._told = True
            self._tell(whole)


def why_elsewhere(device: torch.device, sharded: bool) -> str | None:
    """Why an analysis on `device` should run elsewhere, or None where nothing speaks for it.

    Args:
        sharded: one rank works for several, because it alone holds the model.
    """
    if device.type != "cpu":
        return None
    if sharded:
        return "the run is sharded, so one rank analyses on the CPU while the others wait"
    if gpu_is_there():
        return "the model is on the CPU, though there is a GPU"
    return None


def gpu_is_there() -> bool:
    return torch.cuda.is_available()


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 4 ms, 0.8 s, 95 s, 12 min, 3.5 h."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 5e-4 else "under 1 ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
