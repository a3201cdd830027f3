"""Selecting: from scores to the rows that train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction

import numpy as np
import torch

STRATEGIES = ("layer_balanced", "layer_highest", "global_lowest", "global_highest", "random")
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
        raise ValueError(
            f"quota {quota} % of {hidden_size} rows is no row at all; the smallest quota that"
            f" trains one is {100 / hidden_size:.4g}"
        )
    return int(count)


def select_rows(
    scores: torch.Tensor | Iterable[torch.Tensor],
    quota: int | float | str | Decimal = 10,
    strategy: str = "layer_balanced",
    *,
    magnitude: bool = False,
    exclude: Sequence[Sequence[Iterable[int]]] = (),
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
    | `random` | k rows per layer, drawn from `seed`; the scores are not looked at (a control) |

    The global strategies are the paper's ablations: layers differ in their counts and may be
    empty. (The authors scale scores to [0, 1] first, which keeps their order.)

    Args:
        scores: [N, L, H], or an iterable of such chunks, read once; memory does not grow with N.
        quota: percent of rows.
        magnitude: rank |score| instead of the signed score.
        exclude: selections (L lists of row indices each) whose rows must not be chosen again.
        seed: of `random`.

    Returns:
        L sorted LongTensors of row indices.

    Raises:
        ValueError: unknown strategy, a quota without rows, empty, misshapen or non-finite scores,
            exclusions that do not fit or that leave too few rows.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown; expected {', '.join(STRATEGIES)}")
    everywhere = strategy.startswith("global")
    votes = None
    prompts = count = 0
    for block in _blocks(scores):
        if votes is None:
            layers, hidden = block.shape[1:]
            blocked = _blocked(exclude, layers, hidden)
            count = quota_to_count(quota, layers * hidden if everywhere else hidden)
            groups = (1, layers * hidden) if everywhere else (layers, hidden)
            blocked = blocked.reshape(groups)
            _check_room(blocked, count, everywhere)
            if strategy == "random":
                return _random(blocked, count, seed)
            votes, whole, part = (np.zeros(groups, np.int64) for _ in range(3))
        elif block.shape[1:] != (layers, hidden):
            raise ValueError(
                f"score chunks differ: [N, {layers}, {hidden}] and then {list(block.shape)}"
            )
        _check_finite(block, prompts)
        prompts += len(block)
        key = np.abs(block) if magnitude else block.copy()
        if strategy.endswith("highest"):
            np.negative(key, out=key)
        key = key.reshape(len(key), *groups)
        _add_exactly(key, whole, part)
        key[:, blocked] = np.inf
        votes += _lowest(key, count).sum(0)
    if not prompts:
        raise ValueError("there are no scores to select from")
    votes[blocked] = -1
    chosen = np.zeros(groups, bool)
    for mark, *ranking in zip(chosen, part, whole, -votes, strict=True):
        mark[np.lexsort(ranking)[:count]] = True  # stable, so the lower index comes first
    return [torch.from_numpy(m.nonzero()[0]) for m in chosen.reshape(layers, hidden)]


def _blocks(scores: torch.Tensor | Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    for chunk in [scores] if isinstance(scores, torch.Tensor) else scores:
        if chunk.dim() != 3 or 0 in chunk.shape[1:]:
            raise ValueError(f"scores must be [N, L, H], got {list(chunk.shape)}")
        array = chunk.detach().cpu()
        array = (array if array.dtype == torch.float64 else array.float()).numpy()
        yield from (array[i : i + _BLOCK] for i in range(0, len(array), _BLOCK))


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


def _blocked(exclude, layers: int, hidden: int) -> np.ndarray:
    blocked = np.zeros((layers, hidden), bool)
    for i, selection in enumerate(exclude):
        if len(selection) != layers:
            raise ValueError(
                f"exclusion {i} has {len(selection)} layers, the scores have {layers}; it belongs"
                " to another model"
            )
        for layer, rows in enumerate(selection):
            rows = np.asarray([int(r) for r in rows], np.int64)
            if len(rows) and not 0 <= rows.min() <= rows.max() < hidden:
                raise ValueError(
                    f"exclusion {i}, layer {layer}: row {rows.max()} is outside [0, {hidden})"
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
