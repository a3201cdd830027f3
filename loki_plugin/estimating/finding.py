"""What finding directions takes: passes for the second moments, and their eigenvectors.

Letters: I inputs, u directions, C [I, I] a second moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..choices import TEXT_COUNT, TEXT_TOKENS
from ..protecting.eigen import BUDGET, EXACT_COPIES, iterations
from ..protecting.finding import grouped
from ..protecting.moments import TOKENS

# Of one symmetric eigendecomposition with all vectors: 4/3 I³ to reduce, about 4 I³ to divide and
# conquer, 2 I³ to go back.
_EXACT = 22 / 3
# What the model writes for itself, at most: half of it a user's words and an answer.
OWN_TOKENS = TEXT_COUNT * TEXT_TOKENS * 3 // 2
_WIDE = 4  # bytes of the float32 in which C is summed
_TWICE = 2  # the directions themselves, and those that say what they hold of prompts kept back


@dataclass(frozen=True)
class Finding:
    """What it takes, over all.

    Attributes:
        passes: through the whole model over all texts. Moments that do not fit together are made in
            groups of layers one after another, each with a pass up to its last layer.
        batches: in which the weights are read.
        wide: FLOPs in float32: 2·T·I² for each C, and the eigenvectors.
    """

    passes: float
    batches: float
    wide: float


def finding(
    sizes: Sequence[int],
    counts: Sequence[int],
    tokens: int,
    free: int,
    decompositions: int = _TWICE,
) -> Finding:
    """Of the inputs of these sizes, at most so many directions of each, over `tokens` tokens.

    `free`: bytes of the card beside the weights, half of which the moments may take.
    """
    groups = len(grouped(sizes, _WIDE, _TWICE, max(BUDGET, free // 2)))
    passes = (groups + 1) / 2
    wide = sum(2.0 * tokens * size * size for size in sizes)
    for size, count in zip(sizes, counts, strict=True):
        wide += decompositions * _eigenvectors(size, count, max(BUDGET, free // 2))
    return Finding(passes, passes * -(-tokens // TOKENS), wide)


def _eigenvectors(size: int, count: int, room: int) -> float:
    room = room if count > size // 4 else BUDGET
    if EXACT_COPIES * size * size * _WIDE <= room:
        return _EXACT * size**3
    # Each iteration of the block: C times it, and its QR.
    return sum(2.0 * size * size * w + 4.0 * size * w * w for w in iterations(size, count))
