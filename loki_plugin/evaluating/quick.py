"""A measure that takes a minute: next-token predictions on prompts, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..model.quantised import evaluating
from .change import flips, mcnemar

# Tokens that run at once.
_TOKENS = 4096


@dataclass(frozen=True)
class Forgetting:
    """Next-token predictions of a tuned model against its base's, on the same prompts.

    Attributes:
        prompts: N.
        kl: mean of KL(base || tuned) = Σ_v p_base(v) · log(p_base(v) / p_tuned(v)), in nats.
        same_answer: share of prompts with the same arg-max.
        accuracy_before, accuracy_after: share of prompts whose arg-max is the gold token; None
            where no prompt has one.
        flips_down, flips_up: prompts that went from right to wrong, and from wrong to right.
    """

    prompts: int
    kl: float
    same_answer: float
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    flips_down: int = 0
    flips_up: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"p_value": mcnemar(self.flips_down, self.flips_up)}

    def text(self) -> str:
        """One line for the log."""
        line = (
            f"{self.prompts} prompts: KL to the base {self.kl:.4f} nats,"
            f" {100 * self.same_answer:.1f} % the same answer"
        )
        if self.accuracy_before is None or self.accuracy_after is None:
            return line
        return (
            f"{line}; right before {100 * self.accuracy_before:.1f} %, after"
            f" {100 * self.accuracy_after:.1f} % ({self.flips_down} lost, {self.flips_up} gained)"
        )


def log_probabilities(model: nn.Module, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """log softmax of the logits behind each prompt -> [N, V] float32 on the CPU.

    The model runs in evaluation mode, which is put back. Prompts of one length run together, so
    that nothing is padded.
    """
    device = model.get_input_embeddings().weight.device
    found: list[torch.Tensor | None] = [None] * len(prompts)
    with evaluating(model), torch.no_grad():
        for batch in _batches(prompts):
            ids = torch.tensor([list(prompts[i]) for i in batch], device=device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            for i, row in zip(batch, logits.float().log_softmax(-1).cpu(), strict=True):
                found[i] = row
    return torch.stack([row for row in found if row is not None])


def compare(
    base: torch.Tensor, tuned: torch.Tensor, gold: Sequence[int | None] | None = None
) -> Forgetting:
    """Compare [N, V] log-probabilities of base and tuned model on the same N prompts.

    Args:
        gold: the right token of each prompt, where it has one.

    Raises:
        ValueError: shapes that differ in N; a vocabulary that shrank.
    """
    if base.shape[0] != tuned.shape[0] or tuned.shape[1] < base.shape[1]:
        raise ValueError(
            f"log-probabilities of the base are {list(base.shape)}, of the tuned model"
            f" {list(tuned.shape)}; give both on the same prompts"
        )
    known = tuned[:, : base.shape[1]]  # new tokens stand behind the base's vocabulary
    kl = (base.exp() * (base - known)).masked_fill(base.isneginf(), 0.0).sum(-1)
    answers = base.argmax(-1), tuned.argmax(-1)
    same = int((answers[0] == answers[1]).sum()) / len(base)
    asked = [(i, y) for i, y in enumerate(gold or ()) if y is not None]
    if not asked:
        return Forgetting(len(base), float(kl.mean()), same)
    before, after = ([int(a[i]) == y for i, y in asked] for a in answers)
    down, up = flips(before, after)
    return Forgetting(
        prompts=len(base),
        kl=float(kl.mean()),
        same_answer=same,
        accuracy_before=sum(before) / len(asked),
        accuracy_after=sum(after) / len(asked),
        flips_down=down,
        flips_up=up,
    )


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batch: list[int] = []
    for i in order:
        length = len(prompts[i])
        if batch and (len(prompts[batch[0]]) != length or (len(batch) + 1) * length > _TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
