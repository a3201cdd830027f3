"""Leading eigenvectors of second moments, of sizes up to where they fill the memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .directions import SOFTEST

# Bytes for the matrices C of the layers of one pass and for the work on one of them, at least.
BUDGET = 2 << 30
# eigh copies C and works in two more of its size.
EXACT_COPIES = 4
# The subspace iteration holds about this many matrices of the size of its answer besides C.
_BLOCK_COPIES = 5
_FIRST_BLOCK, _ROUNDS = 256, 6
# Of what sinks read: the share that is taken away whole, in at most an eighth of the directions.
_SINK_SHARE, _SINK_PART = 0.999, 8


@dataclass(frozen=True)
class Leading:
    """The leading eigenvectors of a second moment C [I, I].

    Attributes:
        vectors: U [I, u], orthonormal columns, the leading one first.
        values: λ [u], float64.
        energy: the share of tr C that they hold.
    """

    vectors: torch.Tensor
    values: torch.Tensor
    energy: float

    def first(self, count: int) -> Leading:
        """The first `count` of them."""
        if count >= len(self.values):
            return self
        kept = self.values[:count]
        energy = self.energy * float(kept.sum() / self.values.sum())
        return Leading(self.vectors[:, :count], kept, energy)


def budget(device: torch.device) -> int:
    """Bytes for moments and the work on them: half of what a card has free, at least `BUDGET`."""
    if device.type != "cuda":
        return BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    return max(BUDGET, free // 2)


def leading(
    moment: torch.Tensor,
    energy: float | None,
    count: int | None = None,
    most: int | None = None,
) -> Leading:
    """The leading eigenvectors of C [I, I]: as many as hold `energy` of tr C, or `count`.

    Args:
        most: never more than so many, whatever they hold.

    Raises:
        ValueError: C is zero or not finite, or nothing would be left besides the result.
    """
    total = float(moment.diagonal().double().sum())
    if not 0 < total < float("inf"):
        raise ValueError(
            f"the inputs of a linear layer have a second moment of trace {total}; the model"
            " computes zeros, infinities or NaN on the calibration prompts"
        )
    size = len(moment)
    # A block of many columns takes longer than all eigenvectors at once.
    many = count is None and (most is None or most > size // 4)
    room = budget(moment.device) if many else BUDGET
    if EXACT_COPIES * size * size * moment.itemsize <= room:
        values, vectors = torch.linalg.eigh(moment)
        values, vectors = values.flip(0), vectors.flip(1)
    else:
        values, vectors = _iterate(moment, total, energy, count, most)
    shares = values.double().clamp_min(0).cumsum(0) / total
    found = count or _enough(shares, energy)
    if most is not None:
        found = min(found, most, len(values))
    if found >= size:
        raise ValueError(
            f"all {size} directions of a linear layer's inputs are needed to hold"
            f" {100 * (energy or 1):g} % of their energy, which leaves the update nothing to read;"
            " lower the share"
        )
    kept = vectors[:, :found].clone(memory_format=torch.contiguous_format)
    return Leading(kept, values[:found].double().clamp_min(0), float(shares[found - 1]))


def _enough(shares: torch.Tensor, energy: float | None) -> int:
    """How many of the cumulated shares reach `energy`, up to what summing in float64 loses."""
    assert energy is not None  # where no count is given; the caller has seen to it
    return 1 + int((shares < energy * (1 - 1e-12)).sum())


def _iterate(
    moment: torch.Tensor,
    total: float,
    energy: float | None,
    count: int | None,
    most: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenpairs of a matrix too large for `eigh`, by block subspace iteration.

    The block doubles until it holds `energy` of the trace, or `most` columns, with a tenth of it to
    spare: the last columns of a block converge last.

    Raises:
        ValueError: more columns are needed than there is memory for.
    """
    size = len(moment)
    room = max(budget(moment.device) - moment.nbytes, moment.nbytes)
    largest = min(size, room // (_BLOCK_COPIES * size * moment.itemsize))
    if most is not None:  # what memory does not find is not asked for
        most = min(most, int(0.9 * largest))
        largest = min(largest, most + most // 8 + 8)
    generator = torch.Generator().manual_seed(0)
    block = moment.new_empty(size, 0)
    width = min(largest, _FIRST_BLOCK if count is None else 2 * count + 8)
    while True:
        fresh = torch.randn(size, width - block.shape[1], generator=generator)
        block = torch.cat([block, fresh.to(moment)], 1)
        for _ in range(_ROUNDS):
            block = torch.linalg.qr(moment @ block)[0]
        values, inner = torch.linalg.eigh(block.T @ (moment @ block))
        values, inner = values.flip(0), inner.flip(1)
        needed = count or _enough(values.double().cumsum(0) / total, energy)
        needed = needed if most is None else min(needed, most)
        if needed <= 0.9 * width:
            return values, block @ inner
        if width == largest:
            raise ValueError(
                f"more than {int(0.9 * largest)} of the {size} directions of a linear layer's"
                f" inputs are needed, more than can be found in {room / 2**30:.2g} GiB, and the"
                " training would hold them all in memory. Give a number instead of a share"
                " (`protect.directions: 1024`), or lower the share (`protect.inputs`)"
            )
        width = min(largest, 2 * width)


def iterations(size: int, most: int) -> list[int]:
    """Columns of the block in each step of `_iterate`, where `most` directions are found."""
    largest = min(size, most + most // 8 + 8)
    widths, width = [largest], _FIRST_BLOCK
    while width < largest:
        widths.append(width)
        width *= 2
    return [w for w in sorted(widths) for _ in range(_ROUNDS)]


def sink_directions(sinks: torch.Tensor | None, size: int) -> Leading | None:
    """Q [I, s], orthonormal: what sinks read, to 99.9 % of their directions; None: no sinks."""
    if sinks is None:
        return None
    return leading(sinks, _SINK_SHARE, most=max(1, size // _SINK_PART))


def without(moment: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(I - Q Qᵀ) C (I - Q Qᵀ), of C [I, I] and orthonormal Q [I, s]."""
    left = moment - q @ (q.T @ moment)
    return left - (left @ q) @ q.T


def beside(found: Leading, q: torch.Tensor) -> Leading:
    """The same eigenpairs of `without(C, q)`, orthogonal to Q.

    They are by themselves, but for rounding: Q has an eigenvalue near 0 there, and what text uses
    little is mixed with it.
    """
    v = found.vectors
    v = torch.linalg.qr(v - q @ (q.T @ v))[0]  # the leading ones stay, up to their sign
    v -= q @ (q.T @ v)
    return replace(found, vectors=v)


def soften(found: Leading) -> torch.Tensor:
    """V [I, u - 1] with I - V Vᵀ = I - U diag(1 - √(λ_u/λ_i)) Uᵀ.

    The last direction is read as it is, so that it has no column.
    """
    values = found.values
    used = values[:-1].clamp_min(
        torch.finfo(values.dtype).tiny
    )  # text may use none of the last ones
    taken = (1 - (values[-1] / used).sqrt()).clamp(0, SOFTEST)
    return found.vectors[:, :-1] * taken.sqrt().to(found.vectors.dtype)
