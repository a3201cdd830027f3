"""Selecting: from scores to the rows that train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation
from fractions import Fraction

import numpy as np
import torch

from ..choices import QUOTA, STRATEGIES, STRATEGY

# Prompts ranked at once: enough for vectors to pay, few enough for little memory.
_BLOCK = 64
# Mean scores break ties between votes. They are added as whole numbers and whole multiples of
# 2^-50, which no order of prompts and no chunking can change; beyond ±2^32 a score counts as that.
_BITS, _LARGEST = 50, 2.0**32


def quota_to_count(quota: int | float | str | Decimal, hidden_size: int) -> int:
    """k = floor(q / 100 · H), in exact arithmetic: 25 % of 896 is 224.

    Raises:
        ValueError: q outside (0, 100], or k = 0.
    """
    try:
        percent = Fraction(Decimal(str(quota)))  # 2.5 means 2.5, not its binary neighbour
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise ValueError(f"quota must be a number of percent, got {quota!r}") from error
    if not 0 < percent <= 100:
        raise ValueError(f"quota is a percentage in (0, 100], got {quota}")
    count = percent * hidden_size // 100
    if count == 0:
        # Rounded up, so that the quota we advise does train a row.
        smallest = Context(prec=4, rounding=ROUND_CEILING).divide(Decimal(100), hidden_size)
        raise ValueError(
            f"quota {quota} % of {hidden_size} rows is no row at all (k = 0); the smallest quota"
            f" that trains one is {smallest}. A quota is in percent: 10 is a tenth of the rows"
        )
    return int(count)


def select_rows(
    scores: torch.Tensor | Iterable[torch.Tensor],
    quota: int | float | str | Decimal = QUOTA,
    strategy: str = STRATEGY,
    *,
    magnitude: bool = False,
    exclude: Sequence[Sequence[Iterable[int]]] | None = None,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Choose the rows that train, from the scores of all calibration prompts.

    For every prompt the k lowest scores vote, and the k rows with the most votes win. Equal scores
    at the limit: the lower index votes. Equal votes: the lower mean score wins, then the lower
    index. The result depends on the set of prompts, not on their order or chunks.

    | strategy | who is ranked against whom |
    |---|---|
    | `layer_balanced` | the rows of one layer; k = floor(q/100 · H) per layer (the paper's LoKI) |
    | `layer_highest` | the same, highest scores first (a control) |
    | `global_lowest`, `global_highest` | all rows of the model; k = floor(q/100 · L·H) in total |
    | `random` | k rows per layer, drawn from `seed`, whatever the scores (a control) |

    The global strategies are the paper's ablations: layers differ in their counts and may be
    empty. Scores of all layers are compared as they are: the authors first scale those of a prompt
    to [0, 1] with one minimum and maximum for all layers, which keeps their order.

    Args:
        scores: [N, L, H], or an iterable of such chunks, read once; memory does not grow with N.
        quota: percent of rows, q.
        magnitude: rank |score| instead of the signed score.
        exclude: selections (L lists of row indices each) whose rows must not be chosen again;
            k stays what it is without them.
        seed: of `random`.

    Returns:
        L sorted LongTensors of row indices.

    Raises:
        ValueError: unknown strategy, a quota without rows, empty, misshapen or non-finite scores,
            exclusions that do not fit or that leave too few rows.
    """
    election = None
    for block in blocks(scores):
        if election is None:
            election = Election(block.shape[1:], quota, strategy, magnitude, exclude)
            if strategy == "random":
                return _random(election.blocked, election.count, seed)
            votes, whole, part = (np.zeros(election.groups, np.int64) for _ in range(3))
        key = election.key(block)
        _add_exactly(key, whole, part)
        votes += election.vote(key).sum(0)
    if election is None:
        raise ValueError("there are no scores to select from")
    chosen = election.winners(votes, whole, part)
    return [torch.from_numpy(m.nonzero()[0]) for m in chosen.reshape(election.shape)]


def rows_without_scores(
    shape: tuple[int, int],
    quota: int | float | str | Decimal,
    strategy: str,
    exclude: Sequence[Sequence[Iterable[int]]] | None = None,
    seed: int = 0,
) -> list[torch.Tensor]:
    """What `select_rows` selects whatever the scores: `random`, or all rows (q = 100).

    Args:
        shape: (L, H).

    Raises:
        ValueError: as `select_rows`, or a selection that needs scores.
    """
    election = Election(shape, quota, strategy, exclude=exclude)
    if strategy == "random":
        return _random(election.blocked, election.count, seed)
    if election.count < election.groups[1]:
        raise ValueError(f"strategy {strategy!r} at a quota of {quota} % needs scores")
    return [torch.arange(shape[1]) for _ in range(shape[0])]


