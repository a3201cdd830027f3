"""How large the rounding of a quantised base is beside what a run has learned next to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from tqdm import tqdm

from ..rows import RowSelection
from .adapters import Adapter, Opened, opened
from .checkpoint import Base, Checkpoint, open_checkpoint

ORIGINAL, DEQUANTISED = ONTO = ("original", "dequantised")


@dataclass(frozen=True)
class Advice:
    """Onto which base a quantised run is merged, and why.

    Attributes:
        storage: how the run held its base.
        ratios: per module that trained ‖W - W'‖/‖ΔW‖ over what trained of it, W' = dequantise(
            quantise(W)); modules that the run did not move are left out.
        onto: the base that follows from them.
        losses: per base, the loss on calibration prompts where it was measured.
        asked: how that was measured, or why not.
    """

    storage: str
    ratios: dict[str, float]
    onto: str
    losses: dict[str, float] = field(default_factory=dict)
    asked: str = ""

    def text(self) -> str:
        if not self.ratios:
            return (
                f"the run learned beside a base in {self.storage}; how large its rounding is was"
                f" not measured: {self.asked}"
            )
        values = self.ratios.values()
        middle = median(values)
        lines = [
            f"the run learned beside a base in {self.storage}, whose rounding of what trained is"
            f" {middle:.2g} times the update (median of {len(values)} modules, {min(values):.2g} to"
            f" {max(values):.2g})",
        ]
        if self.losses:
            told = ", ".join(f"{loss:.4f} onto {onto}" for onto, loss in self.losses.items())
            lines.append(f"loss on calibration prompts: {told} ({self.asked})")
        elif self.asked:
            lines.append(f"loss on calibration prompts: not measured: {self.asked}")
        why = (
            "the update is the larger of the two, and the frozen weights are better unrounded"
            if self.onto == ORIGINAL
            else "the update is small beside the rounding that it was learned next to"
        )
        lines.append(f"advice: --onto {self.onto}: {why}; compare both on your own test set")
        return "\n".join(lines)


def is_quantised(selection: RowSelection) -> bool:
    """Whether the rows were made on a bitsandbytes base."""
    return storage_of(selection).startswith("bnb-")


def storage_of(selection: RowSelection) -> str:
    """How the base was held that the rows were made on; empty where they do not say."""
    return (selection.fingerprint or {}).get("quantisation", "")


def advise(base: Base, adapters: Sequence[Adapter], progress: bool = True) -> Advice | None:
    """Compare the rounding of the base with the updates, one module in memory at a time.

    No model is loaded: each weight is quantised by itself, in the checkpoint's dtype. (A run that
    loads the checkpoint in another one has rounded it once more before, by little.)

    Args:
        adapters: each on rows of its own.

    Returns:
        None where they were not all learned on one quantised base, or moved nothing.

    Raises:
        ValueError: as `opened`.
    """
    storages = {storage_of(a.selection) for a in adapters}
    if len(storages) != 1 or not is_quantised(adapters[0].selection):
        return None
    (storage,) = storages
    found = open_checkpoint(base, adapters[0].selection.fingerprint)
    adapters = [Adapter(a.folder, a.selection.check_shape(found.anatomy)) for a in adapters]
    rounding: dict[str, float] = defaultdict(float)
    update: dict[str, float] = defaultdict(float)
    with opened(adapters, found.anatomy.names) as parts:
        trained = [entry for part in parts for entry in _trained(found, part)]
        for name, rows, change in tqdm(trained, desc="loki: rounding", disable=not progress):
            key, dim = found.linear(name)
            weight = found.stored[key].tensor()
            weight = weight.T.contiguous() if dim else weight
            try:
                seen = round_trip(weight, storage)
            except ImportError as error:
                return Advice(storage, {}, "", asked=str(error))
            rounding[name] += float((weight[rows].float() - seen[rows].float()).square().sum())
            update[name] += float(change().square().sum())
    ratios = {n: (rounding[n] / moved) ** 0.5 for n, moved in update.items() if moved}
    if not ratios:
        return None
    return Advice(storage, ratios, ORIGINAL if median(ratios.values()) <= 1 else DEQUANTISED)


def _trained(
    found: Checkpoint, part: Opened
) -> Iterator[tuple[str, torch.Tensor | slice, Callable[[], torch.Tensor]]]:
    """(module, its rows that trained, what gives their update) of an adapter."""
    for i in sorted(part.layers):
        rows = part.selection.rows[i]
        yield found.anatomy.names[i], rows, partial(part.update, i, torch.float32)
    for name in part.selection.linears:
        yield name, slice(None), partial(part.whole, name, torch.float32)


def round_trip(weight: torch.Tensor, storage: str) -> torch.Tensor:
    """dequantise(quantise(W)) of W [out, in], as bitsandbytes holds it under that storage.

    Args:
        storage: as a fingerprint has it: `bnb-nf4-double-64`, `bnb-int8`.

    Raises:
        ImportError: bitsandbytes is not there.
    """
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, *more = storage.removeprefix("bnb-").split("-")
    if kind == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.to(device, torch.float16))
        return (values.float() * (scales[:, None] / 127)).cpu()
    there = weight.to(device, torch.float32 if weight.dtype == torch.float64 else weight.dtype)
    packed, state = functional.quantize_4bit(
        there, blocksize=int(more[-1]), compress_statistics="double" in more, quant_type=kind
    )
    return functional.dequantize_4bit(packed, state).cpu()
