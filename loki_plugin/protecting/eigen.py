"""Leading eigenvectors of second moments, of sizes up to where they fill the memory."""

from __future__ import annotations

import torch

from .directions import SOFTEST

# Bytes for the matrices C of the layers of one pass and for the work on one of them.
BUDGET = 2 << 30
# eigh copies C and works in two more of its size.
EXACT_COPIES = 4
# The subspace iteration holds about this many matrices of the size of its answer besides C.
_BLOCK_COPIES = 5
_FIRST_BLOCK, _ROUNDS = 256, 6


def leading(
    moment: torch.Tensor, energy: float | None, count: int | None = None
) -> tuple[torch.Tensor, float]:
    """The leading eigenvectors of a second moment C [I, I], and the share of tr C they hold.

    As many as hold `energy` (one fewer would not), or `count`. The result is [I, u].

    Raises:
        ValueError: C is zero or not finite, or nothing would be left besides the result.
    """
    total = float(moment.diagonal().double().sum())
    if not 0 < total < float("inf"):
        raise ValueError(
            f"the down-projection's inputs have a second moment of trace {total}; the model"
            " computes zeros, infinities or NaN on the calibration prompts"
        )
    size = len(moment)
    if EXACT_COPIES * size * size * moment.itemsize <= BUDGET:
        values, vectors = torch.linalg.eigh(moment)
        values, vectors = values.flip(0), vectors.flip(1)
    else:
        values, vectors = _iterate(moment, total, energy, count)
    shares = values.double().clamp_min(0).cumsum(0) / total
    found = count or _enough(shares, energy)
    if found >= size:
        raise ValueError(
            f"all {size} directions of the down-projection's inputs are needed to hold"
            f" {100 * (energy or 1):g} % of their energy, which leaves the update nothing to read;"
            " lower the share"
        )
    return vectors[:, :found].clone(memory_format=torch.contiguous_format), float(shares[found - 1])


def _enough(shares: torch.Tensor, energy: float | None) -> int:
    """How many of the cumulated shares reach `energy`, up to what summing in float64 loses."""
    assert energy is not None  # where no count is given; `_check_arguments` has seen to it
    return 1 + int((shares < energy * (1 - 1e-12)).sum())


def _iterate(
    moment: torch.Tensor, total: float, energy: float | None, count: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenpairs of a matrix too large for `eigh`, by block subspace iteration.

    The block doubles until it holds `energy` of the trace, with a tenth of it to spare: the last
    columns of a block converge last.

    Raises:
        ValueError: more columns are needed than there is memory for.
    """
    size = len(moment)
    room = max(BUDGET - moment.nbytes, moment.nbytes)
    largest = min(size, room // (_BLOCK_COPIES * size * moment.itemsize))
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
        if needed <= 0.9 * width:
            return values, block @ inner
        if width == largest:
            raise ValueError(
                f"more than {int(0.9 * largest)} of the {size} directions of the down-projection's"
                f" inputs are needed, more than can be found in {BUDGET / 2**30:g} GiB, and the"
                " training would hold them all in memory. Give a number instead of a share"
                " (`protect.directions: 1024`), or lower the share (`protect.inputs`)"
            )
        width = min(largest, 2 * width)


def soften(moment: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """V [I, u - 1] with I - V Vᵀ = I - U diag(1 - √(λ_u/λ_i)) Uᵀ, from C [I, I] and U [I, u].

    The last direction is read as it is, so that it has no column.
    """
    values = (vectors * (moment @ vectors)).double().sum(0).clamp_min(0)  # λ_i = u_iᵀ C u_i
    used = values[:-1].clamp_min(
        torch.finfo(values.dtype).tiny
    )  # text may use none of the last ones
    taken = (1 - (values[-1] / used).sqrt()).clamp(0, SOFTEST)
    return vectors[:, :-1] * taken.sqrt().to(vectors.dtype)
