"""What protected inputs take, from the shapes of a model: which linears read what, and how much.

Letters: I inputs, u directions, r the width of an adapter's A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..blocks import ProtectArgs
from ..model.anatomy import Anatomy, in_attention, linear_sizes
from ..model.linears import chosen, chosen_down
from ..protecting.packed import BYTES

# Of the directions of an input, so many hold 99 % of what text reads on a pretrained model.
_MOST = 0.95


@dataclass(frozen=True)
class Reads:
    """One input: its size, and of every targeted linear that reads it (its name, its outputs)."""

    size: int
    linears: tuple[tuple[str, int], ...]


def reads(model: nn.Module, anatomy: Anatomy, targets: str | Sequence[str]) -> list[Reads]:
    """Linears of one parent that take inputs of one size read the same, but for the one that takes
    what the heads found."""
    names = (*chosen_down(anatomy, targets), *chosen(model, anatomy, targets))
    groups: dict[tuple, list[tuple[str, int]]] = {}
    for name in names:
        sizes = linear_sizes(model.get_submodule(name))
        assert sizes is not None
        parent = name.rpartition(".")[0]
        outward = in_attention(name) and sizes[1] == anatomy.hidden_size and _is_last(model, name)
        groups.setdefault((parent, sizes[0], outward), []).append((name, sizes[1]))
    return [Reads(key[1], tuple(linears)) for key, linears in groups.items()]


def _is_last(model: nn.Module, name: str) -> bool:
    parent, _, own = name.rpartition(".")
    linears = [n for n, m in model.get_submodule(parent).named_children() if linear_sizes(m)]
    return len(linears) > 1 and linears[-1] == own


def direction_counts(
    settings: ProtectArgs, sizes: Sequence[int], memory: int
) -> tuple[list[int], float]:
    """At most so many directions of every input, and the bytes of one number of them.

    A share of the energy takes up to `_MOST` of an input, within `memory` bytes; in float32 where
    all of that fits, else soft ones in 8 bits and hard ones in bfloat16.
    """
    if settings.directions is not None:
        return [settings.directions] * len(sizes), 4
    if settings.inputs is None or not sizes:
        return [0] * len(sizes), 4
    squares = sum(size * size for size in sizes)
    small = BYTES if settings.soft else 2
    itemsize = 4 if 4 * squares <= memory else small
    part = min(_MOST, memory / (itemsize * squares))
    return [int(part * size) for size in sizes], itemsize
