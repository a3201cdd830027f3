"""The anchor: training also pays for what the model now says differently on general text.

    loss + weight · KL(base ‖ tuned),   KL = ½ mean over all tokens + ½ mean over the starts

of a few texts; without a start among them it is the mean over all tokens. A *start* is a token
behind which an answer begins. There a model decides what kind of answer it gives, and it is one
token of a hundred: a mean over all tokens hardly sees it.

The base is the same model with its adapter switched off, so no second model is loaded; what it says
of a text is computed once and kept: its `TOP` likeliest tokens, and all others as one. The KL over
these classes is a lower bound of the whole one. Learning without forgetting (arXiv 1606.09282) with
other texts than the new task's; SA-SFT (arXiv 2602.20162) replays dialogues that the base wrote for
itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainerCallback

from .. import ranks
from ..model.causal import looks_ahead
from ..model.loading import is_sharded
from ..model.quantised import evaluating

TOP = 64  # likeliest tokens of the base that are kept one by one
# Bytes of what the base said that are kept on the host; the oldest goes first, and is asked again.
KEPT = 10**9


@dataclass(frozen=True)
class Said:
    """What the base says behind every token of a text, on the CPU.

    Attributes:
        tokens: [T, K] its likeliest next tokens, int32.
        logs: [T, K + 1] log-probabilities of these, and of all others together.
    """

    tokens: torch.Tensor
    logs: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.logs.nbytes


class Anchor:
    """Adds the anchor to a trainer's loss.

    Attributes:
        prompts: token ids of texts.
        starts: of each text the places of the tokens behind which an answer begins.
        weight: λ in loss + λ·KL.
        batch: texts of one optimizer step on one rank; the first of its micro steps has them all.
        every: steps from one anchor to the next; each then counts that many times.
        last: the latest KL in nats per token, a tensor; None before the first step.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        weight: float,
        batch: int,
        every: int = 1,
        starts: Sequence[Sequence[int]] | None = None,
    ):
        self.prompts, self.weight, self.batch, self.every = list(prompts), weight, batch, every
        self.starts = list(starts or [()] * len(self.prompts))
        self.last: torch.Tensor | None = None
        self._step = -1  # the last one that was begun
        self._said: dict[int, Said] = {}
        self._held = 0  # bytes of it

    def attach(self, trainer: Trainer) -> None:
        """Wrap `trainer.compute_loss`; evaluation stays as it is.

        However many micro steps are accumulated, an optimizer step has one anchor, λ times the KL.
        """
        compute = trainer.compute_loss
        trainer.add_callback(_FromTheStart(self))

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            found = compute(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
            step = trainer.state.global_step
            if not model.training or step % self.every or step == self._step:
                return found
            self._step = step
            loss, *outputs = found if return_outputs else (found,)
            wrapped = trainer.accelerator.unwrap_model(model)
            kl = self.divergence(wrapped, self.draw(step, trainer.args.seed))
            self.last = kl.detach()
            weight = self.weight * self.every * _divided(trainer, num_items_in_batch)
            loss = loss + weight * kl.to(loss.device)
            return (loss, *outputs) if return_outputs else loss

        trainer.compute_loss = compute_loss

    def draw(self, step: int, seed: int) -> list[int]:
        """Which texts a step takes; by its number, so that a run resumes."""
        # The 0 stood for the first micro step, when each had its draw: older runs resume alike.
        chance = random.Random(f"{seed}/{step}/0/{ranks.current()}")
        return chance.sample(range(len(self.prompts)), min(self.batch, len(self.prompts)))

    def divergence(self, model: PeftModel, drawn: Sequence[int]) -> torch.Tensor:
        """KL(base ‖ tuned) in nats of the texts that were drawn: see the top of this file.

        Over the base's `TOP` tokens and the rest as one. The base says each text alone, once: what
        it says does not depend on which texts were drawn together, so that a run resumes. Of a
        sharded model every pass is shared by the ranks, whose draws differ: there each text is
        asked about each time.
        """
        if is_sharded(model):
            self._said, self._held = {}, 0
        asked = [i for i in drawn if i not in self._said]
        with evaluating(model):
            for i in asked:
                self._said[i] = said(model, self.prompts[i])
                self._held += self._said[i].nbytes
            texts, kept = [self.prompts[i] for i in drawn], [self._said[i] for i in drawn]
            tuned = _logits(model, texts)
        while self._held > KEPT:
            self._held -= self._said.pop(next(iter(self._said))).nbytes
        tokens = torch.cat([k.tokens for k in kept]).to(tuned.device, torch.int64)
        logs = torch.cat([k.logs for k in kept]).to(tuned.device, _wide(tuned))
        kl = Lumped.apply(tuned, tokens, logs)
        before = accumulate([0, *map(len, texts)])
        starts = [n + at for n, i in zip(before, drawn, strict=False) for at in self.starts[i]]
        return (kl.mean() + kl[starts].mean()) / 2 if starts else kl.mean()


class Lumped(torch.autograd.Function):
    """KL(base || tuned) in nats [T], over K tokens and all others as one.

    Of logits [T, V], tokens [T, K] and the base's log-probabilities [T, K + 1], as `Said` has them.
    With p of the base and q of the tuned model the gradient by a logit is q_j - p_j for a kept
    token, and q_j (1 - p_rest/q_rest) for any other: one buffer of [T, V] serves both ways, where
    autograd would keep three.
    """

    @staticmethod
    def forward(ctx, logits, tokens, logs):
        q = logits.to(_wide(logits), copy=True)
        q -= q.amax(-1, keepdim=True)
        top = q.gather(-1, tokens)
        total = q.exp_().sum(-1, keepdim=True)
        top -= total.log()
        q.div_(total).scatter_(-1, tokens, 0)
        rest = q.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
        p, ctx.dtype = logs.exp(), logits.dtype
        ctx.save_for_backward(q, tokens, p, top, rest)
        return (p * (logs - torch.cat([top, rest.log()], -1))).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        q, tokens, p, top, rest = ctx.saved_tensors
        grad = grad[:, None]
        q *= grad * (1 - p[:, -1:] / rest)  # in place: a second backward is an error
        q.scatter_(-1, tokens, grad * (top.exp() - p[:, :-1]))
        return q.to(ctx.dtype), None, None


class _FromTheStart(TrainerCallback):
    """A training that begins again in the same process (`auto_find_batch_size`, after an
    out-of-memory) draws what a fresh one draws."""

    def __init__(self, anchor: Anchor):
        self.anchor = anchor

    def on_train_begin(self, args, state, control, **kwargs):
        self.anchor._step = -1


def _divided(trainer: Trainer, num_items_in_batch) -> int:
    """By what the trainer will divide the loss of a micro step."""
    divides = not trainer.model_accepts_loss_kwargs or num_items_in_batch is None
    if divides and trainer.compute_loss_func is None:
        return trainer.current_gradient_accumulation_steps
    return 1


def said(model: PeftModel, text: Sequence[int]) -> Said:
    """What the base of `model`, its adapter off, says behind every token of a text."""
    with torch.no_grad(), adapter_off(model):
        logits = _logits(model, [text])
    logits = logits.to(_wide(logits))
    tokens = logits.topk(min(TOP, logits.shape[-1] - 1)).indices
    return Said(tokens.to("cpu", torch.int32), _lumped(logits, tokens).cpu())


def divergence(model: PeftModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """KL(base ‖ tuned) in nats over the whole vocabulary, mean over all tokens of `prompts`.

    In float32 or wider. The base is `model` with its adapter off and takes no gradient.
    """
    with evaluating(model):
        with torch.no_grad(), adapter_off(model):
            base = _logits(model, prompts)
        tuned = _logits(model, prompts)
    base, tuned = (x.to(_wide(x)).log_softmax(-1) for x in (base, tuned))
    return (base.exp() * (base - tuned)).sum(-1).mean()


def _logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[all real tokens, V]."""
    # Asked first: under FSDP all ranks answer it together, in their first pass. So they do each
    # pass, also where one of them has drawn texts of one length.
    apart = is_sharded(model) or len({len(p) for p in prompts}) > 1
    if looks_ahead(model) and apart and len(prompts) > 1:
        return torch.cat([_logits(model, [p]) for p in prompts])
    device = model.get_input_embeddings().weight.device
    # Padding stands on the right, after every real token, where causal attention never looks.
    ids = nn.utils.rnn.pad_sequence([torch.as_tensor(p) for p in prompts], batch_first=True)
    logits = model(input_ids=ids.to(device), use_cache=False).logits
    # Places, not a mask, whose size the device would have to tell.
    rows = [row for row, p in enumerate(prompts) for _ in p]
    places = [place for p in prompts for place in range(len(p))]
    return logits[tuple(torch.tensor(x, device=logits.device) for x in (rows, places))]


def _wide(logits: torch.Tensor) -> torch.dtype:
    """Float32, or what the logits have where that is wider."""
    return torch.promote_types(logits.dtype, torch.float32)


def _lumped(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[T, K + 1]: log-probabilities of `tokens` [T, K], and of all others together."""
    others = logits.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, tokens), others], -1).log_softmax(-1)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """PEFT's own switch also changes requires_grad, which a pending backward would not survive."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    before = [m._disable_adapters for m in layers]
    try:
        for module in layers:
            module._disable_adapters = True
        yield
    finally:
        for module, value in zip(layers, before, strict=True):
            module._disable_adapters = value
