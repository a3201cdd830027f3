"""The growing stack: all (layer, step) pairs of a batch of prompts in one pass upwards.

Attention is causal, so replacing the last token's down-projection output at layer l changes nothing
at earlier positions. Each (layer, step) pair is one more token at the prompt's last position, alive
from layer l upwards, that attends to the kept prefix and to itself. Work per prompt: T + S·(L+1)/2
token-forwards instead of the obvious loop's L·S·T. It is exact, not an approximation.

Letters of shapes: B prompts, T tokens, n stack tokens per prompt, L layers, H rows of a layer,
S nodes of the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, masking_utils

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from ...model.quantised import quantised_modules
from ..calibration.prompts import Prompt
from . import attention
from .attention import AttentionState, Mode, PrefixDone
from .devices import Copies, first_device, send
from .head import head_gradient, resolve_targets
from .norms import fused_norms
from .quadrature import Rule
from .quiet import implementation
from .recurrence import has_recurrences, kept_recurrences
from .rope import fused_rope
from .stack import Stack

# Tokens that prompts must have in common before they run apart from the rest.
_SHARED = 16
# Tokens that this must save a batch on a GPU, where it costs up to 900 kernels more (1,600 in NF4).
_SAVED_ON_GPU, _SAVED_QUANTISED = 200, 400


class Integral(NamedTuple):
    """Scores [B, L, H], and p of the plain token and of every (layer, node), [B, 1 + L·S]."""

    scores: torch.Tensor
    p: torch.Tensor


def attribute_batch(
    model: nn.Module, anatomy: Anatomy, prompts: Sequence[Prompt], rule: Rule
) -> torch.Tensor:
    """Scores of one batch: z_l[j] · Σ_k w_k ∂p/∂z_l[j] at z_l = α_k z_l -> [B, L, H].

    `model` must be inside `quiet(model)`. A prompt without a target takes the model's own arg-max.
    The result is on the model's first device, float32 (float64 for a float64 model).
    """
    return integrate(model, anatomy, prompts, rule).scores


def convergence_error(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: Sequence[Prompt],
    rule: Rule,
    integrate: Callable[[nn.Module, Anatomy, Sequence[Prompt], Rule], Integral],
) -> float:
    """How far the scores of some prompts are from completeness.

    Integrated gradients add up to the change of p; a finite sum misses it by
    Σ |Σ_j score[l, j] - (p(z_l) - p(0))| / Σ |p(z_l) - p(0)|, over all prompts and layers, by the
    scores of `integrate`.
    """
    # One more node at z_l = 0, which does not count.
    with_zero = Rule((*rule.nodes, 0.0), (*rule.weights, 0.0))
    missed = moved = 0.0
    for prompt in prompts:
        scores, p = integrate(model, anatomy, [prompt], with_zero)
        change = p[:, :1] - p[:, 1:].view(1, -1, with_zero.steps)[..., -1]  # [1, L]
        missed += float((scores.sum(-1) - change).abs().sum())
        moved += float(change.abs().sum())
    return missed / moved if moved else 0.0


def integrate(
    model: nn.Module, anatomy: Anatomy, prompts: Sequence[Prompt], rule: Rule
) -> Integral:
    """Scores and probabilities of one batch, both on the model's first device."""
    # 1. to 3. The prompts once, then all (layer, step) branches in one stack.
    device = first_device(model)
    state = batch_state(anatomy, prompts, worth_sharing(prompts, least_saving(model, device)))
    with state, ExitStack() as hooks:
        hooks.enter_context(watched(model, anatomy, state))
        stack, hidden = climb(anatomy, state, prompts, rule, device)
    # 4. The head: y from the plain token, p of every token, ∂log p of every final state.
    states = hidden.detach()
    y = resolve_targets(model, anatomy, states[:, 0], prompts)  # [B]
    upstream, p = head_gradient(model, anatomy, states, y)  # [B, n, H], [B, n]
    # 5. What each node's ∂log p counts for: w·p, since ∂p = p · ∂log p. The backward carries log p,
    #    which no half precision underflows.
    w = Copies(rule.weights).on(p.device, p.dtype)  # [S]
    factors = w * p[:, 1:].view(len(prompts), -1, rule.steps)  # [B, L, S]
    # 6. One backward to all nodes of all layers.
    grads = torch.autograd.grad(hidden, stack.leaves, upstream)  # L of [B, S, H]
    # 7. The sum over the nodes, times z.
    grad = _together(grads, device).to(p.dtype)  # [L, B, S, H]
    z = _together(stack.outputs, device)[:, :, 0].transpose(0, 1)  # [B, L, H]
    total = torch.einsum("bls,lbsh->blh", factors.to(device, non_blocking=True), grad)
    return Integral(total * z, p.to(device, non_blocking=True))


def batch_state(anatomy: Anatomy, prompts: Sequence[Prompt], shared: int = 0) -> AttentionState:
    """What the passes over a batch must know of it.

    What prompts share runs apart only where attention alone would see it.
    """
    recurrent = has_recurrences(anatomy)
    lengths = [len(p.ids) for p in prompts]
    return AttentionState(
        last=Copies([n - 1 for n in lengths]),
        # A recurrence beside attention may run after it.
        final_layer=-1 if recurrent else anatomy.num_layers - 1,
        uniform=len(set(lengths)) == 1,
        shared=0 if recurrent else shared,
    )


