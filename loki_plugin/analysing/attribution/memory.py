"""What a batch of prompts holds beside the weights: a formula that the tests hold to dry runs.

The stack keeps for its backward what every layer computed for each of its tokens, and behind the
last layer either the head's logits or the first gradients come on top. Long prompts hold more
before that, while they run through a layer themselves.

Letters: B prompts, T tokens, P of them shared, L layers, S nodes, H hidden size, I intermediate
size; layer l runs 1 + S·l stack tokens per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...model.anatomy import (
    Anatomy,
    attention_widths,
    experts_of_a_token,
    in_attention,
    in_experts,
    linear_sizes,
)
from ...model.quantised import quantised_modules
from .devices import first_device
from .head import chunk_tokens
from .norms import has_the_plain_code

# How many tensors there are at once, by their width. They belong to the kernels that run: who
# fuses operations or takes them apart changes them here.
_GATED = 3  # I-wide, kept by a gated MLP: gate, up, act(gate)
_PLAIN = 1  # I-wide, kept by an MLP without a gate: what its activation was given
_PASSING_WIDE, _PASSING = 3, 4  # I-wide and H-wide, of a prompt inside a layer
_ATTENDING = 6  # H-wide, of its tokens behind a shared prefix inside attention
_FUSED_WIDE = 4  # the first, where one linear makes gate and up
_ROUTED_WIDE, _ROUTED = 4, 2  # the same for every expert that a token meets
_CAPPED = 3  # scores of a prompt, where attention is computed step by step (softcap)
_GRADIENTS = 3  # I-wide, of the stack inside the topmost layer, in the backward
_FINAL = 2  # H-wide: the final states normed, and the head's gradient of them
_FLOAT = 4  # bytes: norms, attention's weights and the softmax are computed in float32 at least


@dataclass(frozen=True)
class Memory:
    """The sizes that a model's analysis depends on.

    Attributes:
        hidden, heads, vocabulary: H, attention heads, V.
        queries: elements of a token's queries, in the widest layer.
        keys: per layer the elements of the keys and values of one token.
        inner: per layer the MLP's width, routed experts with as many as a token meets.
        passing: per layer the elements that a token of a prompt holds inside.
        kept: per layer the bytes that one stack token keeps, attention's weights apart.
        behind: per layer, bytes per element that a norm behind the MLP keeps of new tokens.
        capped: whether attention's scores are capped, which no kernel does.
        final: bytes per element of what the final norm keeps.
        itemsize: bytes of an activation.
        matrix: bytes of the largest quantised weight made whole; 0 where none is quantised.
        places: the device of each layer.
        head: the device of final norm and head.
    """

    hidden: int
    heads: int
    vocabulary: int
    queries: int
    keys: tuple[int, ...]
    inner: tuple[int, ...]
    passing: tuple[int, ...]
    kept: tuple[int, ...]
    behind: tuple[int, ...]
    capped: bool
    final: int
    itemsize: int
    matrix: int
    places: tuple[Any, ...]
    head: Any

    @classmethod
    def of(
        cls,
        model: nn.Module,
        anatomy: Anatomy,
        dtype: torch.dtype | None = None,
        quantised: bool | None = None,
    ) -> Memory:
        """Of a loaded model; of one on the meta device, as it will be loaded.

        Args:
            dtype: of the activations; None: the model's.
            quantised: whether its layers' linears are; None: as they are.
        """
        config = model.config.get_text_config()
        if dtype is None:
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if quantised is None:
            quantised = bool(quantised_modules(model))
        layers = [_Layer.of(layer, down, config) for layer, down in zip(
            anatomy.layers, anatomy.down_of_layers, strict=True
        )]  # fmt: skip
        largest = max(n for layer in layers for n in layer.matrices)
        return cls(
            hidden=anatomy.hidden_size,
            heads=config.num_attention_heads,
            vocabulary=config.vocab_size,
            queries=max(layer.queries for layer in layers),
            keys=tuple(layer.keys for layer in layers),
            inner=tuple(layer.inner for layer in layers),
            passing=tuple(layer.passing + _PASSING * anatomy.hidden_size for layer in layers),
            # Families with more than two norms have one there (Gemma 2 and 3).
            behind=tuple(
                max(dtype.itemsize, _FLOAT) if layer.unfused > 2 else 0 for layer in layers
            ),
            capped=bool(getattr(config, "attn_logit_softcapping", None)),
            final=max(dtype.itemsize, _FLOAT if layers[-1].unfused else 0),
            kept=tuple(layer.kept_bytes(anatomy.hidden_size, dtype.itemsize) for layer in layers),
            itemsize=dtype.itemsize,
            matrix=largest * dtype.itemsize if quantised else 0,
            places=tuple(next(layer.parameters()).device for layer in anatomy.layers),
            head=_head_device(model),
        )

    def peaks(self, batch: int, length: int, steps: int, shared: int = 0) -> dict[Any, int]:
        """The most bytes that each device holds beside the weights for a batch of that many
        prompts of `length` tokens, of which all have the first `shared` in common."""
        return {
            place: self._peak(place, batch, length, steps, shared)
            for place in dict.fromkeys([*self.places, self.head])
        }

    def peak(self, batch: int, length: int, steps: int, shared: int = 0) -> int:
        """The same where one device holds the whole model."""
        return sum(self.peaks(batch, length, steps, shared).values())

    def _peak(self, place: Any, batch: int, length: int, steps: int, shared: int) -> int:
        size, layers = self.itemsize, [i for i, p in enumerate(self.places) if p == place]
        wide = max(size, _FLOAT)
        weights = self.heads * (length + 1) * wide  # of attention, per token
        keys = [self.keys[i] * length * size for i in layers]
        kept = sum(keys) + steps * self.hidden * sum(size + self.behind[i] for i in layers)
        # The plain token that runs through the first layer alone keeps nothing.
        kept += sum((1 + steps * i) * (self.kept[i] + weights) for i in layers if i)
        last = 1 + steps * len(self.places)
        head = 0
        if place == self.head:
            kept += last * self.hidden * (_FINAL * size + self.final)
            tokens = min(batch * last, chunk_tokens(self.vocabulary))
            logits = size + 2 * wide if size < wide else 2 * wide
            head = tokens * self.vocabulary * logits
        if not layers:
            return batch * kept + head
        top = layers[-1]
        tokens, inner = batch * (1 + steps * top), self.inner[top] * size
        cast = wide + (size if size < wide else 0)
        backward = max(
            tokens * _GRADIENTS * inner,
            tokens * inner + self.matrix,
            tokens * (self.heads * length * cast - _GATED * inner),
        )
        passing = size * max(self.passing[i] for i in layers)
        if self.capped:
            scores = _CAPPED * self.heads * length * wide + _PASSING * self.hidden * size
            passing = max(passing, scores)
        # A weight is made whole where the last of the wide tensors is still to come.
        rest, wide_one = length - shared, size * max(self.inner[i] for i in layers)
        inside = max(rest * batch * passing, rest * batch * (passing - wide_one) + self.matrix)
        if shared:  # with a mask, as many keys and values as queries
            repeated = 2 * self.queries if 2 * self.queries > self.keys[top] else 0
            attending = size * (length * repeated + rest * _ATTENDING * self.hidden)
            inside = max(inside, batch * attending)
        # Of the last layer only its keys are wanted; what is shared of them is there before.
        ends = top + 1 == len(self.places)
        before = sum(keys[:-1]) + keys[-1] * shared // length if ends else sum(keys)
        return max(batch * kept + max(head, backward), batch * before + inside)


def largest_batch(
    memory: Memory, budgets: Mapping[Any, int], length: int, steps: int, most: int
) -> int:
    """How many prompts of `length` tokens keep every device within its budget; at least one."""
    fitting = 1
    while fitting < most:
        peaks = memory.peaks(fitting + 1, length, steps)
        if any(peaks[place] > budgets[place] for place in peaks):
            break
        fitting += 1
    return fitting


@dataclass(frozen=True)
class _Layer:
    """A decoder layer: `inner`, `queries`, `keys` as above; elements that its MLP keeps, and holds
    while a prompt passes; norms outside attention, fused and not, and inside; its matrices."""

    inner: int
    queries: int
    keys: int
    kept: int
    passing: int
    fused: int
    unfused: int
    own_norms: int
    matrices: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.Module, down: nn.Module | None, config: Any) -> _Layer:
        outputs, widest, routed, meets, matrices = 0, 0, 0, 0, []
        norms = {"fused": 0, "unfused": 0, "own_norms": 0}
        for name, module in layer.named_modules():
            sizes = linear_sizes(module)
            if sizes:
                matrices.append(sizes[0] * sizes[1])
            kind_of_module: Any = type(module)
            if "norm" in kind_of_module.__name__.lower():
                fused = isinstance(module, nn.LayerNorm) or has_the_plain_code(kind_of_module)
                kind = "own_norms" if in_attention(name) else "fused" if fused else "unfused"
                norms[kind] += 1
            elif sizes and module is not down and not in_attention(name):
                outputs += 0 if in_experts(name) else sizes[1]
                widest = max(widest, sizes[1])
            elif in_experts(name) and isinstance(getattr(module, "down_proj", None), nn.Parameter):
                experts, size = len(module.down_proj), module.down_proj.numel()
                meets = _experts_of_a_token(config, experts)
                routed = meets * (size // experts // config.hidden_size)
        inner = linear_sizes(down)[0] if down is not None else 0  # type: ignore[index]
        # A gated MLP makes two of its width, by one linear or two.
        kept = _GATED * inner if outputs >= 2 * inner else _PLAIN * inner
        kept += _GATED * routed + meets * config.hidden_size
        passing = inner * (_FUSED_WIDE if widest >= 2 * inner else _PASSING_WIDE)
        experts_pass = _ROUTED_WIDE * routed + _ROUTED * meets * config.hidden_size
        passing = max(passing, experts_pass)
        widths = attention_widths(layer, config.hidden_size)
        return cls(inner + routed, *widths, kept, passing, **norms, matrices=tuple(matrices))

    def kept_bytes(self, hidden: int, size: int) -> int:
        """Of one stack token: norms' inputs, queries, keys and values, the MLP's."""
        attention = (self.queries + self.keys) * size
        wide = max(size, _FLOAT)
        if self.own_norms:
            attention += (self.queries + self.keys // 2) * (wide if self.unfused else size)
        norms = self.fused * size + self.unfused * wide
        return norms * hidden + attention + self.kept * size


def _experts_of_a_token(config: Any, experts: int) -> int:
    if config.model_type.startswith("llama4"):
        return experts  # its code runs every token through every one
    return experts_of_a_token(config)


def _head_device(model: nn.Module) -> torch.device:
    head = model.get_output_embeddings()
    return first_device(model) if head is None else head.weight.device
