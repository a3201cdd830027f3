"""What a training step holds: a formula that the tests hold to dry runs.

Resident are the base, the adapter, the optimizer's states and protected directions. On top of them
comes the largest of three moments: the loss with its logits, the backward of one layer, and the
optimizer's step.

Letters: t tokens at once, L layers, H hidden size, I intermediate size, V vocabulary, r the width
of the adapter's A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.anatomy import Anatomy, attention_widths, in_attention, linear_sizes
from .base import Stored, quantised_linears

# Tensors that there are at once, by their width; what runs decides, so dry runs do.
_LOGITS = 12  # bytes per logit: log-softmax, its gradient, the loss's gradient, in float32
_KEPT_LOGITS = 4  # of these, what waits for the backward
_ANCHOR_LOGITS = 4  # the same of an anchor text, beside the logits themselves
_GATED, _PLAIN = 4, 2  # I-wide, kept for the backward by an MLP with a gate, and by one without
_GRADIENTS = 2  # I-wide, inside the backward of a layer, for whose input's two there is room
_CAST = 6  # bytes of A's input where A is float32 and the rest is not: both, and cast back
_NORM, _NORM_BACK = 4, 6  # bytes: the families' own norms compute in float32; such tensors
# Bytes of an optimizer's states per parameter; None: twice the parameter's own.
_STATES = {
    "adamw_torch": None, "adamw_torch_fused": None, "adamw_hf": None, "adamw_apex_fused": None,
    "paged_adamw_32bit": 8, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2,
    "lion_32bit": 4, "lion_pytorch": 4, "paged_lion_32bit": 4, "lion_8bit": 1, "paged_lion_8bit": 1,
    "sgd": 0, "adafactor": 0, "adopt_adamw": None,
}  # fmt: skip
# torchao's: bits of a number in each of two states, and how many share a float32 scale.
_TORCHAO = {
    "adamw_torch_8bit": (8, 256), "ao_adamw_8bit": (8, 256), "ao_adamw_fp8": (8, 256),
    "adamw_torch_4bit": (4, 128), "ao_adamw_4bit": (4, 128),
}  # fmt: skip
_BLOCK = 256  # parameters that share a float32 scale in 8-bit states
_LEAST_8BIT = 4096  # smaller tensors keep float32 states


@dataclass(frozen=True)
class Shapes:
    """A training step's shapes.

    Attributes:
        kept: per layer, bytes that one token keeps for the backward, its adapter's apart.
        inner: the widest MLP.
        matrix: bytes of the largest 4-bit or 8-bit weight made whole.
    """

    kept: tuple[int, ...]
    inner: int
    hidden: int
    vocabulary: int
    itemsize: int
    matrix: int

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy, stored: Stored) -> Shapes:
        config: Any = model.config.get_text_config()
        size = stored.dtype.itemsize
        whole = [m.weight.numel() for m in quantised_linears(model)] if stored.bits else [0]
        return cls(
            kept=tuple(
                _kept(layer, down, config, size)
                for layer, down in zip(anatomy.layers, anatomy.down_of_layers, strict=True)
            ),
            inner=anatomy.intermediate_size,
            hidden=anatomy.hidden_size,
            vocabulary=config.vocab_size,
            itemsize=size,
            matrix=max(whole) * size,
        )

    def activations(
        self,
        tokens: int,
        ranks: Sequence[int],
        gradients: Sequence[int],
        checkpointing: bool,
        beside: Sequence[int] = (),
        cast: bool = False,
        logits: bool = True,
        anchor: int = 0,
        waiting: bool = False,
        directions: int = 0,
        folded: int = 0,
    ) -> dict[str, int]:
        """Bytes at each moment, gradients among them.

        Args:
            ranks: per layer, the width of A.
            gradients: per layer, bytes of the adapter's gradients.
            beside: per layer, bytes that one token keeps for the LoRA of further linears.
            cast: whether the adapter's dtype is wider than the activations'.
            logits: whether the loss makes them.
            anchor: tokens of anchor prompts, which run without checkpoints beside the loss.
            waiting: whether gradients of an earlier micro batch are there already.
            directions: bytes of those that are made wide at once.
            folded: bytes of what the adapter reads through directions, kept for a micro batch.
        """
        size, state = self.itemsize, tokens * self.hidden
        more = beside or [0] * len(ranks)
        each = zip(self.kept, ranks, more, strict=True)
        kept = [tokens * (k + r * size + own) for k, r, own in each]
        inputs = [state * size] * len(kept) if checkpointing else kept
        final = state * (size + _NORM)
        # The anchor's backward comes first: then all gradients are there before the loss's begins.
        waiting |= bool(anchor)
        there = [sum(gradients if waiting else gradients[i + 1 :]) for i in range(len(kept))]
        layers = [sum(inputs[:i]) + kept[i] + there[i] for i in range(len(kept))]
        loss, made = sum(inputs) + final, self.vocabulary if logits else 0
        pulled = 0
        if anchor:
            pulled = loss + tokens * made * _KEPT_LOGITS + sum(kept) * anchor // tokens
            said = anchor * self.vocabulary * (size + _ANCHOR_LOGITS)
            pulled += max(said, self._inside(anchor, cast))
        inside = self._inside(tokens, cast) + max(gradients) + directions
        moments = {
            "loss": loss + tokens * made * _LOGITS + (sum(gradients) if waiting else 0),
            "anchor": pulled,
            "layer": max(max(layers) + inside, sum(inputs) + _NORM_BACK * _NORM * state),
            "step": sum(gradients),
        }
        return {name: size and size + folded for name, size in moments.items()}

    def _inside(self, tokens: int, cast: bool) -> int:
        """Bytes that the backward of one layer makes and leaves."""
        wide = tokens * self.inner * self.itemsize
        inside = tokens * self.inner * _CAST if cast else 0
        inside += max(_GRADIENTS * wide, wide + self.matrix)
        return inside + tokens * self.hidden * self.itemsize


def _kept(layer: nn.Module, down: nn.Module | None, config: Any, size: int) -> int:
    queries, keys = attention_widths(layer, config.hidden_size)
    norms = own = outputs = 0
    for name, module in layer.named_modules():
        sizes = linear_sizes(module)
        if "norm" in type(module).__name__.lower():
            if in_attention(name):
                own += queries if not own else keys // 2
            else:
                norms += 1
        elif sizes and module is not down and not in_attention(name):
            outputs += sizes[1]
    inner = linear_sizes(down)[0] if down is not None else 0  # type: ignore[index]
    mlp = (_GATED if outputs >= 2 * inner else _PLAIN) * inner
    attention = 2 * queries + keys  # queries, keys, values, and the answer
    return (attention + mlp) * size + (norms * config.hidden_size + own) * _NORM


def trainable(
    inputs: Sequence[int], counts: Sequence[int], rank: int | None, still: int = 0
) -> list[int]:
    """Parameters that train in each layer: k·I in the dense form, r·I + k·r in the low-rank one, or
    k·r where all `still` rows train and A stands still."""

    def one(size: int, count: int) -> int:
        if rank is None or not count:
            return count * size
        return rank * (count if count == still else size + count)

    return [one(size, count) for size, count in zip(inputs, counts, strict=True)]


def state_bytes(optimizer: str, tensors: Sequence[int], dtype: torch.dtype) -> int | None:
    """Bytes of the optimizer's states for trainable tensors of so many elements; None: unknown."""
    if optimizer == "muon":  # one momentum for a matrix, and what trains are matrices
        return dtype.itemsize * sum(tensors)
    if optimizer in _TORCHAO:
        bits, block = _TORCHAO[optimizer]
        return sum(
            2 * (bits * n // 8 + 4 * (n // block))
            if n >= _LEAST_8BIT and n % block == 0
            else 2 * dtype.itemsize * n
            for n in tensors
        )
    if optimizer not in _STATES:
        return None
    each = _STATES[optimizer]
    if each is None:
        return 2 * dtype.itemsize * sum(tensors)
    if each > 2 or not each:
        return each * sum(tensors)
    return sum(
        each * (n + 4 * -(-n // _BLOCK)) if n >= _LEAST_8BIT else each * 4 * n for n in tensors
    )
