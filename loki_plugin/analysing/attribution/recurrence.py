"""Recurrences and short convolutions, hung into the functions that transformers' families call.

A layer that mixes by a recurrence is to the engine what attention is: one more token from a state
that all branches share. While a prompt runs, the state before its last token is kept; in the stack,
every token is one step from it. With one state S for all n tokens a step is a matrix product:
nothing of the state's size is made for a token. Everything before (projections, norms) and after
(gates, out_proj) is the family's own code, and so is the pass over the prompt.

Letters of shapes: B prompts, T tokens, n stack tokens per prompt, C channels, W the convolution's
width, h heads, P and N (or v and k) the sizes of a head's state.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import softplus
from transformers.activations import ACT2FN

from ...model.anatomy import Anatomy
from .attention import AttentionState, Mode, active

Function = Callable[..., Any]
# What transformers' delta rules add below the root of a norm.
_EPS = 1e-6


@contextmanager
def kept_recurrences(anatomy: Anatomy) -> Iterator[None]:
    """For the duration, the families' recurrences and convolutions serve the running pass."""
    saved = [
        (space, name, space[name])
        for space in _namespaces(anatomy)
        for name in STEPS
        if callable(space.get(name))
    ]
    try:
        for space, name, own in saved:
            space[name] = partial(STEPS[name], own)
        yield
    finally:
        for space, name, own in saved:
            space[name] = own


def has_recurrences(anatomy: Anatomy) -> bool:
    """Whether some layers' code can call one."""
    return any(name in space for space in _namespaces(anatomy) for name in STEPS)


def _namespaces(anatomy: Anatomy) -> list[dict[str, Any]]:
    """Where the layers' code looks its functions up: their classes' files, and a plugin's."""
    found: dict[int, dict[str, Any]] = {}
    for kind in {type(module) for layer in anatomy.layers for module in layer.modules()}:
        forward: Any = inspect.unwrap(kind.forward)
        for space in (vars(sys.modules[kind.__module__]), getattr(forward, "__globals__", {})):
            found[id(space)] = space
    return list(found.values())


