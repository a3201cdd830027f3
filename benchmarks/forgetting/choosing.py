"""Other ways to choose rows, tried beside LoKI's own: what do they keep?"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.forgetting.base import encode, padded
from loki_plugin import attribute
from loki_plugin.model.anatomy import find_anatomy

# How many prefixes of a prompt are scored where all its tokens shall count.
_PREFIXES = 3


def smallest_weights(context: Any, quota: float) -> list[torch.Tensor]:
    """Rows of the smallest norm: no data is needed."""
    norms = [d.weight.detach().norm(dim=1) for d in find_anatomy(context.base.model()).down]
    return [lowest(n, quota) for n in norms]


def fisher(context: Any, directions: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """L tensors [H]: F_j = E[(∂ log p / ∂ z_j)² · ‖x‖²], over the answers of the calibration.

    z [H] is the down-projection's output and x [I] its input at one token, so that F_j is the
    diagonal Fisher information of row j, summed over its I weights. With `directions` U [I, u] per
    layer only what the update can read counts: ‖x − U Uᵀ x‖² instead of ‖x‖², soft ones too.
    """
    base, model = context.base, context.base.model().eval()
    down = find_anatomy(model).down
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(layer):
        def hook(module, inputs, output):
            output.retain_grad()
            seen[layer] = (inputs[0].detach(), output)

        return hook

    handles = [d.register_forward_hook(watch(i)) for i, d in enumerate(down)]
    totals = [torch.zeros(d.weight.shape[0]) for d in down]
    for item in base.world.calibration():
        ids, given = encode(base.tokenizer, item)
        logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        log_p = logits[given - 1 :].log_softmax(-1)
        log_p.gather(1, torch.tensor(ids[given:])[:, None]).sum().backward()
        for layer, (x, z) in seen.items():
            if directions is not None:
                x = x - x @ directions[layer] @ directions[layer].T
            energy = x.square().sum(-1, keepdim=True)
            totals[layer] += (z.grad.square() * energy).sum((0, 1))
        model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    return totals


def lowest(values: torch.Tensor, quota: float) -> torch.Tensor:
    """The rows of the lowest values, ascending, as many as `quota` percent."""
    return values.argsort()[: int(quota * len(values) / 100)].sort().values


def lowest_of_all(values: list[torch.Tensor], quota: float) -> list[torch.Tensor]:
    """The lowest over all layers together, each layer scaled to nothing: a free balance."""
    limit = torch.cat(values).sort().values[int(quota * sum(map(len, values)) / 100)]
    return [(v < limit).nonzero().flatten() for v in values]


def at_activation(context: Any) -> torch.Tensor:
    """z · ∂p/∂z where the model is, without integrating [N, L, H]."""
    return attribute(context.base.model(), *padded(context.prompts), n_steps=1, rule="right")


def all_tokens(context: Any) -> torch.Tensor:
    """Scores of prefixes that end at tokens of the whole prompt, not at its last one only."""
    cut = [
        p[: max(1, len(p) * (k + 1) // (_PREFIXES + 1))]
        for p in context.prompts
        for k in range(_PREFIXES)
    ]
    return torch.cat([context.scores, attribute(context.base.model(), *padded(cut))])


def one_kind(context: Any) -> torch.Tensor:
    """Only the questions about people: a narrow calibration."""
    which = [i for i, x in enumerate(context.base.world.calibration()) if x.kind == "people"]
    return context.scores[which]


def with_text(context: Any) -> torch.Tensor:
    """Prefixes of plain text besides the questions."""
    cut = [t[:k] for t in context.text for k in (16, 32, 64) if len(t) >= k]
    return torch.cat([context.scores, attribute(context.base.model(), *padded(cut))])
