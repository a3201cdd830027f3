"""Selecting: from scores to the rows that train."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from fractions import Fraction

import torch


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
) -> list[torch.Tensor]:
    """`layer_balanced`, the paper's selection: in each layer the k rows with the most votes.

    For every prompt and layer the k rows with the smallest signed score get a vote (on equal
    scores the lower index). Ties between votes: the lower mean score, then the lower index.

    Args:
        scores: [N, L, H], or an iterable of such chunks, read once; memory does not grow with N.
        quota: percent of rows per layer.

    Returns:
        L sorted LongTensors of k row indices.

    Raises:
        ValueError: unknown strategy, empty or misshapen scores, scores that are not finite.
    """
    if strategy != "layer_balanced":
        raise ValueError(f"strategy {strategy!r} is unknown; expected layer_balanced")
    chunks = [scores] if isinstance(scores, torch.Tensor) else scores
    votes = total = None
    prompts = 0
    for chunk in chunks:
        if chunk.dim() != 3 or 0 in chunk.shape[1:]:
            raise ValueError(f"scores must be [N, L, H], got {list(chunk.shape)}")
        _check_finite(chunk, prompts)
        if votes is None:
            count = quota_to_count(quota, chunk.shape[2])
            votes = torch.zeros(chunk.shape[1:], dtype=torch.long)
            total = torch.zeros(chunk.shape[1:], dtype=torch.float64)
        elif chunk.shape[1:] != votes.shape:
            raise ValueError(
                f"score chunks differ: [N, {', '.join(map(str, votes.shape))}] and then"
                f" {list(chunk.shape)}"
            )
        prompts += len(chunk)
        lowest = torch.sort(chunk, dim=-1, stable=True).indices[..., :count]
        ones = torch.ones_like(lowest[0])
        for each in lowest:
            votes.scatter_add_(1, each, ones)
        total += chunk.double().sum(0)
    if not prompts:
        raise ValueError("there are no scores to select from")
    return [_most_votes(v, t, count) for v, t in zip(votes, total, strict=True)]


def _most_votes(votes: torch.Tensor, total: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.argsort(total, stable=True)  # lower mean first, then lower index
    order = order[votes[order].argsort(descending=True, stable=True)]
    return order[:count].sort().values


def _check_finite(chunk: torch.Tensor, offset: int) -> None:
    bad = ~torch.isfinite(chunk)
    if bad.any():
        n, layer, row = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the score of prompt {offset + n}, layer {layer}, row {row} is"
            f" {float(chunk[n, layer, row])}; the model overflows on this prompt, load it in"
            " bfloat16 or float32"
        )
