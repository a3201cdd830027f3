"""The anchor: every step also pays for what the model now says differently on general prompts.

    loss + weight · KL(base ‖ tuned), mean over all real tokens of a few calibration prompts

The base is the same model with its adapter switched off, so no second model is loaded. Learning
without forgetting (arXiv 1606.09282) with prompts instead of the new task's inputs; SA-SFT
(arXiv 2602.20162) replays dialogues that the base wrote for itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer

from .. import ranks
from ..model.quantised import evaluating


class Anchor:
    """Adds the anchor to a trainer's loss.

    Attributes:
        weight: λ in loss + λ·KL.
        batch: prompts of one micro step on one rank.
        last: the latest KL in nats per token, a tensor; None before the first step.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], weight: float, batch: int):
        self.prompts, self.weight, self.batch = list(prompts), weight, batch
        self.last: torch.Tensor | None = None
        self._step, self._micro = -1, 0

    def attach(self, trainer: Trainer) -> None:
        """Wrap `trainer.compute_loss`; evaluation stays as it is.

        However many micro steps are accumulated, their anchors add up to λ times the mean KL.
        """
        compute = trainer.compute_loss

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            found = compute(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
            if not model.training:
                return found
            loss, *outputs = found if return_outputs else (found,)
            wrapped = trainer.accelerator.unwrap_model(model)
            kl = divergence(wrapped, self.draw(trainer.state.global_step, trainer.args.seed))
            self.last = kl.detach()
            loss = loss + self.weight * kl.to(loss.device) / _counted(trainer, num_items_in_batch)
            return (loss, *outputs) if return_outputs else loss

        trainer.compute_loss = compute_loss

    def draw(self, step: int, seed: int) -> list[Sequence[int]]:
        """The prompts of the next micro step; they depend on the step, so that a run resumes."""
        self._micro = self._micro + 1 if step == self._step else 0
        self._step = step
        chance = random.Random(f"{seed}/{step}/{self._micro}/{ranks.current()}")
        return chance.sample(self.prompts, min(self.batch, len(self.prompts)))


def _counted(trainer: Trainer, num_items_in_batch) -> int:
    """By what the anchor of a micro step is divided here: the trainer may do it itself later."""
    divides = not trainer.model_accepts_loss_kwargs or num_items_in_batch is None
    if divides and trainer.compute_loss_func is None:
        return 1
    return trainer.current_gradient_accumulation_steps


def divergence(model: PeftModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """KL(base ‖ tuned) in nats, mean over all tokens of `prompts`, in float32 or wider.

    The base is `model` with its adapter off and takes no gradient.
    """
    device = model.get_input_embeddings().weight.device
    # Padding stands on the right, after every real token, where causal attention never looks.
    ids = nn.utils.rnn.pad_sequence([torch.as_tensor(p) for p in prompts], batch_first=True)
    lengths = torch.tensor([len(p) for p in prompts])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    with evaluating(model):
        with torch.no_grad(), adapter_off(model):
            base = _log_probabilities(model, ids.to(device), real)
        tuned = _log_probabilities(model, ids.to(device), real)
    return (base.exp() * (base - tuned)).sum(-1).mean()


def _log_probabilities(model: nn.Module, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits[real.to(logits.device)]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


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
