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
        uniform: whether all prompts have one length.
        shared: how many first tokens ran once for all prompts; the prefix pass begins after them.
        mode: "shared", "prefix", "stack", or "replay" (the result is not used).
        layer: index of the decoder layer that runs.
        final_layer: L - 1; the prefix pass stops there.
        keys, values: per layer [B, kv heads, T, head size], as the layer made them.
        visible: per layer [B, 1 or heads, 1, T], True or an additive bias where key j < t is seen.
        own_bias: per layer the additive bias (alibi) of the query's own key, or None.
    """

    last: torch.Tensor
    final_layer: int
    uniform: bool
    shared: int = 0
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
        return query.transpose(1, 2).contiguous(), None
    if state.mode == "stack":
        return _stack(state, query, key, value, scaling, softcap, s_aux), None

    key, value = _keep(state, key, value, attention_mask)
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
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # transformers repeats the heads with a mask and leaves it to torch without
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        if state.mode in ("shared", "prefix"):
            key, value = _keep(state, key, value, attn_mask)
            return func(query, key, value, attn_mask, **kwargs)
        out, _ = attention(None, query, key, value, attn_mask, kwargs.get("scale"))
        return out.transpose(1, 2)


def _keep(state, key, value, mask):
    """Keep what the stack will see in this layer: row t of the family's own mask, keys before t.

    Returns keys and values laid out head by head: each is multiplied with two or three times.
    """
    i, length = state.layer, key.shape[-2]
    key, value = key.contiguous(), value.contiguous()
    if state.mode == "shared":
        if i == state.final_layer:
            raise PrefixDone
        return key, value
    state.keys[i], state.values[i] = key, value
    state.visible[i], state.own_bias[i] = None, None
    before = torch.arange(length, device=key.device) < state.last.to(key.device)[:, None]  # [B, T]
    before = before[:, None, None, :]
    if mask is not None:
        last = state.last.to(mask.device).view(-1, 1, 1, 1)
        mask = mask.expand(len(last), -1, -1, -1)
        row = mask.gather(2, (last - state.shared).expand(-1, mask.shape[1], 1, length))
        if mask.dtype == torch.bool:
            state.visible[i] = row & before
        else:
            state.visible[i] = row.masked_fill(~before, float("-inf"))
            state.own_bias[i] = row.gather(3, last.expand(-1, mask.shape[1], 1, 1))
    elif not state.uniform:
        state.visible[i] = before
    if i == state.final_layer:
        raise PrefixDone
    return key, value


def _stack(state, query, key, value, scaling, softcap, sinks):
    """softmax over [visible prefix keys, the query's own key] for n queries per prompt."""
    i = state.layer
    key, value = (_for_all(x, query.shape[2]) for x in (key, value))
    bias = state.visible[i]
    if bias is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=wide).masked_fill_(~bias, float("-inf"))
        bias = bias.to(wide)
    last = None if state.uniform else state.last.to(query.device)
    own_bias = state.own_bias[i]
    out = _StackAttention.apply(
        query, key, value, state.keys[i], state.values[i], bias, own_bias, last, scaling, softcap,
        sinks,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def _for_all(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Keys of an earlier layer (Gemma 4 shares them): rows that grew since were the plain token."""
    missing = rows - x.shape[2]
    return torch.cat([x, x[:, :, :1].expand(-1, -1, missing, -1)], 2) if missing else x


class _StackAttention(torch.autograd.Function):
    """Attention of n tokens that all stand at position t = `last`: prefix keys j < t, then itself.

    The kept keys include the plain token's own at index t; its score and its weight are replaced
    by each query's own, so that no tensor of scores is concatenated or sliced.
    """

    @staticmethod
    def forward(ctx, q, k, v, keys, values, bias, own_bias, last, scaling, softcap, sinks):
        b, heads, n, d = q.shape
        kv, length = keys.shape[1:3]
        groups = heads // kv
        wide = torch.promote_types(q.dtype, torch.float32)
        # Queries that share a key head are stacked, so that grouped attention is one product.
        scores = _product(q.reshape(b * kv, groups * n, d), keys.flatten(0, 1).mT, scaling)
        scores = scores.to(wide).view(b, kv, groups, n, length)
        own = (q.view(b, kv, groups, n, d).to(wide) * k.to(wide)[:, :, None]).sum(-1, keepdim=True)
        _put(scores, last, own * scaling)
        if softcap is not None:
            scores.div_(softcap).tanh_()
            slope = 1 - scores.square()
            scores *= softcap
        else:
            slope = None
        if bias is not None:
            own = _take(scores, last).clone()
            if own_bias is not None:
                own = own + _grouped(own_bias, kv)
            scores += _grouped(bias, kv)
            _put(scores, last, own)
        if sinks is None:
            weights = scores.softmax(-1)
        else:
            sink = sinks.to(wide).view(1, kv, groups, 1, 1).expand(b, -1, -1, n, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1].contiguous()
        own = _take(weights, last).clone()
        _put(weights, last, 0)
        out = weights.to(q.dtype).view(b * kv, groups * n, length) @ values.flatten(0, 1)
        out = out.view(b, kv, groups, n, -1)
        out += (own * v.to(wide)[:, :, None]).to(out.dtype)
        ctx.save_for_backward(q, k, v, keys, values, weights, own, slope, last)
        ctx.scaling = scaling
        return out.view(b, heads, n, -1)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, keys, values, weights, own, slope, last = ctx.saved_tensors
        b, kv, groups, n, length = weights.shape
        wide = weights.dtype
        grad = grad.contiguous().view(b, kv, groups, n, -1)
        by_weight = grad.view(b * kv, groups * n, -1) @ values.flatten(0, 1).mT
        by_weight = by_weight.to(wide).view(b, kv, groups, n, length)
        wide_grad = grad.to(wide)
        by_own = (wide_grad * v.to(wide)[:, :, None]).sum(-1, keepdim=True)
        # Backward of the softmax over the prefix keys and the own key; a sink has no value.
        _put(by_weight, last, 0)
        by_weight *= weights
        mean = by_weight.sum(-1, keepdim=True) + by_own * own
        by_score = by_weight.addcmul_(weights, mean, value=-1)
        by_own_score = own * (by_own - mean)
        if slope is not None:
            by_own_score = by_own_score * _take(slope, last)
            by_score *= slope
        by_own_score = by_own_score * ctx.scaling
        d = q.shape[-1]
        by_score = by_score.to(q.dtype).view(b * kv, groups * n, length)
        grad_q = _product(by_score, keys.flatten(0, 1), ctx.scaling).view(b, kv, groups, n, d)
        grad_q += (by_own_score * k.to(wide)[:, :, None]).to(q.dtype)
        grad_k = (by_own_score * q.view(b, kv, groups, n, d).to(wide)).sum(2).to(k.dtype)
        grad_v = (own * wide_grad).sum(2).to(v.dtype)
        return grad_q.view_as(q), grad_k, grad_v, *[None] * 8


def _product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """factor · a·b, scaled before it is rounded to the dtype and without a pass of its own."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)


def _put(tensor, last, value):
    """Write the column of each prompt's own key: index t_b of the last axis."""
    if last is None:
        tensor[..., -1:] = value
        return
    index = last.view(-1, *[1] * (tensor.dim() - 1)).expand(*tensor.shape[:-1], 1)
    if isinstance(value, torch.Tensor):
        tensor.scatter_(-1, index, value)
    else:
        tensor.scatter_(-1, index, float(value))


def _take(tensor, last):
    if last is None:
        return tensor[..., -1:]
    return tensor.gather(-1, last.view(-1, *[1] * (tensor.dim() - 1)).expand(*tensor.shape[:-1], 1))


def _grouped(bias, kv):
    """[B, 1 or heads, 1, T] -> [B, 1 or kv, 1 or groups, 1, T]."""
    return bias.unsqueeze(2) if bias.shape[1] == 1 else bias.unflatten(1, (kv, -1))


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
