"""Attention of tokens that all stand at one position, and its hand-written backward.

Letters of shapes: B prompts, K key heads, G query heads per key head, n stack tokens per prompt,
T kept positions, d head size.
"""

from __future__ import annotations

from typing import Any

import torch


class StackAttention(torch.autograd.Function):
    """Attention of n tokens that all stand at position t = `last`: prefix keys j < t, then itself.

    The kept keys include the plain token's own at index t; its score and its weight are replaced
    by each query's own, so that no tensor of scores is concatenated or sliced.

    Half precision meets float32 inside operations, which widen as they read: a pass of its own over
    the scores, or over the queries, costs as much as the operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [B, K·G, n, d]
        k: torch.Tensor,  # [B, K, n, d]
        v: torch.Tensor,  # [B, K, n, d]
        keys: torch.Tensor,  # [B, K, T, d]
        values: torch.Tensor,  # [B, K, T, d]
        bias: torch.Tensor | None,  # [B, 1 or K·G, 1, T]
        own_bias: torch.Tensor | None,  # [B, 1 or K·G, 1, 1]
        last: torch.Tensor | None,  # [B]; None: T - 1 for all
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,  # [K·G]
    ) -> torch.Tensor:
        """[B, K·G, n, d]"""
        b, heads, n, d = q.shape
        kv, length = keys.shape[1:3]
        groups = heads // kv
        wide = torch.promote_types(q.dtype, torch.float32)
        # Queries that share a key head are stacked, so that grouped attention is one product.
        stacked = q.reshape(b * kv, groups * n, d)  # [B·K, G·n, d]
        scores = _product(stacked, keys.flatten(0, 1).mT, scaling)  # [B·K, G·n, T]
        scores = scores.view(b, kv, groups, n, length)  # [B, K, G, n, T]
        if softcap is not None or bias is not None or sinks is not None:
            scores = scores.to(wide)
        by_group = q.view(b, kv, groups, n, d)  # [B, K, G, n, d]
        own = (by_group * k.to(wide)[:, :, None]).sum(-1, keepdim=True)  # [B, K, G, n, 1]
        _put(scores, last, own * scaling)
        slope = None
        if softcap is not None:
            scores.div_(softcap).tanh_()
            slope = 1 - scores.square()
            scores *= softcap
        if bias is not None:
            own = _take(scores, last).clone()
            if own_bias is not None:
                own = own + _grouped(own_bias, kv)
            scores += _grouped(bias, kv)
            _put(scores, last, own)
        if sinks is None:
            weights = scores.softmax(-1, dtype=wide)
        else:
            sink = sinks.to(wide).view(1, kv, groups, 1, 1).expand(b, -1, -1, n, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1].contiguous()
        own = _take(weights, last).clone()
        _put(weights, last, 0)
        stacked = weights.to(q.dtype).view(b * kv, groups * n, length)  # [B·K, G·n, T]
        out = (stacked @ values.flatten(0, 1)).view(b, kv, groups, n, -1)  # [B, K, G, n, d]
        out.addcmul_(own, v[:, :, None])
        ctx.save_for_backward(q, k, v, keys, values, weights, own, slope, last)
        ctx.scaling = scaling
        return out.view(b, heads, n, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, keys, values, weights, own, slope, last = ctx.saved_tensors
        b, kv, groups, n, length = weights.shape
        wide, d = weights.dtype, q.shape[-1]
        grad = grad.contiguous().view(b, kv, groups, n, -1)  # [B, K, G, n, d]
        stacked = grad.view(b * kv, groups * n, -1)  # [B·K, G·n, d]
        by_weight = stacked @ values.flatten(0, 1).mT  # [B·K, G·n, T]
        by_weight = by_weight.view(b, kv, groups, n, length)  # [B, K, G, n, T]
        by_own = (grad * v.to(wide)[:, :, None]).sum(-1, keepdim=True)  # [B, K, G, n, 1]
        # Backward of the softmax over the prefix keys and the own key; a sink has no value. The
        # weight at the own key's index is 0, and makes 0 of what stands there.
        by_weight = by_weight * weights  # as wide as the weights
        mean = by_weight.sum(-1, keepdim=True).addcmul_(by_own, own)
        by_score = by_weight.addcmul_(weights, mean, value=-1)
        by_own_score = own * (by_own - mean)
        if slope is not None:
            by_own_score = by_own_score * _take(slope, last)
            by_score *= slope
        by_own_score = by_own_score * ctx.scaling
        stacked = by_score.to(q.dtype).view(b * kv, groups * n, length)  # [B·K, G·n, T]
        grad_q = _product(stacked, keys.flatten(0, 1), ctx.scaling).view(b, kv, groups, n, d)
        grad_q.addcmul_(by_own_score, k[:, :, None])
        by_group = q.view(b, kv, groups, n, d)
        grad_k = (by_own_score * by_group).sum(2).to(k.dtype)  # [B, K, n, d]
        grad_v = (own * grad).sum(2).to(v.dtype)  # [B, K, n, d]
        return grad_q.view_as(q), grad_k, grad_v, *[None] * 8


def _product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """factor · a·b, scaled before it is rounded to the dtype and without a pass of its own."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)


def _put(tensor: torch.Tensor, last: torch.Tensor | None, value: torch.Tensor | float) -> None:
    """Write the column of each prompt's own key: index t_b of the last axis of [B, ..., T]."""
    if last is None:
        tensor[..., -1:] = value
        return
    tensor.scatter_(-1, _index(tensor, last), value)


def _take(tensor: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
    """That column, [B, ..., 1]."""
    return tensor[..., -1:] if last is None else tensor.gather(-1, _index(tensor, last))


def _index(tensor: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return last.view(-1, *[1] * (tensor.dim() - 1)).expand(*tensor.shape[:-1], 1)


def _grouped(bias: torch.Tensor, kv: int) -> torch.Tensor:
    """[B, 1 or heads, 1, T] -> [B, 1 or K, 1 or G, 1, T]."""
    return bias.unsqueeze(2) if bias.shape[1] == 1 else bias.unflatten(1, (kv, -1))
