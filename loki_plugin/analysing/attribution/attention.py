"""The attention that the attribution needs, hung into transformers' attention interface.

While a prompt runs, each layer's keys and values are kept; in the stack, every query is one more
token at the prompt's last position, which sees what is kept and itself, and no other query.
Everything before (rope, q/k norms, partial rotary) and after (gates, o_proj) is the family's own
code. Letters of shapes are those of `stack_attention`, and heads = K·G.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .devices import Copies
from .stack_attention import StackAttention

NAME = "loki_stack"
_active: ContextVar[AttentionState] = ContextVar("loki_attention_state")


class PrefixDone(Exception):
    """The last layer's keys and values are known; nothing after them is needed."""


class Mode(Enum):
    """What the pass that runs does."""

    SHARED = "what all prompts begin with, once: plain causal attention, keys go to the cache"
    PREFIX = "the prompts, or the rest of them: plain causal attention, keys and values are kept"
    STACK = "tokens at the last position: each sees what was kept and itself"
    REPLAY = "a layer on answers that are given to it: what attention returns is not used"


@dataclass
class AttentionState:
    """What the attention function must know of the pass that runs.

    Attributes:
        last: [B] index of each prompt's last real token t.
        uniform: whether all prompts have one length.
        shared: how many first tokens ran once for all prompts; the prefix pass begins after them.
        layer: index of the decoder layer that runs.
        attended: whether it has attended already.
        final_layer: L - 1; the prefix pass stops there.
        keys, values: per layer [B, K, T, d], as the layer made them.
        visible: per layer [B, 1 or heads, 1, T], True or a bias of 0 where key j < t is seen.
        own_bias: per layer [B, 1 or heads, 1, 1], the additive bias (alibi) of the query's own key.
        mixed: how many recurrences and convolutions the layer that runs has called.
        kept: of each of them, by layer and number, its state before t (`recurrence`).
    """

    last: Copies
    final_layer: int
    uniform: bool
    shared: int = 0
    mode: Mode = Mode.PREFIX
    layer: int = 0
    attended: bool = False
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    visible: dict[int, torch.Tensor | None] = field(default_factory=dict)
    own_bias: dict[int, torch.Tensor | None] = field(default_factory=dict)
    mixed: int = 0
    kept: dict[tuple[int, int], Any] = field(default_factory=dict)
    _token: Any = None
    _before: dict[tuple[torch.device, int], torch.Tensor] = field(default_factory=dict)
    _bias: dict[tuple[torch.device, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def __enter__(self) -> AttentionState:
        self._token = _active.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.reset(self._token)

    def before(self, device: torch.device, length: int) -> torch.Tensor:
        """[B, 1, 1, T]: whether key j stands before its prompt's last token; made once."""
        if (device, length) not in self._before:
            positions = torch.arange(length, device=device)
            mask = positions < self.last.on(device)[:, None]  # [B, T]
            self._before[device, length] = mask[:, None, None, :]
        return self._before[device, length]

    def bias(self, device: torch.device, length: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, 1, 1, T]: 0 where key j stands before its prompt's last token, else -inf; made once.

        `dtype` is the scores'.
        """
        if (device, length, dtype) not in self._bias:
            self._bias[device, length, dtype] = _as_bias(self.before(device, length), dtype)
        return self._bias[device, length, dtype]


def _as_bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))


def active() -> AttentionState:
    """The state of the pass that runs."""
    return _active.get()


def is_replaying() -> bool:
    """Whether the pass that runs has no use for what attention returns."""
    return _active.get().mode is Mode.REPLAY


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the running pass: query [B, heads, n, d] -> [B, n, heads, d]."""
    state = _active.get()
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if state.mode is Mode.REPLAY:
        batch, heads, tokens, size = query.shape
        return query.new_empty(batch, tokens, heads, size), None
    if state.mode is Mode.STACK:
        return _stack(state, query, key, value, scaling, softcap, s_aux), None

    key, value = _keep(state, key, value, attention_mask)
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=True
        )
    return _eager(query, key, value, attention_mask, scaling, softcap, s_aux), None


class SdpaCalls(TorchFunctionMode):
    """The same for families that call `scaled_dot_product_attention` themselves (Falcon)."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(func, *args, **kwargs)

    def _attend(
        self,
        func: Callable,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query [B, heads, n, d] -> [B, heads, n, d]"""
        state = _active.get()
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # transformers repeats the heads with a mask and leaves it to torch without
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        if state.mode in (Mode.SHARED, Mode.PREFIX):
            key, value = _keep(state, key, value, attn_mask)
            return func(query, key, value, attn_mask, **kwargs)
        out, _ = attention(None, query, key, value, attn_mask, kwargs.get("scale"))
        return out.transpose(1, 2)


def _keep(
    state: AttentionState, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep what the stack will see in this layer: the family's own mask at t, for keys before t.

    `key`, `value` [B, K, T, d]; `mask` [1 or B, 1 or heads, n, T]. Returns keys and values laid out
    head by head: each is multiplied with two or three times.
    """
    i, length = state.layer, key.shape[-2]
    if state.attended:
        raise ValueError(f"layer {i} attends more than once, and loki keeps keys and values once")
    state.attended = True
    key, value = key.contiguous(), value.contiguous()
    if state.mode is Mode.SHARED:
        if i == state.final_layer:
            raise PrefixDone
        return key, value
    state.keys[i], state.values[i] = key, value
    state.visible[i], state.own_bias[i] = None, None
    if mask is not None:
        before = state.before(mask.device, length)
        last = state.last.on(mask.device).view(-1, 1, 1, 1)
        mask = mask.expand(len(last), -1, -1, -1)
        index = (last - state.shared).expand(-1, mask.shape[1], 1, length)
        at_last = mask.gather(2, index)  # [B, 1 or heads, 1, T]
        if mask.dtype == torch.bool:
            state.visible[i] = at_last & before
        else:
            state.visible[i] = at_last.masked_fill(~before, float("-inf"))
            state.own_bias[i] = at_last.gather(3, last.expand(-1, mask.shape[1], 1, 1))
    elif not state.uniform:
        wide = torch.promote_types(key.dtype, torch.float32)
        state.visible[i] = state.bias(key.device, length, wide)
    if i == state.final_layer:
        raise PrefixDone
    return key, value


def _stack(
    state: AttentionState,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """softmax over [visible prefix keys, the query's own key]; query [B, heads, n, d].

    Returns [B, n, heads, d].
    """
    i = state.layer
    key, value = (_for_all(x, query.shape[2]) for x in (key, value))
    bias = state.visible[i]
    if bias is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        bias = _as_bias(bias, wide) if bias.dtype == torch.bool else bias.to(wide)
    last = None if state.uniform else state.last.on(query.device)
    own_bias = state.own_bias[i]
    out = StackAttention.apply(
        query, key, value, state.keys[i], state.values[i], bias, own_bias, last, scaling, softcap,
        sinks,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def _for_all(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """Keys [B, K, m, d] of an earlier layer (Gemma 4 shares them) as [B, K, tokens, d].

    Tokens that the stack grew since then were the plain token there.
    """
    missing = tokens - x.shape[2]
    return torch.cat([x, x[:, :, :1].expand(-1, -1, missing, -1)], 2) if missing else x


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Plain attention with what `scaled_dot_product_attention` lacks: softcap and sinks.

    query [B, heads, n, d], key and value [B, K, T, d] -> [B, n, heads, d].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))  # [B, heads, T, d]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(2, 3)).to(wide) * scaling  # [B, heads, n, T]
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
