"""The settings of a run that decide memory and time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .base import Stored


@dataclass(frozen=True)
class Planned:
    """A run's own settings.

    Attributes:
        stored: how the base is loaded.
        sequences, length: of one micro batch.
        micro_batches: of one optimizer step.
        adapter_dtype: of the trained weights.
        logits: whether the loss makes them; fused losses do not.
    """

    stored: Stored
    sequences: int
    length: int
    micro_batches: int
    checkpointing: bool
    optimizer: str
    adapter_dtype: torch.dtype
    logits: bool = True

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def changes(run: Planned) -> list[tuple[str, dict[str, Any]]]:
    """What would make a run smaller, the cheapest first: the YAML's line, and the fields here."""
    four = replace(run.stored, bits=4)
    known: list[tuple[str, dict[str, Any]]] = [
        ("gradient_checkpointing: true", {"checkpointing": True}),
        ("micro_batch_size: 1", {"sequences": 1}),
        ("peft_autocast_adapter_dtype: false", {"adapter_dtype": run.stored.dtype}),
        ("load_in_4bit: true", {"stored": four}),
    ]
    if "8bit" not in run.optimizer:
        known.insert(1, ("optimizer: adamw_bnb_8bit", {"optimizer": "adamw_bnb_8bit"}))
    shorter = [n for n in (run.length // 2, run.length // 4) if n >= 512]
    known += [(f"sequence_len: {n}", {"length": n}) for n in shorter]
    return [
        (line, fields)
        for line, fields in known
        if any(getattr(run, key) != value for key, value in fields.items())
    ]
