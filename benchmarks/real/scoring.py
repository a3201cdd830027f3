"""What a model makes of given sequences: log-probabilities, right or wrong, KL to the base.

Logits are made only where a target stands: the head is a quarter of SmolLM2 and two thirds of
Gemma.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils.rnn import pad_sequence

from loki_plugin.protecting.anchor import adapter_off

# Tokens that run at once, and positions whose logits are held at once.
_TOKENS, _POSITIONS = 1024, 256
_ON_CARDS = 8  # times as many
_AT_ONCE = 32  # answers
_PREFIX = 8  # tokens that all sequences of a batch begin with, from which on they run once


class Asked(NamedTuple):
    """Token ids, and the index of the first that is a target; all behind it are targets too."""

    ids: list[int]
    first: int

    @property
    def targets(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True)
class Scored:
    """Of N sequences, in their order, on the CPU.

    Attributes:
        log_p: [N] sum of the targets' log-probabilities.
        count: [N] number of targets.
        whole: [N] whether greedy decoding gives all targets.
        first: [N] whether it gives the first.
        kl: [N] sum over the targets of KL(base || this model); None without a reference.
        hidden: N tensors [targets, H] that the head reads; None unless kept.
    """

    log_p: torch.Tensor
    count: torch.Tensor
    whole: torch.Tensor
    first: torch.Tensor
    kl: torch.Tensor | None = None
    hidden: list[torch.Tensor] | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a target."""
        return float(-self.log_p.sum() / self.count.sum())

    @property
    def mean_kl(self) -> float:
        """Mean KL of a target, in nats."""
        assert self.kl is not None
        return float(self.kl.sum() / self.count.sum())


@dataclass(frozen=True)
class Reference:
    """What the base's head reads at the same targets: its log-probabilities in little memory.

    Attributes:
        hidden: N tensors [targets, H].
        head: the base's head [V, H].
    """

    hidden: list[torch.Tensor]
    head: torch.Tensor


