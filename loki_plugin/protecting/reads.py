"""What low-rank updates were found to read, and what P held there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .solving import Solved

_BEHIND = "behind"


@dataclass(frozen=True)
class Behind:
    """Of the linears `inputs`, which read one input: what P of general text holds there.

    Attributes:
        directions: how many.
        energy: share of what ordinary tokens read that lies in their span.
        capped: whether the number of tokens, not the share that was asked for, decided.
        sink_tokens: tokens whose input is far longer than others.
    """

    inputs: list[str]
    directions: int
    energy: float
    capped: bool
    sink_tokens: int

    @classmethod
    def of(cls, solved: Solved) -> Behind:
        return cls(
            solved.site.names,
            solved.basis.shape[1],
            round(solved.energy, 6),
            solved.capped,
            solved.sinks["tokens"],
        )


@dataclass(frozen=True)
class Reads:
    """What `task_reads` finds.

    Attributes:
        a: A [r, I] of every low-rank update by its linear's name, float32 or wider, on the CPU.
        behind: what P is of, input by input; empty where P is what the model reads through already.
    """

    a: dict[str, torch.Tensor]
    behind: Sequence[Behind]

    def save(self, path: Path) -> None:
        told = {_BEHIND: json.dumps([asdict(b) for b in self.behind])}
        save_file({name: a.clone() for name, a in self.a.items()}, path, told)

    @classmethod
    def load(cls, path: Path) -> Reads:
        """Raises ValueError: the file is damaged."""
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
                behind = json.loads(file.metadata()[_BEHIND])
            return cls(found, [Behind(**b) for b in behind])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is damaged: {error}") from error

    def report(self) -> dict[str, Any]:
        """What `loki_report.json` says of it: lists have an entry per input, in layer order."""
        return {
            "inputs": [b.inputs for b in self.behind],
            "directions": [b.directions for b in self.behind],
            "energy": [b.energy for b in self.behind],
            "capped": sum(b.capped for b in self.behind),
            "sink_tokens": [b.sink_tokens for b in self.behind],
        }
