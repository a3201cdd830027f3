"""How stable is a selection: would other calibration prompts have chosen the same rows?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

from ..choices import QUOTA, STRATEGY
from .select import Election, blocks

# At most one chosen row in twenty may hang on which prompts were drawn.
ENOUGH = 0.95
# The paper's figure: the rows of 57 x 50 prompts against those of all of MMLU (Llama-3.1-8B).
PAPER = 0.9757


@dataclass(frozen=True)
class Stability:
    """Overlaps |A ∩ B| / k of selections, as shares; G groups are the L layers, or 1 (the model).

    Attributes:
        prompts: N.
        chance: the overlap of two random selections, k / W.
        sizes: K ascending numbers of resampled prompts, the last one N.
        overlap: [R, K, G] float64, of the selection from a resample's first `sizes[i]` prompts
            with the selection from all N.
        halves: [R, G] float64, of the selections from two disjoint random halves.
    """

    prompts: int
    chance: float
    sizes: tuple[int, ...]
    overlap: np.ndarray
    halves: np.ndarray

    @property
    def score(self) -> float:
        """Mean overlap at N prompts, the share that unlimited prompts would keep; see `ENOUGH`."""
        return float(self.overlap[:, -1].mean())

    @property
    def per_layer(self) -> np.ndarray:
        """Mean overlap at N prompts, [G]."""
        return self.overlap[:, -1].mean(0)

    @property
    def enough(self) -> bool:
        """Whether `score` reaches `ENOUGH`."""
        return self.score >= ENOUGH

    def text(self) -> str:
        """The figures and the verdict, for the terminal."""
        means = self.overlap.mean((0, 2))
        lines = [f"{'prompts':>8}  overlap with the selection from all {self.prompts}"]
        lines += [f"{n:>8}  {m:7.2%}" for n, m in zip(self.sizes, means, strict=True)]
        lines.append(f"two halves: {self.halves.mean():.2%}; by chance: {self.chance:.2%}")
        if len(self.per_layer) > 1:
            worst = int(self.per_layer.argmin())
            lines.append(f"least stable layer: {worst} with {self.per_layer[worst]:.2%}")
        lines.append(
            f"{'enough' if self.enough else 'NOT enough'}: unlimited prompts of this kind would"
            f" keep about {self.score:.2%} of the rows, {ENOUGH:.0%} is asked for (the paper:"
            f" {PAPER:.2%} between 2850 prompts and all of MMLU)"
        )
        if not self.enough:
            lines.append("calibrate on more prompts: loki.calibration.source, samples_per_subject")
        return "\n".join(lines)


def bootstrap_overlap(
    scores: torch.Tensor | Iterable[torch.Tensor],
    quota: int | float | str | Decimal = QUOTA,
    strategy: str = STRATEGY,
    *,
    magnitude: bool = False,
    exclude: Sequence[Sequence[Iterable[int]]] | None = None,
    prompts: int | None = None,
    rounds: int = 10,
    seed: int = 0,
) -> Stability:
    """Overlap of selections from resampled prompts with the selection from all of them.

    Each of R rounds draws N prompts with replacement and selects from the first N/64, N/32, ...,
    N of them. A resample differs from the N prompts as these differ from all prompts that might
    have been asked, so its overlap estimates how many rows an unlimited calibration would keep
    (on synthetic scores to within 2 points where that is over 70 %, too high below).
    Each round also halves the prompts at random and compares the two selections; these share no
    prompt, but each knows only N/2.

    The scores are read once; memory grows with R, not with N. Votes are counted exactly, mean
    scores (they break ties) in float64.

    Args:
        scores, quota, strategy, magnitude, exclude: as `select_rows` takes them.
        prompts: N; needed only where `scores` has no `shape` to tell it.
        rounds: R.
        seed: of the resamples.

    Raises:
        ValueError: as `select_rows`; also for `random`, which no prompt can change, fewer than 2
            prompts or 1 round, or another number of prompts than announced.
    """
    if strategy == "random":
        raise ValueError("strategy 'random' does not depend on prompts, it has no stability")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if prompts is None:
        if not hasattr(scores, "shape"):
            raise ValueError("scores come in chunks: give their number of prompts, `prompts=N`")
        prompts = scores.shape[0]
    if prompts < 2:
        raise ValueError(f"stability needs at least 2 prompts, got {prompts}")
    sizes = tuple(sorted({-(-prompts // 2**i) for i in range(7)}))
    weights = _weights(prompts, sizes, rounds, seed)
    election: Election | None = None
    seen = 0
    for block in blocks(scores):
        if election is None:
            election = Election(block.shape[1:], quota, strategy, magnitude, exclude)
            votes, sums = (np.zeros((len(weights), *election.groups)) for _ in range(2))
        some = weights[:, seen : seen + len(block)]
        seen += len(block)
        if some.shape[1] < len(block):
            break  # more than announced
        key = election.key(block)
        _add_products(sums, some, key)
        _add_products(votes, some, election.vote(key))
    if election is None or seen != prompts:
        found = f"more than {prompts}" if seen > prompts else seen
        raise ValueError(f"the scores hold {found} prompts, {prompts} were announced")
    everything, *others = (election.winners(v, s) for v, s in zip(votes, sums, strict=True))
    chosen = np.stack(others).reshape(rounds, len(sizes) + 2, *election.groups)
    resampled, one, other = chosen[:, :-2], chosen[:, -2], chosen[:, -1]
    return Stability(
        prompts,
        election.count / election.groups[1],
        sizes,
        (resampled & everything).sum(-1) / election.count,
        (one & other).sum(-1) / election.count,
    )


def plot_stability(stability: Stability, path: str | os.PathLike) -> Path:
    """Draw the overlap by prompts and by layer; the file's ending names its format."""
    from ..picturing.drawing.stability import stability_figure
    from ..picturing.drawing.style import save

    figure = stability_figure(
        stability.sizes,
        stability.overlap.mean(0),
        stability.halves.mean(0),
        stability.chance,
        ENOUGH,
    )
    return save(figure, path)


def _weights(prompts: int, sizes: Sequence[int], rounds: int, seed: int) -> np.ndarray:
    """How often each prompt counts, [1 + R·(K + 2), N].

    The first row is all prompts once; then come, for each round, K resamples and two halves.
    Drawn from raw words of PCG64, which are the same in every numpy version.
    """
    rows = [np.ones(prompts, np.int64)]
    for i in range(rounds):
        source = np.random.PCG64([seed, i])
        drawn = (source.random_raw(prompts) % prompts).astype(np.int64)
        rows += [np.bincount(drawn[:size], minlength=prompts) for size in sizes]
        half = np.zeros(prompts, np.int64)
        half[np.argsort(source.random_raw(prompts))[: prompts // 2]] = 1
        rows += [half, 1 - half]
    return np.stack(rows)


def _add_products(total: np.ndarray, weights: np.ndarray, values: np.ndarray) -> None:
    """Add weights [M, n] times values [n, G, W] to the total [M, G, W]."""
    # Votes are small whole numbers: exact in float32 too, which multiplies twice as fast.
    kind = np.float32 if values.dtype == bool else np.float64
    product = weights.astype(kind) @ values.reshape(len(values), -1).astype(kind)
    total += product.reshape(total.shape)