def climb(
    anatomy: Anatomy,
    state: AttentionState,
    prompts: Sequence[Prompt],
    rule: Rule,
    device: torch.device,
    gradients: bool = True,
) -> tuple[Stack, torch.Tensor]:
    """The stack with its leaves, and its tokens' final states [B, 1 + L·S, H].

    To be called inside `state` and `watched`.
    """
    # 1. The batch: ids padded on the right, after every real token, where no causal query looks.
    ids = padded(prompts, device)  # [B, T]
    # 2. The prompts once, without gradients: every layer's keys and values.
    run_prefix(anatomy, state, ids)
    # 3. The last token alone; behind each layer S tokens more stand beside it.
    stack = Stack(anatomy, state, rule, len(prompts))
    with stack.hooked(), torch.set_grad_enabled(gradients):
        hidden = run_last(anatomy, state, ids)
        # [B, 1 + L·S, H]; GPT-2 flattens prompts and tokens
        return stack, hidden.reshape(len(prompts), -1, hidden.shape[-1])


def run_last(anatomy: Anatomy, state: AttentionState, ids: torch.Tensor) -> torch.Tensor:
    """Each prompt's last token alone, on what was kept of the others: its final state [B, 1, H]."""
    state.mode = Mode.STACK
    last = state.last.on(ids.device)[:, None]  # [B, 1]
    return anatomy.decoder(
        input_ids=ids.gather(1, last), position_ids=last, use_cache=False
    ).last_hidden_state


def _together(by_layer: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """L tensors of a shape as one [L, ...] on `device`."""
    return torch.stack([x.to(device, non_blocking=True) for x in by_layer])


def padded(prompts: Sequence[Prompt], device: torch.device) -> torch.Tensor:
    """Token ids [B, T], zeros on the right, on `device`."""
    width = max(len(p.ids) for p in prompts)
    return send(torch.tensor([[*p.ids, *[0] * (width - len(p.ids))] for p in prompts]), device)


def shared_prefix(prompts: Sequence[Prompt]) -> int:
    """How many first tokens all prompts have in common; 0 if they are few."""
    if len(prompts) < 2:
        return 0
    # All lie between the least and the greatest, and so does what all begin with.
    least, greatest = min(p.ids for p in prompts), max(p.ids for p in prompts)
    longest = min(len(p.ids) for p in prompts) - 1  # the last token stays outside
    common = 0
    while common < longest and least[common] == greatest[common]:
        common += 1
    return common if common >= _SHARED else 0


def worth_sharing(prompts: Sequence[Prompt], least: int) -> int:
    """`shared_prefix` if all but one of the prompts save `least` tokens in all, else 0."""
    common = shared_prefix(prompts)
    return common if common * (len(prompts) - 1) >= least else 0


def least_saving(model: nn.Module, device: torch.device) -> int:
    """How many tokens a run apart must save a batch before it pays."""
    if device.type != "cuda":
        return 0
    return _SAVED_QUANTISED if quantised_modules(model) else _SAVED_ON_GPU


@contextmanager
def watched(model: nn.Module, anatomy: Anatomy, state: AttentionState) -> Iterator[None]:
    """The model as the passes need it, and `state` told which layer runs.

    Plain attention calls and recurrences are caught where the family has them, plain norms and rope
    are fused, and nothing reads the device.
    """
    with ExitStack() as stack:
        stack.enter_context(_unasked())
        stack.enter_context(fused_norms(model))
        stack.enter_context(fused_rope(anatomy))
        stack.enter_context(kept_recurrences(anatomy))
        if implementation(model) == "sdpa":
            stack.enter_context(attention.SdpaCalls())
        for i, layer in enumerate(anatomy.layers):
            stack.enter_context(removing(layer.register_forward_pre_hook(_at(state, i))))
        yield


@contextmanager
def _unasked() -> Iterator[None]:
    """Answer two questions of transformers that read the device, and so wait for it, every batch.

    Do the position ids hold several sequences? Ours count up from 0, or are one. Does the padding
    mask hide a token? The engine gives none, so what a family makes itself (OPT) hides nothing.
    """
    packed, ignore = (
        masking_utils.find_packed_sequence_indices,
        masking_utils._ignore_causal_mask_sdpa,
    )

    def without_padding(padding_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> bool:
        return ignore(None, *args, **kwargs)

    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    masking_utils._ignore_causal_mask_sdpa = without_padding
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = packed
        masking_utils._ignore_causal_mask_sdpa = ignore


def _at(state: AttentionState, index: int) -> Callable[[nn.Module, tuple], None]:
    def enter_layer(module: nn.Module, args: tuple) -> None:
        state.layer, state.attended, state.mixed = index, False, 0

    return enter_layer


def run_prefix(anatomy: Anatomy, state: AttentionState, ids: torch.Tensor) -> None:
    """Keep the keys and values of prompts [B, T]; what all of them begin with runs once."""
    # Without a config, so that it never cuts to a window.
    past: Any = DynamicCache() if state.shared else None
    if state.shared:
        state.mode = Mode.SHARED
        _run_to_last_keys(anatomy, ids[:1, : state.shared], past)
        past.batch_repeat_interleave(len(ids))
    state.mode = Mode.PREFIX
    _run_to_last_keys(anatomy, ids[:, state.shared :], past)
    seen = {*state.keys, *(layer for layer, _ in state.kept)}
    if len(seen) == anatomy.num_layers:
        return
    raise ValueError(
        f"model family '{anatomy.decoder.config.model_type}' does not attend through transformers'"
        " attention interface or scaled_dot_product_attention in every layer (seen in layers"
        f" {sorted(seen)}), so its keys and values cannot be kept"
    )


def _run_to_last_keys(anatomy: Anatomy, ids: torch.Tensor, past: DynamicCache | None) -> None:
    with suppress(PrefixDone), torch.no_grad():
        anatomy.decoder(input_ids=ids, past_key_values=past, use_cache=past is not None)