def inner(model: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_head(model: nn.Module) -> None:
    """Check that logits are what the head alone makes of the last hidden state.

    Raises:
        ValueError: the model scales or caps its logits, or its head has a bias.
    """
    config = model.config
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_scale", None):
        raise ValueError(f"'{config.model_type}' changes its logits behind the head; not supported")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(f"the head of '{config.model_type}' has a bias; not supported")


def hidden_at(
    model: nn.Module, part: Sequence[Asked], cache=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the head reads [n, H], the ids to predict [n]) at all targets, in order.

    `cache` has the keys and values of what stands before all sequences.
    """
    lm = inner(model)
    device = lm.get_input_embeddings().weight.device
    # Padding stands on the right, after every real token, where causal attention never looks.
    ids = pad_sequence([torch.tensor(a.ids) for a in part], batch_first=True).to(device)
    rows = [r for r, a in enumerate(part) for _ in range(a.targets)]
    places = [p - 1 for a in part for p in range(a.first, len(a.ids))]
    more = {} if cache is None else {"past_key_values": cache}
    state = lm.get_decoder()(input_ids=ids, use_cache=cache is not None, **more).last_hidden_state
    wanted = torch.tensor([i for a in part for i in a.ids[a.first :]], device=device)
    return state[rows, places], wanted


def _after_prefix(model: nn.Module, part: Sequence[Asked]) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden_at` without gradients: what all sequences begin with runs once."""
    shared = _common([a.ids[: a.first - 1] for a in part])
    if len(part) == 1 or shared < _PREFIX:
        return hidden_at(model, part)
    lm = inner(model)
    device = lm.get_input_embeddings().weight.device
    start = torch.tensor([part[0].ids[:shared]], device=device)
    cache = lm.get_decoder()(input_ids=start, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(part))
    return hidden_at(model, [Asked(a.ids[shared:], a.first - shared) for a in part], cache)


def _common(starts: list[list[int]]) -> int:
    """How many ids all lists begin with."""
    together = zip(*starts, strict=False)
    return next((n for n, ids in enumerate(together) if len(set(ids)) > 1), min(map(len, starts)))


def loss_of(model: nn.Module, part: Sequence[Asked]) -> torch.Tensor:
    """Mean cross-entropy of all targets, with a gradient."""
    hidden, wanted = hidden_at(model, part)
    logits = inner(model).get_output_embeddings()(hidden)
    return cross_entropy(logits.float(), wanted)


def divergence_of_rest(model: nn.Module, part: Sequence[Asked]) -> torch.Tensor:
    """KL(base || tuned) at all targets, the target itself left out (arXiv 2605.29498)."""
    with torch.no_grad(), adapter_off(model):
        before, wanted = hidden_at(model, part)
        base = inner(model).get_output_embeddings()(before).float()
    tuned = inner(model).get_output_embeddings()(hidden_at(model, part)[0]).float()
    least = torch.finfo(tuned.dtype).min
    p, q = (x.scatter(-1, wanted[:, None], least).log_softmax(-1) for x in (base, tuned))
    return (p.exp() * (p - q)).sum(-1).mean()


@torch.no_grad()
def score(
    model: nn.Module,
    sequences: Sequence[Asked],
    reference: Reference | None = None,
    keep: bool = False,
    together: Sequence[int] | None = None,
) -> Scored:
    """Score `sequences`, with the KL to a reference of the same sequences.

    Args:
        keep: keep what the head reads.
        together: sizes of groups that begin alike: each runs by itself, its beginning once; not on
            a card.
    """
    n = len(sequences)
    log_p, count = torch.zeros(n), torch.tensor([float(a.targets) for a in sequences])
    whole, first = torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    kl = None if reference is None else torch.zeros(n)
    kept: list[torch.Tensor] = [torch.empty(0)] * n
    head = inner(model).get_output_embeddings()
    many = _ON_CARDS if head.weight.device.type == "cuda" else 1
    with _evaluating(model):
        # A card is quicker with large batches than with beginnings that run once.
        alone = together is None or many > 1
        parts = batches(sequences, many) if alone else _groups(together or ())
        for indices in parts:
            part = [sequences[i] for i in indices]
            hidden, wanted = _after_prefix(model, part)
            owner = torch.tensor([i for i, a in zip(indices, part, strict=True)
                                  for _ in range(a.targets)])  # fmt: skip
            begin = torch.tensor([k == 0 for a in part for k in range(a.targets)])
            base = None
            if reference is not None:
                base = torch.cat([reference.hidden[i] for i in indices]).to(hidden.device)
            for at in torch.arange(len(wanted)).split(many * _POSITIONS):
                logs = head(hidden[at]).float().log_softmax(-1)
                right = (logs.argmax(-1) == wanted[at]).cpu()
                whole[owner[at][~right]] = False
                first[owner[at][~right & begin[at]]] = False
                log_p.index_add_(0, owner[at], logs.gather(1, wanted[at][:, None])[:, 0].cpu())
                if base is not None and reference is not None and kl is not None:
                    was = linear(base[at], reference.head).float().log_softmax(-1)
                    apart = (was.exp() * (was - logs)).sum(-1)
                    kl.index_add_(0, owner[at], apart.cpu())
            if keep:
                pieces = hidden.float().cpu().split([a.targets for a in part])
                for i, piece in zip(indices, pieces, strict=True):
                    kept[i] = piece.clone()
    return Scored(log_p, count, whole, first, kl, kept if keep else None)


def batches(sequences: Sequence[Asked], many: int = 1) -> Iterator[list[int]]:
    """Indices of sequences of like length, at most `many * _TOKENS` tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids)):
        if batch and (len(batch) + 1) * len(sequences[i].ids) > many * _TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    start = 0
    for size in sizes:
        yield list(range(start, start + size))
        start += size


@torch.no_grad()
def answers(model: nn.Module, tokenizer, prompts: Sequence[list[int]], tokens: int) -> list:
    """Greedy answers to prompts, the token that ends one included; at most `tokens` long."""
    lm, end = inner(model), tokenizer.eos_token_id
    device = lm.get_input_embeddings().weight.device
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with _evaluating(model):
        for start in range(0, len(order), _AT_ONCE):
            which = order[start : start + _AT_ONCE]
            width = max(len(prompts[i]) for i in which)
            lacking = [width - len(prompts[i]) for i in which]
            ids = [[end] * k + prompts[i] for k, i in zip(lacking, which, strict=True)]
            mask = [[0] * k + [1] * (width - k) for k in lacking]
            said = lm.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=end,
                eos_token_id=end,
            )[:, width:].tolist()
            for i, new in zip(which, said, strict=True):
                found[i] = new[: new.index(end) + 1] if end in new else new
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
