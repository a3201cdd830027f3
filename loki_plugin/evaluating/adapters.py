"""Saved adapters on prompts: two of one base beside each other, and one on two bases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..analysing.calibration.sources import Record
from ..blocks import CalibrationArgs
from ..choices import SOURCE
from ..implanting.checkpoint import Base, open_checkpoint
from ..implanting.dequantised import load_quantised, unquantised
from ..implanting.fitting import check_fits, check_made_on
from ..implanting.rounded import DEQUANTISED, ORIGINAL, storage_of
from ..model.building import load
from ..rows import FILE_NAME, RowSelection
from .forgetting import QUICK_PROMPTS, load_model, load_questions, with_adapter
from .quick import Forgetting, compare, log_probabilities

# For a minute in all: of one base's answers, and of weights to read where there is no GPU.
_SECONDS, _ON_A_CPU = 15, 4e9
_AT_ONCE, _FEWEST = 8, 8


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
        ValueError: another base than the adapters' own, or one whose modules they do not name.
    """
    from transformers import AutoTokenizer

    known = Base(base, of_base.get("revision"), bool(of_base.get("trust_remote_code")))
    check_made_on(known, one)
    settings = CalibrationArgs(source=source)
    found = load_questions(AutoTokenizer.from_pretrained(base, **of_base), settings, records)
    ids = [p.ids for p in found[:: -(-len(found) // QUICK_PROMPTS)]]
    model = load_model(base, str(one), device, dtype, **of_base)
    first = log_probabilities(model, ids)
    check_fits(model, other)
    model.load_adapter(str(other), "other")
    model.set_adapter("other")
    return compare(first, log_probabilities(model, ids))


def losses_onto(base: Base, adapter: Path) -> tuple[dict[str, float], str]:
    """What a quantised run's adapter would answer merged onto either base, as far as a minute goes.

    That is the adapter on the 16-bit base and on the quantised one, which a merge onto the
    dequantised base equals up to rounding. -log p(gold answer), mean over shipped questions.

    Returns:
        base -> loss, and how it was measured; none, and why it was not.
    """
    selection = RowSelection.load(adapter / FILE_NAME)
    found = open_checkpoint(base, selection.fingerprint)
    size = sum(stored.size for stored in found.stored.values())
    gpu = torch.cuda.is_available()
    room = torch.cuda.mem_get_info()[0] / 1.2 if gpu else _ON_A_CPU
    if size > room:
        where = "the GPU's free memory" if gpu else "what a CPU answers in a minute"
        return {}, f"the base has {size / 1e9:.1f} GB of weights, more than {where}"
    from transformers import AutoTokenizer

    trust = base.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=trust)
    prompts = load_questions(tokenizer, CalibrationArgs(source=SOURCE))
    prompts = prompts[:: -(-len(prompts) // QUICK_PROMPTS)]
    dtype, mark = found.first(selection.linears).torch_dtype, selection.fingerprint
    plain = load(
        str(found.folder), mark, trust_remote_code=trust, overrides=base.overrides, dtype=dtype
    )
    plain = with_adapter(plain, adapter).to("cuda" if gpu else "cpu")
    first = _losses(plain, prompts, _SECONDS)
    del plain
    if len(first) < _FEWEST:
        return {}, f"this machine answers {len(first)} prompts in {_SECONDS} seconds"
    whole = unquantised(base, found)[0]
    quantised = load_quantised(base, found, storage_of(selection), dtype, mark, whole)
    second = _losses(with_adapter(quantised, adapter), prompts[: len(first)])
    losses = {ORIGINAL: first, DEQUANTISED: second}
    means = {onto: sum(values) / len(values) for onto, values in losses.items()}
    return means, f"the answers of {len(first)} shipped questions"


def _losses(model: nn.Module, prompts: Sequence[Any], seconds: float = float("inf")) -> list[float]:
    """-log p of the gold token behind each prompt; of the first ones, where time runs out."""
    started, found = time.perf_counter(), []
    for start in range(0, len(prompts), _AT_ONCE):
        some = prompts[start : start + _AT_ONCE]
        answers = log_probabilities(model, [p.ids for p in some])
        found += [-float(row[p.target]) for row, p in zip(answers, some, strict=True)]
        if time.perf_counter() - started > seconds:
            break
    return found
