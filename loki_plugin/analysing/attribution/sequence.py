"""`path="sequence"`: the authors' present, Captum-based variant, for people who compare with it.

It scales the whole layer's output, from its output on a prompt of token id 0:
score[l, j] = (z - z⁰)_t[j] · Σ_k w_k ∂p/∂z_t[j] at z⁰ + α_k (z - z⁰) for all positions. Only the
last token's gradient is wanted, so every position runs forwards from layer l upwards without
gradients, and one token runs again with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from ..calibration.prompts import Prompt
from .attention import AttentionState, Mode, PrefixDone
from .devices import Copies, first_device, send
from .engine import watched
from .head import head_gradient, resolve_targets
from .quadrature import Rule
from .replay import Args, Kwargs, call, hidden_of, known_answers, linears_of, replay


def attribute_sequences(
    model: nn.Module, anatomy: Anatomy, prompts: Sequence[Prompt], rule: Rule
) -> torch.Tensor:
    """Scores [B, L, H] of one batch; the arguments of `engine.attribute_batch`.

    Work per prompt: S·T·L/2 token-forwards; prompts run one after another.
    """
    return torch.stack([_attribute_one(model, anatomy, prompt, rule) for prompt in prompts])


class _Pass:
    """One run of the decoder over a prompt [1, T].

    Attributes:
        calls: what every layer was given.
        memo: what every linear answered, [1, T, F].
        hidden: the final states [1, T, H].
    """

    def __init__(self, anatomy: Anatomy, ids: torch.Tensor):
        self.calls: list[tuple[Args, Kwargs]] = []
        self.memo: dict[nn.Module, torch.Tensor] = {}
        with ExitStack() as hooks, torch.no_grad():
            for layer in anatomy.layers:
                hook = layer.register_forward_pre_hook(self._record, with_kwargs=True)
                hooks.enter_context(removing(hook))
                for module in linears_of(layer).values():
                    hooks.enter_context(removing(module.register_forward_hook(self._remember)))
            self.hidden = anatomy.decoder(input_ids=ids, use_cache=False).last_hidden_state

    def _record(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if any(isinstance(v, MutableMapping) for v in kwargs.values()):
            raise ValueError(
                f"{type(layer).__name__} hands keys on to later layers, which `path: sequence` does"
                " not support; use `path: token`"
            )
        self.calls.append((args, kwargs))

    def _remember(self, module: nn.Module, args: Args, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.memo[module] = output.view(1, -1, output.shape[-1]).clone()  # see `Stack`


def _attribute_one(model: nn.Module, anatomy: Anatomy, prompt: Prompt, rule: Rule) -> torch.Tensor:
    """Scores [L, H] of one prompt."""
    # 1. Both ends of the path: the layers' outputs on token id 0, and on the prompt.
    device = first_device(model)
    ids = send(torch.tensor([prompt.ids]), device)  # [1, T]
    state = AttentionState(last=Copies([len(prompt.ids) - 1]), final_layer=-1, uniform=True)
    nodes, weights = Copies(rule.nodes), Copies(rule.weights)
    scores = []
    with state, watched(model, anatomy, state):
        zero = _Pass(anatomy, torch.zeros_like(ids))
        base = _Pass(anatomy, ids)
        y = resolve_targets(model, anatomy, base.hidden[:, -1], [prompt])  # [1]
        kept = state.keys, state.values, state.kept
        for i, down in enumerate(anatomy.down):
            # 2. S points of the path at all positions, and the keys that they give above layer i.
            path = base.memo[down] - zero.memo[down]  # [1, T, H]
            alpha = nodes.on(path.device, path.dtype)[:, None, None]  # [S, 1, 1]
            outputs = zero.memo[down] + alpha * path  # [S, T, H]
            state.keys, state.values, state.kept = (dict(k) for k in kept)  # type: ignore[assignment]
            _keep_above(anatomy, state, base, i, outputs)
            # 3. The last token again, with gradients; layer i makes S of it.
            leaf = outputs[:, -1:].detach().requires_grad_()  # [S, 1, H]
            with _fanning_out(anatomy, state, base, i, leaf), torch.enable_grad():
                hidden = anatomy.decoder(
                    input_ids=ids[:, -1:],
                    position_ids=state.last.on(device)[None],
                    use_cache=False,
                ).last_hidden_state  # [S, 1, H]
            # 4. The head, the backward, and the sum over the path.
            of_y = y.expand(rule.steps)
            upstream, p = head_gradient(model, anatomy, hidden.detach(), of_y)  # [S, 1, H], [S, 1]
            factors = weights.on(p.device, p.dtype) * p[:, 0]  # [S]
            (grad,) = torch.autograd.grad(hidden, leaf, upstream)
            total = torch.einsum("s,sh->h", factors.to(grad.device), grad[:, 0].to(p.dtype))
            scores.append((path[0, -1].to(p.dtype) * total).to(device))
    return torch.stack(scores)


def _keep_above(
    anatomy: Anatomy, state: AttentionState, base: _Pass, i: int, outputs: torch.Tensor
) -> None:
    """Run all positions from layer i upwards, for the keys and values of the layers above.

    `outputs` [S, T, H]: what the down-projection of layer i answers.
    """
    with torch.no_grad():
        args, kwargs = base.calls[i]
        known = known_answers(anatomy.layers[i], anatomy.down[i], base.memo)
        answers = {m: answer.expand(len(outputs), -1, -1) for m, answer in known.items()}
        answers[anatomy.down[i]] = outputs.clone()
        given = hidden_of(args, kwargs).expand(len(outputs), -1, -1)  # [S, T, H]
        hidden = replay(state, anatomy.layers[i], args, kwargs, given, answers)
        state.mode, state.final_layer = Mode.PREFIX, anatomy.num_layers - 1
        try:
            for m in range(i + 1, anatomy.num_layers):
                hidden = call(anatomy.layers[m], *base.calls[m], hidden)
        except PrefixDone:
            pass


@contextmanager
def _fanning_out(
    anatomy: Anatomy, state: AttentionState, base: _Pass, i: int, leaf: torch.Tensor
) -> Iterator[None]:
    """For the duration, layer i's output for the one token becomes S, one per point `leaf`."""
    state.mode = Mode.STACK
    hook = _fan_out(anatomy, state, base, i, leaf)
    with removing(anatomy.layers[i].register_forward_hook(hook, with_kwargs=True)):
        yield


def _fan_out(
    anatomy: Anatomy, state: AttentionState, base: _Pass, i: int, leaf: torch.Tensor
) -> Callable[[nn.Module, Args, Kwargs, Any], Any]:
    def fan_out(layer: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if state.mode is Mode.REPLAY:
            return output
        known = known_answers(layer, anatomy.down[i], base.memo)
        answers = {m: answer[:, -1:].expand(len(leaf), -1, -1) for m, answer in known.items()}
        answers[anatomy.down[i]] = leaf.clone()
        given = hidden_of(args, kwargs).detach().expand(len(leaf), -1, -1)  # [S, 1, H]
        new = replay(state, layer, args, kwargs, given, answers)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return fan_out