class Election:
    """Who stands against whom for how many places; `groups` are G contests of W rows each.

    Raises:
        ValueError: unknown strategy, a quota without rows, exclusions that do not fit or leave too
            few rows.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        quota: int | float | str | Decimal,
        strategy: str,
        magnitude: bool = False,
        exclude: Sequence[Sequence[Iterable[int]]] | None = None,
    ):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r} is unknown; expected {', '.join(STRATEGIES)}")
        layers, hidden = self.shape = shape
        everywhere = strategy.startswith("global")
        self.groups = (1, layers * hidden) if everywhere else (layers, hidden)
        self.count = quota_to_count(quota, self.groups[1])
        self.blocked = _blocked(exclude or (), layers, hidden).reshape(self.groups)
        _check_room(self.blocked, self.count, everywhere)
        self._highest, self._magnitude = strategy.endswith("highest"), magnitude

    def key(self, block: np.ndarray) -> np.ndarray:
        """Scores [n, L, H] as a new array of keys [n, G, W]: low is good."""
        key = np.abs(block) if self._magnitude else block.copy()
        if self._highest:
            np.negative(key, out=key)
        return key.reshape(len(key), *self.groups)

    def vote(self, key: np.ndarray) -> np.ndarray:
        """Mask [n, G, W] of each prompt's `count` lowest keys; makes blocked keys infinite."""
        key[:, self.blocked] = np.inf
        return _lowest(key, self.count)

    def winners(self, votes: np.ndarray, *sums: np.ndarray) -> np.ndarray:
        """Mask [G, W] of the winners: most votes, then lowest sum (leading part first), index.

        Blocked rows cannot win: one prompt alone has given votes to `count` others.
        """
        chosen = np.zeros(self.groups, bool)
        for mark, *keys in zip(chosen, *sums[::-1], -votes, strict=True):
            mark[np.lexsort(keys)[: self.count]] = True  # stable, so the lower index comes first
        return chosen


def blocks(scores: torch.Tensor | Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    """Scores as small arrays [n, L, H] of float32 (float64 stays), one shape and finite.

    Raises:
        ValueError: a chunk that is not [n, L, H] or differs from the first, or a score that is not
            finite (prompt, layer and row named).
    """
    prompts, shape = 0, None
    for chunk in [scores] if isinstance(scores, torch.Tensor | np.ndarray) else scores:
        chunk = torch.as_tensor(chunk).detach().cpu()
        if chunk.dim() != 3 or 0 in chunk.shape[1:]:
            raise ValueError(f"scores must be [N, L, H], got {list(chunk.shape)}")
        shape = shape or chunk.shape[1:]
        if chunk.shape[1:] != shape:
            raise ValueError(
                f"score chunks differ: [N, {shape[0]}, {shape[1]}] and then {list(chunk.shape)}"
            )
        array = (chunk if chunk.dtype == torch.float64 else chunk.float()).numpy()
        for i in range(0, len(array), _BLOCK):
            block = array[i : i + _BLOCK]
            _check_finite(block, prompts)
            prompts += len(block)
            yield block


def _lowest(key: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` smallest entries along the last axis; on equal ones the lower index."""
    limit = np.partition(key, count - 1, -1)[..., count - 1 : count]
    mask = key <= limit
    for where in np.argwhere(mask.sum(-1) > count):  # equal scores at the limit: rare
        where = tuple(where)
        equal = (key[where] == limit[where]).nonzero()[0]
        mask[where][equal[count - int(mask[where].sum()) :]] = False
    return mask


def _add_exactly(key: np.ndarray, whole: np.ndarray, part: np.ndarray) -> None:
    """Add the keys of a block, [n, ...], to the sum whole + part / 2^50, with 0 <= part < 2^50."""
    rest = key.astype(np.float64)
    if max(-rest.min(), rest.max()) > 0.5:
        units = np.rint(np.clip(rest, -_LARGEST, _LARGEST, out=rest))
        rest -= units
        whole += units.astype(np.int64).sum(0)
    rest *= 2.0**_BITS
    part += np.rint(rest, out=rest).astype(np.int64).sum(0)
    whole += part >> _BITS
    part &= (1 << _BITS) - 1


def _blocked(exclude: Sequence[Sequence[Iterable[int]]], layers: int, hidden: int) -> np.ndarray:
    blocked = np.zeros((layers, hidden), bool)
    for i, selection in enumerate(exclude):
        if len(selection) != layers:
            raise ValueError(
                f"exclusion {i} has {len(selection)} layers, the scores have {layers}; it belongs"
                " to another model"
            )
        for layer, rows in enumerate(selection):
            rows = np.asarray([int(r) for r in rows], np.int64)
            outside = rows[(rows < 0) | (rows >= hidden)]
            if len(outside):
                raise ValueError(
                    f"exclusion {i}, layer {layer}: row {outside[0]} is outside [0, {hidden})"
                )
            blocked[layer, rows] = True
    return blocked


def _check_room(blocked: np.ndarray, count: int, everywhere: bool) -> None:
    for i, row in enumerate(blocked):
        free = int((~row).sum())
        if free < count:
            where = "the model" if everywhere else f"layer {i}"
            raise ValueError(
                f"{where} has only {free} rows left outside the excluded ones, the quota takes"
                f" {count}; lower the quota or exclude less"
            )


def _random(blocked: np.ndarray, count: int, seed: int) -> list[torch.Tensor]:
    rows = []
    for layer, taken in enumerate(blocked):
        # Raw words of PCG64 are the same on every platform and in every numpy version.
        words = np.random.PCG64([seed, layer]).random_raw(len(taken))
        order = np.argsort(words, kind="stable")
        rows.append(torch.from_numpy(np.sort(order[~taken[order]][:count])))
    return rows


def _check_finite(block: np.ndarray, offset: int) -> None:
    if np.isfinite(block).all():
        return
    n, layer, row = np.argwhere(~np.isfinite(block))[0]
    raise ValueError(
        f"the score of prompt {offset + n}, layer {layer}, row {row} is {block[n, layer, row]};"
        " the model overflows on this prompt, load it in bfloat16 or float32"
    )
