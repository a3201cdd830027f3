"""The growing stack of last tokens, and a layer's code run on answers that are given to it."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack, contextmanager
from copy import copy

import torch
from torch import nn

from ..anatomy import in_attention, linear_sizes
from .attention import AttentionState


@contextmanager
def removing(handle):
    try:
        yield
    finally:
        handle.remove()


class Stack:
    """Grows the stack: row 0 is the plain last token, then S rows for each layer passed."""

    def __init__(self, anatomy, state, nodes, batch):
        self.anatomy, self.state, self.nodes, self.batch = anatomy, state, nodes, batch
        self.leaves: list[torch.Tensor] = []  # per layer α_k·z_l, [B, S, H], requires grad
        self.outputs: list[torch.Tensor] = []  # per layer z_l, [B, 1, H]
        self._memo: dict[nn.Module, torch.Tensor] = {}

    @contextmanager
    def hooked(self):
        with ExitStack() as stack:
            for layer, down in zip(self.anatomy.layers, self.anatomy.down, strict=True):
                for module in linears_of(layer).values():
                    stack.enter_context(removing(module.register_forward_hook(self._remember)))
                hook = layer.register_forward_hook(self._grow(down), with_kwargs=True)
                stack.enter_context(removing(hook))
            yield

    def _remember(self, module, args, output):
        # Llama 4's router is a linear that answers with a pair; it runs again in the replay.
        if self.state.mode == "stack" and isinstance(output, torch.Tensor):
            rows = output.view(self.batch, -1, output.shape[-1])  # OPT flattens batch and rows
            self._memo[module] = rows[:, :1].detach().clone()  # Falcon adds to it in place

    def _grow(self, down):
        def grow(layer, args, kwargs, output):
            if self.state.mode != "stack":
                return output
            first = output[0] if isinstance(output, tuple) else output
            z = self._memo[down]
            alpha = torch.tensor(self.nodes, dtype=z.dtype).to(z.device, non_blocking=True)
            leaf = (alpha[:, None] * z).requires_grad_()  # [B, S, H]
            self.outputs.append(z)
            self.leaves.append(leaf)
            rows = leaf.shape[1]
            known = known_answers(layer, down, self._memo)
            answers = {m: answer.expand(-1, rows, -1) for m, answer in known.items()}
            answers[down] = leaf.clone()
            row = _plain(hidden_of(args, kwargs), layer).expand(-1, rows, -1)
            grown = torch.cat([first, replay(self.state, layer, args, kwargs, row, answers)], 1)
            self._memo.clear()
            return (grown, *output[1:]) if isinstance(output, tuple) else grown

        return grow


def _plain(hidden: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    if hidden.dim() != 3:
        raise ValueError(
            f"{type(layer).__name__} takes hidden states of shape {list(hidden.shape)}; loki needs"
            " [batch, tokens, hidden], so it cannot analyse this model family"
        )
    return hidden[:, :1].detach()


def hidden_of(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def call(layer: nn.Module, args: tuple, kwargs: dict, hidden: torch.Tensor) -> torch.Tensor:
    """Call a layer as it was called, on other hidden states; returns hidden states."""
    if args:
        output = layer(hidden, *args[1:], **kwargs)
    else:
        output = layer(**{**kwargs, "hidden_states": hidden})
    return output[0] if isinstance(output, tuple) else output


def replay(state: AttentionState, layer, args, kwargs, hidden, answers) -> torch.Tensor:
    """The layer's own code on `hidden` where every linear answers with what it is given.

    Only norms and residual sums are computed: whatever the family does between its linears is
    exact, and costs next to nothing.
    """
    mode, state.mode = state.mode, "replay"
    # Layers that share keys (Gemma 4) hand them on in a dict, which a replay must not write to.
    kwargs = {k: copy(v) if isinstance(v, MutableMapping) else v for k, v in kwargs.items()}
    try:
        with answering(answers):
            return call(layer, args, kwargs, hidden)
    finally:
        state.mode = mode


def linears_of(layer: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        if linear_sizes(module) and not any(name.startswith(n + ".") for n in found):
            found[name] = module
    return found


def known_answers(
    layer: nn.Module, down: nn.Module, memo: dict[nn.Module, torch.Tensor]
) -> dict[nn.Module, torch.Tensor]:
    """The answers in `memo`, kept in call order, that do not depend on the down-projection.

    Those are attention's and all before it; a linear that ran after it (Gemma 4 has some) runs.
    """
    order = {module: i for i, module in enumerate(memo)}
    return {
        m: memo[m]
        for name, m in linears_of(layer).items()
        if m in memo and (in_attention(name) or order[m] < order[down])
    }


@contextmanager
def answering(answers: dict[nn.Module, torch.Tensor]):
    """For the duration, each module's forward returns the given [B, S, F] tensor."""
    saved = {m: m.__dict__.get("forward") for m in answers}
    try:
        for module, answer in answers.items():
            module.forward = _answer(answer)
        yield
    finally:
        for module, forward in saved.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _answer(tensor):
    def forward(x, *_, **__):
        return tensor if x.dim() == 3 else tensor.reshape(-1, tensor.shape[-1])

    return forward