def _convolution(
    own: Function,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A causal convolution of each channel: x [B, C, n], weight [C, W] -> [B, C, n]."""
    state = active()
    if state.mode is Mode.REPLAY:
        return x
    width = weight.shape[-1]
    if state.mode is Mode.PREFIX:
        before = torch.arange(1 - width, 0, device=x.device) + _last(state, x)[:, None]  # [B, W-1]
        window = x.gather(2, before.clamp(min=0)[:, None].expand(-1, x.shape[1], -1))
        _keep(state, window * (before >= 0)[:, None])
        return own(x, weight, bias, activation=activation, **kwargs)
    window = _kept(state)  # [B, C, W-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(wide)
    out = (window * taps[:, :-1]).sum(-1, keepdim=True) + x * taps[:, -1:]
    if bias is not None:
        out = out + bias[:, None]
    out = out.to(x.dtype)
    return out if activation is None else ACT2FN[activation](out)


def _delta_rule(
    own: Function,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule: query, key [B, n, h, k], value [B, n, h, v], g, beta [B, n, h].

    S' = e^g S + β k (v - e^g Sᵀk)ᵀ, and the answer S'ᵀq, [B, n, h, v]. Query and key may have fewer
    heads, each for several consecutive ones of the values (transformers 5.24 repeats them late).
    """
    state = active()
    if state.mode is Mode.REPLAY:
        return torch.empty_like(value), None

    def step(at: Callable[[torch.Tensor], torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
        q, k, v, log_decay, rate = (at(x).to(kept.dtype) for x in (query, key, value, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS) for x in (q, k))
        q = q * q.shape[-1] ** -0.5
        if q.shape[2] != v.shape[2]:
            q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        decay, rate = log_decay.exp()[..., None], rate[..., None]  # [B, n, h, 1]
        change = rate * (v - decay * _read(k, kept))
        return decay * _read(q, kept) + (q * k).sum(-1, keepdim=True) * change

    if state.mode is Mode.STACK:
        return step(_as_it_is, _kept(state)).to(value.dtype), None
    before = _before(state, query)[..., None]  # [B, T, 1]
    out, kept = own(
        query, key, value, g=g * before, beta=beta * before, output_final_state=True,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **_without_states(kwargs),
    )  # fmt: skip
    _keep(state, kept)  # [B, h, k, v]
    return _with_last(state, out, step(partial(_at_last, state), kept)), None


def _state_space(
    own: Function,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> torch.Tensor:
    """Mamba-2: x [B, n, h, P], dt [B, n, h], A, D [h], B and C [B, n, groups, N] -> x's shape.

    S' = e^(A·dt) S + dt x Bᵀ, and the answer S'C + D x.
    """
    state = active()
    if z is not None:
        raise ValueError("its state space layers gate inside the scan")
    if state.mode is Mode.REPLAY:
        return torch.empty_like(x)
    dt = _discretised(dt, dt_bias, dt_softplus, dt_limit)

    def step(at: Callable[[torch.Tensor], torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
        xs, steps, reads, writes = (at(t).to(kept.dtype) for t in (x, dt, C, B))
        per_group = xs.shape[2] // reads.shape[2]
        reads, writes = (t.repeat_interleave(per_group, 2) for t in (reads, writes))  # [B, n, h, N]
        steps = steps[..., None]  # [B, n, h, 1]
        decay = (steps * A.to(kept.dtype)[:, None]).exp()
        out = decay * _read(reads, kept.mT) + (reads * writes).sum(-1, keepdim=True) * steps * xs
        return out if D is None else out + D.to(kept.dtype)[:, None] * xs

    if state.mode is Mode.STACK:
        kept, dtype = _kept(state)
        return step(_as_it_is, kept).to(dtype)
    masked = dt * _before(state, x)[..., None]
    out, kept = own(
        x, masked, A, B, C, chunk_size, D=D, return_final_states=True, **_without_states(kwargs)
    )
    _keep(state, (kept, out.dtype))  # [B, h, P, N]
    return _with_last(state, out, step(partial(_at_last, state), kept))


def _selective_scan(
    own: Function,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Mamba-1: x, dt, z [B, C, n], A [C, N], B and C [B, N, n] -> [B, C, n].

    As Mamba-2 with a decay for each element of the state; then gated by silu(z).
    """
    state = active()
    if state.mode is Mode.REPLAY:
        return torch.empty_like(x)
    bias = None if delta_bias is None else delta_bias[:, None]
    dt = _discretised(dt, bias, delta_softplus, (0.0, float("inf")))

    def step(at: Callable[[torch.Tensor], torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
        # [B, n, C] and [B, n, N]
        xs, steps, reads, writes = (at(t.mT).to(kept.dtype) for t in (x, dt, C, B))
        decayed = (steps[..., None] * A.to(kept.dtype)).exp() * kept[:, None]  # [B, n, C, N]
        out = (decayed @ reads[..., None])[..., 0]
        out = out + (reads * writes).sum(-1, keepdim=True) * steps * xs
        if D is not None:
            out = out + D.to(kept.dtype) * xs
        if z is not None:
            out = out * nn.functional.silu(at(z.mT).to(kept.dtype))
        return out

    if state.mode is Mode.STACK:
        kept, dtype = _kept(state)
        return step(_as_it_is, kept).mT.to(dtype)
    masked = dt * _before(state, x.mT)[:, None]
    kwargs = _without_states(kwargs)
    out, kept = own(x, masked, A, B, C, D=D, z=z, return_last_state=True, **kwargs)
    kept = kept.to(torch.promote_types(kept.dtype, torch.float32))  # [B, C, N]
    _keep(state, (kept, out.dtype))
    return _with_last(state, out.mT, step(partial(_at_last, state), kept)).mT


STEPS: dict[str, Function] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "mamba2_chunk_scan": _state_space,
    "mamba_selective_scan": _selective_scan,
}


def _discretised(
    dt: torch.Tensor,
    bias: torch.Tensor | None,
    by_softplus: bool,
    limit: tuple[float, float],
) -> torch.Tensor:
    """The step sizes, so that what masks a token can follow: none of them is 0 by itself."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if bias is not None:
        dt = dt + bias
    if by_softplus:
        dt = softplus(dt)
    return dt.clamp(*limit)


def _read(queries: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """queries [B, n, h, k] from states [B, h, k, v] -> [B, n, h, v]."""
    return (queries.transpose(1, 2) @ kept).transpose(1, 2)


def _without_states(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the family's function beside states, which are ours here."""
    states = ("initial_state", "initial_states", "output_final_state")
    asked = ("return_final_states", "return_last_state")
    return {k: v for k, v in kwargs.items() if k not in (*states, *asked)}


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _last(state: AttentionState, x: torch.Tensor) -> torch.Tensor:
    """[B]: each prompt's last token, where `x` is; copies of one prompt have one."""
    return state.last.on(x.device).expand(len(x))


def _before(state: AttentionState, x: torch.Tensor) -> torch.Tensor:
    """[B, T] for x [B, T, ...]: whether a token stands before its prompt's last one."""
    return state.before(x.device, x.shape[1])[:, 0, 0]


def _at_last(state: AttentionState, x: torch.Tensor) -> torch.Tensor:
    """The last token [B, 1, ...] of x [B, T, ...]."""
    index = _last(state, x).view(-1, *[1] * (x.dim() - 1)).expand(-1, 1, *x.shape[2:])
    return x.gather(1, index)


def _with_last(state: AttentionState, out: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """out [B, T, ...] with the last token's `answer` [B, 1, ...], which the masked pass lacks."""
    index = _last(state, out).view(-1, *[1] * (out.dim() - 1)).expand(-1, 1, *out.shape[2:])
    return out.scatter(1, index, answer.to(out.dtype))


def _keep(state: AttentionState, what: Any) -> None:
    """For the stack, by the layer that runs and how many it has kept in this call."""
    state.kept[state.layer, state.mixed] = what
    state.mixed += 1


def _kept(state: AttentionState) -> Any:
    """What the same call of the same layer kept."""
    state.mixed += 1
    return state.kept[state.layer, state.mixed - 1]
