"""Two saved adapters of one base beside each other, on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..analysing.calibration.sources import Record
from ..args import CalibrationArgs
from .forgetting import QUICK_PROMPTS, load_model, load_questions
from .quick import Forgetting, compare, log_probabilities


def between(
    base: str,
    one: Path,
    other: Path,
    source: str,
    records: list[Record],
    device: str | None = None,
    dtype: str = "auto",
    **of_base: Any,
) -> Forgetting:
    """What `other` answers otherwise than `one`, both loaded by stock PEFT onto one base.

    `kl` is the mean of KL(one || other), in nats. At most `QUICK_PROMPTS` of the records are asked,
    evenly chosen.

    Args:
        source: where the records are from.

    Raises:
        OSError: no such base, or one that cannot be read.
        RuntimeError: the base does not fit into memory.
    """
    from transformers import AutoTokenizer

    settings = CalibrationArgs(source=source)
    found = load_questions(AutoTokenizer.from_pretrained(base, **of_base), settings, records)
    ids = [p.ids for p in found[:: -(-len(found) // QUICK_PROMPTS)]]
    model = load_model(base, str(one), device, dtype, **of_base)
    first = log_probabilities(model, ids)
    model.load_adapter(str(other), "other")
    model.set_adapter("other")
    return compare(first, log_probabilities(model, ids))
