"""The growing stack of last tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from .attention import AttentionState, Mode
from .devices import Copies
from .quadrature import Rule
from .replay import hidden_of, known_answers, linears_of, replay


class Stack:
    """Grows the stack: token 0 is the plain last one, then S tokens for each layer passed.

    Attributes:
        leaves: per layer α_k·z_l, [B, S, H], requires grad.
        outputs: per layer z_l, [B, 1, H].
    """

    def __init__(self, anatomy: Anatomy, state: AttentionState, rule: Rule, batch: int):
        self.anatomy, self.state, self.batch = anatomy, state, batch
        self.nodes = Copies(rule.nodes)
        self.leaves: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self._memo: dict[nn.Module, torch.Tensor] = {}  # the plain token's answers, [B, 1, F]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, down in zip(self.anatomy.layers, self.anatomy.down, strict=True):
                for module in linears_of(layer).values():
                    stack.enter_context(removing(module.register_forward_hook(self._remember)))
                hook = layer.register_forward_hook(self._grow(down), with_kwargs=True)
                stack.enter_context(removing(hook))
            yield

    def _remember(self, module: nn.Module, args: tuple, output: Any) -> None:
        # Llama 4's router is a linear that answers with a pair; it runs again in the replay.
        if self.state.mode is Mode.STACK and isinstance(output, torch.Tensor):
            answer = output.view(self.batch, -1, output.shape[-1])  # OPT: [B·n, F] -> [B, n, F]
            plain = answer[:, :1].detach()
            # What goes into the residual stream may be added to in place (Falcon).
            wide = plain.shape[-1] == self.anatomy.hidden_size
            self._memo[module] = plain.clone() if wide else plain

    def _grow(self, down: nn.Module) -> Callable[[nn.Module, tuple, dict, Any], Any]:
        def grow(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if self.state.mode is not Mode.STACK:
                return output
            first = output[0] if isinstance(output, tuple) else output  # [B, n, H]
            z = self._memo[down]  # [B, 1, H]
            alpha = self.nodes.on(z.device, z.dtype)[:, None]  # [S, 1]
            leaf = (alpha * z).requires_grad_()  # [B, S, H]
            self.outputs.append(z)
            self.leaves.append(leaf)
            steps = leaf.shape[1]
            known = known_answers(layer, down, self._memo)
            answers = {m: answer.expand(-1, steps, -1) for m, answer in known.items()}  # [B, S, F]
            answers[down] = leaf.clone()
            given = plain_token(hidden_of(args, kwargs), layer).expand(-1, steps, -1)  # [B, S, H]
            new = replay(self.state, layer, args, kwargs, given, answers)
            grown = torch.cat([first, new], 1)  # [B, n + S, H]
            self._memo.clear()
            return (grown, *output[1:]) if isinstance(output, tuple) else grown

        return grow


def plain_token(hidden: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The plain token [B, 1, H] of what a layer is given, [B, n, H]."""
    if hidden.dim() != 3:
        raise ValueError(
            f"{type(layer).__name__} takes hidden states of shape {list(hidden.shape)}; loki needs"
            " [batch, tokens, hidden], so it cannot analyse this model family"
        )
    return hidden[:, :1].detach()
