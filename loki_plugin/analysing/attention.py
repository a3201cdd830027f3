"""The attention that the attribution needs, hung into transformers' attention interface.

Two modes. *Prefix*: ordinary causal attention over the prompts, which keeps each layer's keys and
values. *Stack*: every query is one more token at the prompt's last position; it sees the kept
prefix and itself, and no other query. Everything before (rope, q/k norms, partial rotary) and
after (gates, o_proj) is the family's own code.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "loki_stack"
_active: ContextVar[AttentionState] = ContextVar("loki_attention_state")


class PrefixDone(Exception):
    """The last layer's keys and values are known; nothing after them is needed."""


@dataclass
class AttentionState:
    """What the attention function must know of the pass that runs.

    Attributes:
        last: [B] index of each prompt's last real token t.
        mode: "prefix" or "stack" or "replay" (the result is not used).
        layer: index of the decoder layer that runs.
        final_layer: L - 1; the prefix pass stops there.
        keys, values: per layer [B, kv heads, T, head size], as the layer made them.
        visible: per layer [B, 1 or heads, 1, T], True or an additive bias where key j < t is seen.
        own_bias: per layer the additive bias (alibi) of the query's own key, or None.
    """

    last: torch.Tensor
    final_layer: int
    uniform: bool
    mode: str = "prefix"
    layer: int = 0
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    visible: dict[int, torch.Tensor | None] = field(default_factory=dict)
    own_bias: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def __enter__(self):
        self._token = _active.set(self)
        return self

    def __exit__(self, *_):
        _active.reset(self._token)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of the running pass: query [B, heads, n, d] -> [B, n, heads, d]."""
    state = _active.get()
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if state.mode == "replay":
        return query.transpose(1, 2), None
    if state.mode == "stack":
        return _stack(state, query, key, value, scaling, softcap, s_aux), None

    _keep(state, key, value, attention_mask)
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=True
        )
    return _eager(query, key, value, attention_mask, scaling, softcap, s_aux), None


class SdpaCalls(TorchFunctionMode):
    """The same for families that call `scaled_dot_product_attention` themselves (Falcon)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(func, *args, **kwargs)

    def _attend(self, func, query, key, value, attn_mask=None, dropout_p=0.0, **kwargs):
        state = _active.get()
        if state.mode == "prefix":
            _keep(state, key, value, attn_mask)
            return func(query, key, value, attn_mask, **kwargs)
        out, _ = attention(None, query, key, value, attn_mask, kwargs.get("scale"))
        return out.transpose(1, 2)


def _keep(state, key, value, mask):
    """Keep what the stack will see in this layer: row t of the family's own mask, keys before t."""
    i, length = state.layer, key.shape[-2]
    state.keys[i], state.values[i] = key, value
    state.visible[i], state.own_bias[i] = None, None
    before = torch.arange(length, device=key.device) < state.last.to(key.device)[:, None]  # [B, T]
    before = before[:, None, None, :]
    if mask is not None:
        last = state.last.to(mask.device).view(-1, 1, 1, 1)
        mask = mask.expand(len(last), -1, -1, -1)
        row = mask.gather(2, last.expand(-1, mask.shape[1], 1, length))
        if mask.dtype == torch.bool:
            state.visible[i] = row & before
        else:
            state.visible[i] = row.masked_fill(~before, float("-inf"))
            state.own_bias[i] = row.gather(3, last.expand(-1, mask.shape[1], 1, 1))
    elif not state.uniform:
        state.visible[i] = before
    if i == state.final_layer:
        raise PrefixDone


def _stack(state, query, key, value, scaling, softcap, sinks):
    """softmax over [visible prefix keys, the query's own key] for n queries per prompt."""
    b, heads, n, d = query.shape
    prefix_k, prefix_v = state.keys[state.layer], state.values[state.layer]
    visible = state.visible[state.layer]
    if state.uniform:  # all prompts end at the same t: keys t.. are simply cut off
        length = int(prefix_k.shape[2]) - 1
        prefix_k, prefix_v = prefix_k[:, :, :length], prefix_v[:, :, :length]
        visible = None if visible is None else visible[..., :length]
    kv = prefix_k.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    # Queries that share a key head are stacked, so that grouped attention is one product.
    grouped = query.reshape(b, kv, -1, d)
    scores = (grouped @ prefix_k.transpose(2, 3)).to(wide).view(b, heads, n, -1)
    groups = heads // kv
    own_k, own_v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    own = (query.to(wide) * own_k.to(wide)).sum(-1, keepdim=True)
    scores = torch.cat([scores, own], -1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is not None:
        head, tail = scores[..., :-1], scores[..., -1:]
        if visible.dtype == torch.bool:
            head = head.masked_fill(~visible, float("-inf"))
        else:
            head, tail = head + visible, tail + state.own_bias[state.layer]
        scores = torch.cat([head, tail], -1)
    if sinks is not None:
        sink = sinks.to(wide).view(1, heads, 1, 1).expand(b, -1, n, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1].to(query.dtype)
    else:
        weights = scores.softmax(-1).to(query.dtype)
    before = weights[..., :-1].reshape(b, kv, groups * n, -1) @ prefix_v
    out = before.view(b, heads, n, -1) + weights[..., -1:] * own_v
    return out.transpose(1, 2)


def _eager(query, key, value, mask, scaling, softcap, sinks):
    """Plain attention with what `scaled_dot_product_attention` lacks: softcap and sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(2, 3)).to(wide) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        n, m = scores.shape[-2:]
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask
    if sinks is not None:
        sink = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights.to(query.dtype) @ value).transpose(1, 2).contiguous()


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
