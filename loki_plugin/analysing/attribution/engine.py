"""The growing stack: all (layer, step) pairs of a batch of prompts in one pass upwards.

Attention is causal, so replacing the last token's down-projection output at layer l changes nothing
at earlier positions. Each (layer, step) pair is one more token at the prompt's last position, alive
from layer l upwards, that attends to the kept prefix and to itself. Work per prompt: T + S·(L+1)/2
token-forwards instead of the obvious loop's L·S·T. It is exact, not an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

import torch
from torch import nn
from transformers import DynamicCache

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from ...model.quantised import quantised_modules, unpack
from . import attention
from .attention import AttentionState, PrefixDone
from .head import head_gradient, resolve_targets
from .stack import Stack

# Tokens that prompts must have in common before they run apart from the rest.
_SHARED = 16


def attribute_batch(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: list[torch.Tensor],
    targets: list[int | None],
    nodes: list[float],
    weights: list[float],
) -> torch.Tensor:
    """Scores of one batch: z_l[j] · Σ_k w_k ∂p/∂z_l[j] at z_l = α_k z_l -> [B, L, H].

    `model` must be inside `quiet(model)`. `prompts` are 1-D id tensors without padding; a target
    of None is the model's own arg-max. The result is on the model's device, float32 (float64 for
    a float64 model).
    """
    return integrate(model, anatomy, prompts, targets, nodes, weights)[0]


def convergence_error(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: list[torch.Tensor],
    targets: list[int | None],
    nodes: list[float],
    weights: list[float],
) -> float:
    """How far the scores of some prompts are from completeness.

    Integrated gradients add up to the change of p; a finite sum misses it by
    Σ |Σ_j score[l, j] - (p(z_l) - p(0))| / Σ |p(z_l) - p(0)|, over all prompts and layers.
    """
    missed = moved = 0.0
    for prompt, target in zip(prompts, targets, strict=True):
        # One more node at z_l = 0, which does not count.
        scores, p = integrate(model, anatomy, [prompt], [target], [*nodes, 0.0], [*weights, 0.0])
        change = p[:, :1] - p[:, 1:].view(1, -1, len(nodes) + 1)[..., -1]
        missed += float((scores.sum(-1) - change).abs().sum())
        moved += float(change.abs().sum())
    return missed / moved if moved else 0.0


def integrate(model, anatomy, prompts, targets, nodes, weights):
    """Scores [B, L, H], and p of the plain token and of every (layer, node): [B, 1 + L·S]."""
    device = model.get_input_embeddings().weight.device
    lengths = torch.tensor([len(p) for p in prompts])
    # Padding stands on the right, after every real token, where causal attention never looks.
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    last = (lengths - 1).to(device)
    state = AttentionState(
        last=last,
        final_layer=anatomy.num_layers - 1,
        uniform=bool((lengths == lengths[0]).all()),
        shared=shared_prefix(prompts),
    )
    with state, ExitStack() as hooks:
        hooks.enter_context(watched(model, anatomy, state))
        run_prefix(anatomy, state, ids)
        state.mode = "stack"
        stack = Stack(anatomy, state, nodes, len(prompts))
        hooks.enter_context(stack.hooked())
        with torch.enable_grad():
            hidden = anatomy.decoder(
                input_ids=ids.gather(1, last[:, None]),
                position_ids=last[:, None],
                use_cache=False,
            ).last_hidden_state
            hidden = hidden.reshape(len(prompts), -1, hidden.shape[-1])  # GPT-2 flattens the rows
    y = resolve_targets(model, anatomy, hidden[:, :1].detach(), targets)
    upstream, p = head_gradient(model, anatomy, hidden.detach(), y)
    grads = torch.autograd.grad(hidden, stack.leaves, upstream)
    # ∂p = p · ∂log p: the backward carries log p, which no half precision underflows.
    w = torch.tensor(weights, dtype=p.dtype).to(p.device)
    factors = w * p[:, 1:].view(len(prompts), -1, len(nodes))  # [B, L, S]
    scores = [
        z[:, 0].to(p.dtype) * torch.einsum("bs,bsh->bh", factors[:, i].to(g.device), g.to(p.dtype))
        for i, (z, g) in enumerate(zip(stack.outputs, grads, strict=True))
    ]
    return torch.stack([s.to(device) for s in scores], 1), p


def shared_prefix(prompts: list[torch.Tensor]) -> int:
    """How many first tokens all prompts have in common, if they are worth a run of their own."""
    shortest = min(len(p) for p in prompts)
    if len(prompts) < 2 or shortest <= _SHARED:
        return 0
    heads = torch.stack([p[: shortest - 1] for p in prompts])  # the last token stays outside
    common = int((heads == heads[0]).all(0).long().cumprod(0).sum())
    return common if common >= _SHARED else 0


@contextmanager
def quiet(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager]]:
    """Evaluation mode, no parameter gradients, our attention; all put back on the way out.

    Yields a context manager inside which the model attends as it was loaded.
    """
    training = {id(m) for m in model.modules() if m.training}
    trainable = [p for p in model.parameters() if p.requires_grad]
    configs = {id(m.config): m.config for m in model.modules() if _has_attention_setting(m)}
    settings = [(c, c._attn_implementation_internal) for c in configs.values()]
    unpack(model)

    @contextmanager
    def own_attention():
        ours = [config._attn_implementation_internal for config, _ in settings]
        for config, value in settings:
            config._attn_implementation_internal = value
        yield
        for (config, _), value in zip(settings, ours, strict=True):
            config._attn_implementation_internal = value

    try:
        model.eval()
        for module in quantised_modules(model):
            # They have no dropout, and compute as they will train: in evaluation, on a CPU, 4-bit
            # weights would repack themselves and lose their gradient, 8-bit ones round their input.
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(False)
        for config, _ in settings:
            config._attn_implementation_internal = _implementation(model)
        yield own_attention
    finally:
        for config, value in settings:
            config._attn_implementation_internal = value
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in model.modules():
            module.training = id(module) in training


def _implementation(model: nn.Module) -> str:
    """Our entry in transformers' attention interface, or the plain call that we intercept."""
    return attention.NAME if model._supports_attention_backend else "sdpa"


