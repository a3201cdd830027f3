"""The obvious loop: exact for whatever a model's layers do, and slow.

It needs nothing of the layers: for every layer the whole prompt runs S times with that layer's
down-projection output replaced, and one backward gives the gradients. So it stands in where the
growing stack does not know a mixer, and it is what the stack is checked against. Work per prompt:
L·S·T token-forwards, and their backward above each layer.

Letters of shapes: B prompts of one length T, S nodes of the rule, L layers, H rows of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import nn

from ...choices import BATCH_SIZE, PathName
from ...model.anatomy import Anatomy
from ...model.hooks import removing
from ..calibration.prompts import Prompt
from .batches import SHARE, free_bytes
from .devices import first_device, give_back, out_of_memory, send
from .engine import Integral
from .head import head_gradient, resolve_targets
from .quadrature import Rule

# Tokens that run at once at most: more no longer fill a device better.
_TOKENS = 8192
# What a pass holds beside what it keeps for its backward.
_BESIDE = 2


def attribute_plainly(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: Sequence[Prompt],
    rule: Rule,
    path: PathName,
    batch_size: int | str = BATCH_SIZE,
) -> Iterator[torch.Tensor]:
    """Scores of many prompts, in their order, batch by batch: tensors [b, L, H] on the CPU.

    `model` must be inside `quiet(model)`, attending as it was loaded. Neighbours of one length
    share a batch, so that nothing is padded: an unknown mixer might see it.

    Raises:
        RuntimeError: one copy of one prompt does not fit into memory.
    """
    room = Room(model, anatomy)
    for length, same in groupby(prompts, lambda p: len(p.ids)):
        some = list(same)
        while some:
            if isinstance(batch_size, int):
                at_once = batch_size
            else:
                at_once = max(1, room.copies(length) // rule.steps)
            part, some = some[:at_once], some[at_once:]
            yield integrate_plainly(model, anatomy, part, rule, path, room).scores.cpu()


class Room:
    """How many copies of a prompt run at once, by what the first one kept for its backward.

    That runs alone: a CPU whose memory is full ends the process.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy):
        self.device = first_device(model)
        self.budget = int(SHARE * free_bytes(self.device))
        self.layers = anatomy.num_layers
        self.kept_by_token = 0.0

    def copies(self, length: int) -> int:
        """At least one; one at first."""
        if not self.kept_by_token:
            return 1
        most = max(1, _TOKENS // length)
        return max(1, min(most, int(self.budget / (_BESIDE * self.kept_by_token * length))))

    def saw(self, kept: int, tokens: int) -> None:
        """A pass of `tokens` tokens kept so many bytes."""
        self.kept_by_token = max(self.kept_by_token, kept / tokens)

    def halve(self, copies: int, length: int) -> None:
        """So many copies did not fit."""
        self.kept_by_token = self.budget / (_BESIDE * length * max(1, copies // 2))


def integrate_plainly(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: Sequence[Prompt],
    rule: Rule,
    path: PathName,
    room: Room | None = None,
) -> Integral:
    """Scores [B, L, H] of prompts of one length, and p of the prompts and of every (layer, node).

    The same as `engine.integrate`, with `path` as in `attribute`.
    """
    room = room or Room(model, anatomy)
    device = first_device(model)
    ids = send(torch.tensor([p.ids for p in prompts]), device)  # [B, T]
    length = ids.shape[1]
    outputs, hidden = _outputs(anatomy, ids)  # L of [B, T, H]; [B, 1, H]
    y = resolve_targets(model, anatomy, hidden[:, 0], prompts)  # [B]
    found = [head_gradient(model, anatomy, hidden, y)[1]]  # [B, 1]
    start = [torch.zeros_like(z[:, -1:]) for z in outputs]
    if path == "sequence":
        start, _ = _outputs(anatomy, torch.zeros_like(ids))
    nodes = [(b, node) for b in range(len(ids)) for node in rule.nodes]
    scores = []
    for layer, down in enumerate(anatomy.down):
        whole = outputs[layer] if path == "sequence" else outputs[layer][:, -1:]  # [B, T or 1, H]
        change = whole - start[layer]
        grads, probabilities, at = [], [], 0
        while at < len(nodes):
            some = nodes[at : at + room.copies(length)]
            of = send(torch.tensor([b for b, _ in some]), device)
            alpha = torch.tensor([node for _, node in some], dtype=change.dtype)
            points = start[layer][of] + alpha.to(change.device)[:, None, None] * change[of]
            try:
                grad, p = _gradients(model, anatomy, down, ids[of], y[of], points, room)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(some) == 1:
                    raise RuntimeError(
                        f"one calibration prompt of {length} tokens does not fit into memory;"
                        " lower `calibration.max_tokens`"
                    ) from error
                room.halve(len(some), length)
                grad = None
            if grad is None:  # outside the handler, whose traceback keeps the tensors alive
                give_back()
                continue
            grads.append(grad)
            probabilities.append(p)
            at += len(some)
        p = torch.cat(probabilities).view(len(ids), rule.steps)  # [B, S]
        grad = torch.cat(grads).view(len(ids), rule.steps, -1).to(p.dtype)  # [B, S, H]
        weights = torch.tensor(rule.weights, dtype=p.dtype, device=p.device)
        total = torch.einsum("bs,bsh->bh", (weights * p).to(grad.device), grad)
        scores.append((total * change[:, -1]).to(device))
        found.append(p)
    return Integral(torch.stack(scores, 1), torch.cat([p.to(device) for p in found], 1))


def _outputs(anatomy: Anatomy, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What every down-projection answers on prompts [B, T], L of [B, T, H]; the last final states.

    Raises:
        ValueError: a layer whose down-projection does not run once in a pass.
    """
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if layer in seen:
                raise ValueError(f"{anatomy.names[layer]} runs more than once in a pass")
            seen[layer] = output.reshape(*ids.shape, output.shape[-1]).clone()

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for layer, down in enumerate(anatomy.down):
            hooks.enter_context(removing(down.register_forward_hook(keep(layer))))
        hidden = anatomy.decoder(input_ids=ids, use_cache=False).last_hidden_state
    missing = [name for i, name in enumerate(anatomy.names) if i not in seen]
    if missing:
        raise ValueError(
            f"{missing[0]} does not run in a pass of the model over text; name what trains in"
            " `loki.targets`, a list of names or a regular expression for whole names, with"
            " `quota: 100`, which needs no analysis"
        )
    return [seen[i] for i in range(len(seen))], hidden[:, -1:]


def _gradients(
    model: nn.Module,
    anatomy: Anatomy,
    down: nn.Module,
    ids: torch.Tensor,
    y: torch.Tensor,
    points: torch.Tensor,
    room: Room,
) -> tuple[torch.Tensor, torch.Tensor]:
    """∂log p at the last token, [c, H], and p [c] of c copies whose last outputs are `points`.

    `ids` [c, T], `points` [c, T or 1, H]. The gradient is that of the last token alone.
    """
    length = ids.shape[1]
    leaf = points[:, -1:].detach().requires_grad_()  # [c, 1, H]
    replaced = torch.cat([points[:, :-1].detach(), leaf], 1)

    def replace(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        own = output.reshape(len(ids), length, -1)[:, : length - replaced.shape[1]]
        return torch.cat([own.detach(), replaced], 1).view(output.shape)

    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad():
        with (
            removing(down.register_forward_hook(replace)),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            hidden = anatomy.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1:]
        room.saw(sum(kept.values()), ids.numel())
        upstream, p = head_gradient(model, anatomy, hidden.detach(), y)
        (grad,) = torch.autograd.grad(hidden, leaf, upstream)
    return grad[:, 0], p[:, 0]
