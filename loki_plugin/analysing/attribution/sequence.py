"""`path="sequence"`: the authors' present, Captum-based variant, for people who compare with it.

It scales the whole layer's output, from its output on a prompt of token id 0:
score[l, j] = (z - z⁰)_t[j] · Σ_k w_k ∂p/∂z_t[j] at z⁰ + α_k (z - z⁰) for all positions. Only the
last token's gradient is wanted, so every position runs forwards from layer l upwards without
gradients, and one token runs again with them.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack

import torch
from torch import nn

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from .attention import AttentionState, PrefixDone
from .engine import watched
from .head import head_gradient, resolve_targets
from .replay import call, hidden_of, known_answers, linears_of, replay


def attribute_sequences(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: list[torch.Tensor],
    targets: list[int | None],
    nodes: list[float],
    weights: list[float],
) -> torch.Tensor:
    """Scores [B, L, H] of one batch; the arguments of `engine.attribute_batch`.

    Work per prompt: S·T·L/2 token-forwards; prompts run one after another.
    """
    return torch.stack(
        [
            _attribute_one(model, anatomy, prompt, target, nodes, weights)
            for prompt, target in zip(prompts, targets, strict=True)
        ]
    )


class _Pass:
    """One run of the decoder over a prompt: what every layer was given and what it answered."""

    def __init__(self, anatomy: Anatomy, state: AttentionState, ids):
        self.calls: list[tuple[tuple, dict]] = []
        self.memo: dict[nn.Module, torch.Tensor] = {}
        with ExitStack() as hooks, torch.no_grad():
            for layer in anatomy.layers:
                hook = layer.register_forward_pre_hook(self._record, with_kwargs=True)
                hooks.enter_context(removing(hook))
                for module in linears_of(layer).values():
                    hooks.enter_context(removing(module.register_forward_hook(self._remember)))
            self.hidden = anatomy.decoder(input_ids=ids, use_cache=False).last_hidden_state

    def _record(self, layer, args, kwargs):
        if any(isinstance(v, MutableMapping) for v in kwargs.values()):
            raise ValueError(
                f"{type(layer).__name__} hands keys on to later layers, which `path: sequence` does"
                " not support; use `path: token`"
            )
        self.calls.append((args, kwargs))

    def _remember(self, module, args, output):
        if isinstance(output, torch.Tensor):
            self.memo[module] = output.view(1, -1, output.shape[-1]).clone()  # see `Stack`


def _attribute_one(model, anatomy, prompt, target, nodes, weights):
    device = model.get_input_embeddings().weight.device
    ids = prompt.to(device)[None]
    last = torch.tensor([len(prompt) - 1], device=device)
    final = anatomy.num_layers - 1
    alpha = torch.tensor(nodes, device=device)[:, None, None]
    state = AttentionState(last=last, final_layer=-1, uniform=True)
    scores = []
    with state, watched(model, anatomy, state):
        zero = _Pass(anatomy, state, torch.zeros_like(ids))
        base = _Pass(anatomy, state, ids)
        y = resolve_targets(model, anatomy, base.hidden[:, -1:], [target])
        kept = state.keys, state.values
        for i, down in enumerate(anatomy.down):
            path = base.memo[down] - zero.memo[down]  # [1, T, H]
            outputs = zero.memo[down] + alpha.to(path.dtype) * path  # [S, T, H]
            state.keys, state.values = (dict(k) for k in kept)
            _keep_above(anatomy, state, base, i, outputs, final)
            leaf = outputs[:, -1:].detach().requires_grad_()  # [S, 1, H]
            state.mode = "stack"
            hook = anatomy.layers[i].register_forward_hook(
                _fan_out(anatomy, state, base, i, leaf), with_kwargs=True
            )
            with removing(hook), torch.enable_grad():
                hidden = anatomy.decoder(
                    input_ids=ids[:, -1:], position_ids=last[None], use_cache=False
                ).last_hidden_state
            upstream, p = head_gradient(model, anatomy, hidden.detach(), y.expand(len(nodes)))
            (grad,) = torch.autograd.grad(hidden, leaf, upstream)
            factors = torch.tensor(weights, device=device, dtype=p.dtype) * p[:, 0]
            total = torch.einsum("s,sh->h", factors, grad[:, 0].to(p.dtype))
            scores.append(path[0, -1].to(p.dtype) * total)
    return torch.stack(scores)


def _keep_above(anatomy, state, base, i, outputs, final) -> None:
    """Run all positions from layer i upwards, for the keys and values of the layers above."""
    with torch.no_grad():
        args, kwargs = base.calls[i]
        known = known_answers(anatomy.layers[i], anatomy.down[i], base.memo)
        answers = {m: answer.expand(len(outputs), -1, -1) for m, answer in known.items()}
        answers[anatomy.down[i]] = outputs.clone()
        rows = hidden_of(args, kwargs).expand(len(outputs), -1, -1)
        hidden = replay(state, anatomy.layers[i], args, kwargs, rows, answers)
        state.mode, state.final_layer = "prefix", final
        try:
            for m in range(i + 1, anatomy.num_layers):
                hidden = call(anatomy.layers[m], *base.calls[m], hidden)
        except PrefixDone:
            pass


def _fan_out(anatomy, state, base, i, leaf):
    """Layer i's output for the one token becomes S outputs, one for each point of the path."""

    def fan_out(layer, args, kwargs, output):
        if state.mode == "replay":
            return output
        known = known_answers(layer, anatomy.down[i], base.memo)
        answers = {m: answer[:, -1:].expand(len(leaf), -1, -1) for m, answer in known.items()}
        answers[anatomy.down[i]] = leaf.clone()
        rows = hidden_of(args, kwargs).detach().expand(len(leaf), -1, -1)
        new = replay(state, layer, args, kwargs, rows, answers)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return fan_out