def _has_attention_setting(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation_internal")


@contextmanager
def watched(model: nn.Module, anatomy: Anatomy, state: AttentionState) -> Iterator[None]:
    """Tell `state` which layer runs, and catch plain attention calls where the family has them."""
    with ExitStack() as stack:
        if _implementation(model) == "sdpa":
            stack.enter_context(attention.SdpaCalls())
        for i, layer in enumerate(anatomy.layers):
            stack.enter_context(removing(layer.register_forward_pre_hook(_at(state, i))))
        yield


def _at(state: AttentionState, index: int):
    def enter_layer(module, args):
        state.layer = index

    return enter_layer


def run_prefix(anatomy: Anatomy, state: AttentionState, ids: torch.Tensor) -> None:
    """Keep the keys and values of the prompts; what all of them begin with runs once."""
    past = DynamicCache() if state.shared else None  # without a config: it never cuts to a window
    if state.shared:
        state.mode = "shared"
        _run_to_last_keys(anatomy, state, ids[:1, : state.shared], past)
        past.batch_repeat_interleave(len(ids))
    state.mode = "prefix"
    _run_to_last_keys(anatomy, state, ids[:, state.shared :], past)
    if len(state.keys) == anatomy.num_layers:
        return
    raise ValueError(
        f"model family '{anatomy.decoder.config.model_type}' does not attend through transformers'"
        " attention interface or scaled_dot_product_attention in every layer (seen in layers"
        f" {sorted(state.keys)}), so its keys and values cannot be kept; loki cannot analyse it"
    )


def _run_to_last_keys(anatomy, state, ids, past) -> None:
    with suppress(PrefixDone), torch.no_grad():
        anatomy.decoder(input_ids=ids, past_key_values=past, use_cache=past is not None)
