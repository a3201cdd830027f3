"""Does the growing stack compute what the model itself computes? Asked of every model, once.

Three questions, each in the precision in which its answer is sharp:

1. *Structure, in any precision*: no token of the stack depends on another (`structure`).
2. *Formula, in float32*: both run a layer at a time on widened weights (`widening`), so that what
   they miss of each other is a fault and not rounding.
3. *Rounding, in half precision*: the stack is as near to the float32 answer as the model's own pass
   is. That pass is the yardstick, since both round the same sums.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import nn

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from ...model.quantised import quantised_modules
from ..calibration.prompts import Prompt
from ..precision import products_are_exact
from .devices import first_device, out_of_memory, send
from .engine import batch_state, climb, watched
from .head import logits_of
from .quadrature import Rule
from .quiet import OwnAttention, attending
from .structure import mixing_layers
from .widening import HALF, widened

Answer = TypeVar("Answer")

_checked: WeakSet[nn.Module] = WeakSet()
# A point outside the path moves the final state further than one on it, and so shows more.
_NODE = -1.0
# What float32 may miss: of what a layer's change does to the final state, and of that state. Sound
# families miss 2e-5 and 3e-5 at most.
_OF_EFFECT, _OF_STATE = 1e-3, 2e-4
# How much further than the model's own pass the stack may be from float32: sound families are at
# 0.5 to 1.6. And a pass that is further from it than half of what is looked for shows nothing.
_OF_ROUNDING, _OF_NOISE = 2.5, 0.5
# Rounding is measured on the plain token and this many layers.
_LAYERS = 8
# The head's products may round in another order: this share of the largest logit, or so many steps.
_OF_LOGIT, _ROUNDINGS = 1e-4, 8
# One prompt may send a token to another expert by rounding; a wrong formula misses on all.
_TRIES = 3
# The check takes the beginning of a long prompt, and this many tokens at once.
_PROMPT, _TOKENS = 256, 4096


class NotReproduced(ValueError):
    """The fast analysis does not compute what this model computes."""


def check_reproduces(
    model: nn.Module,
    anatomy: Anatomy,
    prompt: Prompt,
    own_attention: OwnAttention,
) -> None:
    """Compare the stack with the model's own pass, where z_l is replaced by -z_l, layer by layer.

    The model runs on one whole copy of `prompt` per layer, with nothing of ours but a hook that
    replaces z_l; what is compared are the final states at the prompt's last token. One layer is
    held in float32 besides. That takes as long as a few prompts do; a model object is checked once.
    `own_attention` is what `quiet(model)` yields.

    Raises:
        NotReproduced: the scores would be wrong.
        ValueError: the model itself does not run here.
    """
    if model in _checked:
        return
    ids = prompt.ids[:_PROMPT]
    _check_head(model, anatomy, ids, own_attention)
    with widened(model, anatomy):
        mixing = _asked(partial(mixing_layers, model, anatomy, ids))
    if mixing:
        kind, count = type(anatomy.layers[mixing[0]]).__name__, len(mixing)
        raise NotReproduced(
            f"{count} of its {anatomy.num_layers} layers ({kind}; the first is layer {mixing[0]})"
            " mix tokens by something that loki does not know"
        )
    for cut in range(_TRIES):
        tried = ids[: max(1, len(ids) - cut)]
        fault = _asked(partial(_fault, model, anatomy, tried, own_attention))
        if fault is None:
            _checked.add(model)
            return
    raise NotReproduced(fault)


def _fault(
    model: nn.Module, anatomy: Anatomy, ids: tuple[int, ...], own_attention: OwnAttention
) -> str | None:
    """What the stack misses of the model's final states on one prompt, in words; None: nothing."""
    changes = range(1 + anatomy.num_layers)
    with widened(model, anatomy):
        with attending(model, plain_attention(model)):
            truth = _states_of_the_model(model, anatomy, ids, changes)  # [1 + L, H]
        found = _states_of_the_stack(model, anatomy, ids)
    effect = (truth - truth[0]).norm(dim=-1)  # [1 + L]
    missed = (found - truth).norm(dim=-1)
    if not bool((missed <= _OF_EFFECT * effect + _OF_STATE * truth.norm(dim=-1)).all()):
        return (
            "in float32, with the down-projections' outputs negated, layer by layer, the final"
            f" states move by {float(effect.norm()):.2e} in all, of which the fast analysis misses"
            f" {float(missed.norm()):.2e}"
        )
    if not _rounds(model):
        return None
    some = changes[:: max(1, len(changes) // _LAYERS)]
    truth, moved = truth[some], float(effect[some].norm())
    with own_attention():
        own = _states_of_the_model(model, anatomy, ids, some)
    here = _states_of_the_stack(model, anatomy, ids)[some]
    rounding, missed_here = (float((states.to(truth) - truth).norm()) for states in (own, here))
    if rounding > _OF_NOISE * moved or missed_here > _OF_ROUNDING * rounding + _OF_EFFECT * moved:
        return (
            f"the final states move by {moved:.2e} in float32, of which the model's own pass misses"
            f" {rounding:.2e} in its own precision, and the fast analysis {missed_here:.2e}"
        )
    return None


def plain_attention(model: nn.Module) -> str:
    """The entry of transformers' attention interface that computes a family's definition."""
    config = model.config.get_text_config()
    # transformers' sdpa leaves a softcap out (Gemma 2).
    capped = getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def _rounds(model: nn.Module) -> bool:
    """Whether the model's products are rounded to less than float32."""
    halves = any(p.dtype in HALF for p in model.parameters())
    return halves or bool(quantised_modules(model)) or not products_are_exact()


def _asked(question: Callable[[], Answer]) -> Answer:
    """The answer; what goes wrong in the engine means that it does not know the family."""
    try:
        return question()
    except Exception as error:
        if isinstance(error, NotReproduced) or out_of_memory(error):
            raise
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        words = f"its layers are called in a way that loki does not know ({why})"
        raise NotReproduced(words) from error


def _check_head(
    model: nn.Module, anatomy: Anatomy, ids: tuple[int, ...], own_attention: OwnAttention
) -> None:
    """Does the model run, and does its head alone answer on its decoder's states as it does?"""
    prompt = send(torch.tensor([ids]), first_device(model))  # [1, T]
    with own_attention(), torch.no_grad():
        try:
            expected = model(input_ids=prompt, use_cache=False).logits[0, -1]  # [V]
        except Exception as error:
            if out_of_memory(error):
                raise
            raise ValueError(_does_not_run(model, error)) from error
        states = anatomy.decoder(input_ids=prompt, use_cache=False).last_hidden_state[:, -1:]
        found = logits_of(model, anatomy, states)[0, -1]
    if not bool(states.isfinite().all()):
        raise ValueError(
            f"the model itself answers nan or inf in {states.dtype}; its activations are out of"
            " that precision's range. Load it in bfloat16 or float32 (`bf16: true`)"
        )
    share = max(_OF_LOGIT, _ROUNDINGS * torch.finfo(states.dtype).eps)
    allowed = share * float(expected.abs().max())
    missed = float((found - expected.to(found)).abs().max())
    if not missed <= allowed:
        raise NotReproduced(f"its head alone misses {missed:.2e} of the logits that it answers")


def _does_not_run(model: nn.Module, error: Exception) -> str:
    device, attention = first_device(model), str(model.config._attn_implementation)
    advice = (
        "Kernels that plugins put into it (`liger_*`, `cut_cross_entropy`) need a GPU; without"
        " one, leave them out"
    )
    if "flash" in attention:
        advice = (
            f"It attends by '{attention}', which needs a GPU and the package flash-attn; give"
            " `attn_implementation: sdpa` (in place of `flash_attention: true`, if you have it)"
        )
    return (
        f"the model itself does not run on {device.type.upper()}, analysed or not"
        f" ({type(error).__name__}: {error}). {advice}"
    )


def _states_of_the_stack(model: nn.Module, anatomy: Anatomy, ids: tuple[int, ...]) -> torch.Tensor:
    """[1 + L, H]: the last token's final state as it is, and with z_l replaced, l = 0 .. L-1.

    A second, shorter prompt runs beside it, as in a batch.
    """
    prompts = [Prompt(ids), Prompt(ids[: max(1, len(ids) - 1)])]
    state = batch_state(anatomy, prompts)
    with state, watched(model, anatomy, state):
        rule = Rule((_NODE,), (0.0,))
        hidden = climb(anatomy, state, prompts, rule, first_device(model), gradients=False)[1]
    if hidden.shape[1] != 1 + anatomy.num_layers:
        raise ValueError(f"a batch of 2 prompts ends with states of shape {list(hidden.shape)}")
    return hidden[0]


def _states_of_the_model(
    model: nn.Module, anatomy: Anatomy, ids: tuple[int, ...], changes: range
) -> torch.Tensor:
    """Those of the same [1 + L, H] that `changes` names, by the model's own code."""
    prompt = send(torch.tensor([ids]), first_device(model))  # [1, T]
    at_once = max(1, _TOKENS // len(ids))
    found = []
    for start in range(0, len(changes), at_once):
        some = changes[start : start + at_once]
        with ExitStack() as hooks, torch.no_grad():
            for copy, change in enumerate(some):
                if change:  # 0 is the plain prompt
                    hook = _replacing(copy, len(ids))
                    handle = anatomy.down[change - 1].register_forward_hook(hook)
                    hooks.enter_context(removing(handle))
            copies = prompt.expand(len(some), -1)
            hidden = anatomy.decoder(input_ids=copies, use_cache=False).last_hidden_state
        found.append(hidden[:, -1])
    return torch.cat(found)


def _replacing(copy: int, length: int) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    def replace(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        new = output.clone()
        new.view(-1, length, output.shape[-1])[copy, -1] *= _NODE
        return new

    return replace
