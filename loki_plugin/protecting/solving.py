"""From the moments of one site to its directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .directions import SOFTEST
from .eigen import Leading, beside, leading, sink_directions, soften, without
from .moments import Moments, Site
from .packed import BYTES, narrowed, rounded

# An eigenvector that stands on fewer tokens than this says more about them than about the language.
TOKENS_PER_DIRECTION = 4


@dataclass(frozen=True)
class Wanted:
    """How many directions are asked for, and of which kind.

    Attributes:
        energy: share of tr C; or
        directions: that many of every input.
        soft: weaken what is read of them instead of taking it away.
        memory: bytes that all of them may take; None: no limit. Where a share needs more, every
            input gets the same part of its size.
        dtype: of the result; None: float32, or float64 of a float64 model. int8: bfloat16, rounded
            to what packs into 8 bits (`packed`); those of sinks as they are.
        settles: take fewer directions where there are too few tokens for a share, instead of
            refusing.
    """

    energy: float | None = None
    directions: int | None = None
    soft: bool = False
    memory: int | None = None
    dtype: torch.dtype | None = None
    settles: bool = False

    def check(self, sizes: Sequence[int]) -> None:
        """Raises ValueError: a share or a number out of range for inputs of these sizes."""
        energy, count, smallest = self.energy, self.directions, min(sizes)
        if count is None and not (energy is not None and 0 < energy < 1):
            raise ValueError(
                f"energy = {energy}, expected a share between 0 and 1, such as 0.99; at 1 nothing"
                " would be left for the update to read"
            )
        if count is not None and not 1 <= count < smallest:
            raise ValueError(
                f"directions = {count}, expected a number from 1 to {smallest - 1}: the layers read"
                f" {smallest} inputs, and the update must keep some of them"
            )

    def most(self, sizes: Sequence[int], itemsize: float) -> list[int] | None:
        """The largest number of directions of each input that fits `memory`; None: no limit.

        `itemsize`: bytes of one of their numbers where `dtype` says nothing.
        """
        if self.memory is None or self.directions is not None:
            return None
        if self.dtype is not None:
            itemsize = BYTES if self.dtype == torch.int8 else self.dtype.itemsize
        part = self.memory / (itemsize * sum(size * size for size in sizes))
        return [max(1, min(size - 1, int(part * size))) for size in sizes]


@dataclass(frozen=True)
class Solved:
    """Of one site what `Found` has of all."""

    site: Site
    basis: torch.Tensor
    energy: float
    sinks: dict[str, Any]
    held_out: float
    capped: bool


def solve(
    site: Site,
    moments: Moments,
    before: torch.Tensor | None,
    wanted: Wanted,
    most: int | None,
    tokens: int,
) -> Solved:
    """The directions of one site, from its moments."""
    count, moment = wanted.directions, moments.ordinary
    assert moment is not None
    apart = sink_directions(moments.sinks, site.size)
    if apart and count is not None:
        apart = apart.first(max(1, count - 1))
    taken = apart.vectors.shape[1] if apart else 0
    rest = without(moment, apart.vectors) if apart else moment
    if wanted.settles:
        most = min(most or site.size - 1, tokens // TOKENS_PER_DIRECTION)
    room = None if most is None else max(1, most - taken)
    found = leading(rest, wanted.energy, None if count is None else max(1, count - taken), room)
    if apart:
        found = beside(found, apart.vectors)
    ordinary = len(found.values)
    capped = room is not None and ordinary == room and found.energy < (wanted.energy or 0)
    if not capped:
        _check_tokens(site, ordinary + taken, tokens, wanted)
    small = wanted.dtype == torch.int8
    inside = [soften(found) if wanted.soft else found.vectors]
    dtype = (torch.bfloat16 if small else wanted.dtype) or inside[0].dtype
    if small:
        inside = [rounded(inside[0], SOFTEST)]
    if apart:
        sinks = apart.vectors * (SOFTEST**0.5 if wanted.soft else 1)
        if small:  # rounded up to 1 it would be a hard direction
            sinks = narrowed(sinks, SOFTEST, dtype)
        inside.insert(0, sinks)
    basis = torch.cat([v.to("cpu", dtype) for v in inside], 1)
    whole = moment.diagonal().double().sum()
    left = rest.diagonal().double().sum() * (1 - found.energy)
    return Solved(
        site,
        basis.contiguous(),
        float(1 - left / whole),
        _of_sinks(moments, apart),
        _held_out(before, moment, ordinary) if before is not None else 0.0,
        capped,
    )


def _of_sinks(moments: Moments, apart: Leading | None) -> dict[str, Any]:
    if apart is None:
        return {"tokens": 0, "directions": 0, "energy": None, "longest": None}
    return {
        "tokens": moments.sink_tokens,
        "directions": len(apart.values),
        "energy": round(apart.energy, 6),
        "longest": round(moments.longest, 1),
    }


def _held_out(before: torch.Tensor, moment: torch.Tensor, count: int) -> float:
    """The share of what came after `before` that `before`'s leading directions hold."""
    vectors = leading(before, None, count).vectors
    held = (vectors * (moment @ vectors - before @ vectors)).double().sum()
    return float(held / (moment.diagonal().double() - before.diagonal().double()).sum())


def _check_tokens(site: Site, count: int, tokens: int, wanted: Wanted) -> None:
    needed = TOKENS_PER_DIRECTION * count
    if tokens >= needed:
        return
    what = (
        f"{count} directions"
        if wanted.directions is not None
        else f"the {count} directions that hold {100 * (wanted.energy or 1):g} % of its inputs'"
        " energy"
    )
    raise ValueError(
        f"{site.names[0]}: {what} cannot be told from {tokens} tokens of calibration; about"
        f" {needed} are needed ({TOKENS_PER_DIRECTION} per direction). Give more text"
        " (`protect.text`, or more calibration prompts), or protect less (a lower `protect.inputs`)"
    )
