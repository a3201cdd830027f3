"""The growing stack of last tokens."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ...model.hooks import removing
from .replay import hidden_of, known_answers, linears_of, replay


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
