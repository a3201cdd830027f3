"""Directions in 8 bits: little more than half of bfloat16's bytes, on the card and on disk.

    V[i, j] = n · s,  n a whole number from -127 to 127, s a power of 2 for each `BLOCK` inputs

bfloat16 holds each such number exactly, so that everything that folds, proves or saves goes on with
a tensor; only what stays on the card is packed. Directions are rounded to such numbers once, when
they are found: P is then that of the rounded V, everywhere. Leading columns that are no such
numbers stay as they are: the directions of sinks, of which rounding would let too much through, and
the first of all others. These every text reads, and the little that rounding lets through would be
the same for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

BLOCK = 64
WIDE = 16  # one column in so many, the leading ones, is not rounded to 8 bits
BYTES = 2 / WIDE + (1 - 1 / WIDE) * (1 + 2 / BLOCK)  # of a number, with its part of a scale
_LARGEST = 127
_LOWEST = -100  # of log2 s; bfloat16 ends at -126
# Columns that are made whole at once.
PART = 2048
# Rounding moves a column's norm a little; a column that gets too long is rounded again, shorter.
_ROUNDS = 8


@dataclass(frozen=True)
class Packed:
    """V [I, u] of which only `wide` is held as it is.

    Attributes:
        wide: [I, s] bfloat16, its first columns.
        numbers: [I', u - s] int8, I' the next multiple of `BLOCK`.
        scales: [I'/BLOCK, u - s] bfloat16.
    """

    wide: torch.Tensor
    numbers: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.wide), self.wide.shape[1] + self.numbers.shape[1]

    @property
    def nbytes(self) -> int:
        return self.wide.nbytes + self.numbers.nbytes + self.scales.nbytes

    def parts(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """V in groups of columns."""
        if self.wide.shape[1]:
            yield self.wide.to(dtype)
        for begin in range(0, self.numbers.shape[1], PART):
            some = slice(begin, begin + PART)
            blocks = self.numbers[:, some].to(dtype).unflatten(0, (-1, BLOCK))
            blocks *= self.scales[:, some].to(dtype)[:, None]
            yield blocks.flatten(0, 1)[: len(self.wide)]

    def whole(self) -> torch.Tensor:
        """V, bfloat16."""
        return torch.cat(list(self.parts(torch.bfloat16)), 1)


def rounded(v: torch.Tensor, longest: float) -> torch.Tensor:
    """The nearest V [I, u] that packs, bfloat16; squared norms up to `longest` stay so."""
    wide = v.shape[1] // WIDE
    return _within(
        v, longest, lambda v: torch.cat([v[:, :wide].to(torch.bfloat16), _nearest(v[:, wide:])], 1)
    )


def narrowed(v: torch.Tensor, longest: float, dtype: torch.dtype) -> torch.Tensor:
    """V in `dtype`; squared norms up to `longest` stay so."""
    return _within(v, longest, lambda v: v.to(dtype))


def _within(
    v: torch.Tensor, longest: float, once: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    limited, found = v.double().square().sum(0) <= longest * (1 + 1e-5), once(v)
    for n in range(_ROUNDS):
        norms = found.double().square().sum(0)
        long = limited & (norms > longest)
        if not long.any():
            break
        v = v * torch.where(long, longest / norms * (1 - 1e-3 * n), 1).to(v)
        found = once(v)
    return found


def packed(v: torch.Tensor) -> Packed | None:
    """V [I, u] in 8 bits, bit for bit; None where it is not made of such numbers."""
    if v.dtype != torch.bfloat16 or not v.shape[1]:
        return None
    if v not in _PACKED:
        _PACKED[v] = _pack(v)
    return _PACKED[v]


_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _pack(v: torch.Tensor) -> Packed | None:
    other = (_nearest(v) != v).any(0).nonzero()
    wide = int(other[-1]) + 1 if len(other) else 0
    if wide > v.shape[1] // 2:
        return None
    numbers, scales = _split(v[:, wide:])
    return Packed(v[:, :wide].clone(), numbers.flatten(0, 1), scales)


def _nearest(v: torch.Tensor) -> torch.Tensor:
    numbers, scales = _split(v)
    return (numbers.to(torch.bfloat16) * scales[:, None]).flatten(0, 1)[: len(v)]


def _split(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [I'/BLOCK, BLOCK, u] int8 and scales [I'/BLOCK, u] bfloat16."""
    padded = functional.pad(v.float(), (0, 0, 0, -len(v) % BLOCK)).unflatten(0, (-1, BLOCK))
    # The smallest power with |V| <= 127 · 2^power; frexp: x = m · 2^power, 1/2 <= m < 1.
    part, power = torch.frexp(padded.abs().amax(1) / _LARGEST)
    power = (power - (part == 0.5).to(power)).clamp(min=_LOWEST)
    scales = torch.exp2(power.float()).to(torch.bfloat16)  # which also takes away its rounding
    numbers = (padded / scales.float()[:, None]).round()
    return numbers.to(torch.int8), scales
