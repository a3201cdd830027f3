"""Attention of the stack against one query at a time, and its hand-written backward."""

from __future__ import annotations

import pytest
import torch

from loki_plugin.analysing.attribution.attention import _eager
from loki_plugin.analysing.attribution.stack_attention import StackAttention

B, KV, GROUPS, N, T, D = 2, 2, 3, 5, 7, 4
LAST = (6, 3)  # index of the last real token of each prompt


def tensors(names, seed=0):
    heads = KV * GROUPS
    shapes = {
        "q": (B, heads, N, D),
        "k": (B, KV, N, D),
        "v": (B, KV, N, D),
        "keys": (B, KV, T, D),
        "values": (B, KV, T, D),
        "bias": (B, heads, 1, T),
        "own_bias": (B, heads, 1, 1),
        "sinks": (heads,),
    }
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(shapes[n], generator=generator, dtype=torch.float64) if n in names else None
        for n in shapes
    }


def plainly(q, k, v, keys, values, bias, own_bias, sinks, scaling, softcap):
    """Prompt by prompt, head by head, query by query: visible prefix keys, then its own."""
    found = []
    for b in range(B):
        for h in range(KV * GROUPS):
            g = h // GROUPS
            for n in range(N):
                key = torch.cat([keys[b, g, : LAST[b]], k[b, g, n][None]])
                value = torch.cat([values[b, g, : LAST[b]], v[b, g, n][None]])
                score = key @ q[b, h, n] * scaling
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                if bias is not None:
                    own = score.new_zeros(1) if own_bias is None else own_bias[b, h, 0]
                    score = score + torch.cat([bias[b, h, 0, : LAST[b]], own])
                if sinks is not None:  # takes weight, has no value
                    score = torch.cat([score, sinks[h][None]])
                found.append(score.softmax(0)[: len(value)] @ value)
    return torch.stack(found).view(B, KV * GROUPS, N, D)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("extras", [(), ("sinks",), ("bias",), ("bias", "own_bias", "sinks")])
def test_forward_and_backward_equal_the_plain_statement(softcap, extras):
    t = tensors({"q", "k", "v", "keys", "values", *extras})
    if t["bias"] is None:  # prompts of two lengths always have a bias that hides the padding
        hidden = torch.arange(T) >= torch.tensor(LAST)[:, None]
        bias = torch.zeros(B, 1, 1, T, dtype=torch.float64)
        bias.masked_fill_(hidden[:, None, None], float("-inf"))
    else:
        hidden = (torch.arange(T) >= torch.tensor(LAST)[:, None])[:, None, None]
        bias = t["bias"].masked_fill(hidden, float("-inf"))
    leaves = [t[n].requires_grad_() for n in ("q", "k", "v")]
    last = torch.tensor(LAST)
    found = StackAttention.apply(
        *leaves, t["keys"], t["values"], bias, t["own_bias"], last, 0.7, softcap, t["sinks"]
    )
    truth = plainly(
        *leaves, t["keys"], t["values"], t["bias"], t["own_bias"], t["sinks"], 0.7, softcap
    )
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(truth, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True])
def test_the_prefix_with_softcap_or_sinks_is_causal_and_exact(sinks):
    t = tensors({"keys", "values", "sinks"})
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(B, KV * GROUPS, T, D, generator=generator, dtype=torch.float64)
    out = _eager(query, t["keys"], t["values"], None, 0.7, 1.5, t["sinks"] if sinks else None)
    for b in range(B):
        for h in range(KV * GROUPS):
            for n in range(T):
                g = h // GROUPS
                score = 1.5 * torch.tanh(t["keys"][b, g, : n + 1] @ query[b, h, n] * 0.7 / 1.5)
                if sinks:
                    score = torch.cat([score, t["sinks"][h][None]])
                truth = score.softmax(0)[: n + 1] @ t["values"][b, g, : n + 1]
                torch.testing.assert_close(out[b, n, h], truth, rtol=1e-12, atol=1e-12)
