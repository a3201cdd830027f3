"""Does the growing stack compute what the model itself computes? Asked of every model, once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from weakref import WeakSet

import torch
from torch import nn

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from ...model.quantised import quantised_modules
from ..calibration.prompts import Prompt
from ..precision import products_are_exact
from .devices import first_device, out_of_memory, send
from .engine import integrate
from .head import head_gradient
from .quadrature import Rule
from .quiet import OwnAttention

_checked: WeakSet[nn.Module] = WeakSet()
# A point outside the path moves p further than one on it, and so shows more.
_NODE = -1.0
# In half precision one prompt may send a token to another expert; a wrong formula misses all.
_TRIES = 3
# The check takes the beginning of a long prompt, and this many tokens at once.
_PROMPT, _TOKENS = 256, 4096


def check_reproduces(
    model: nn.Module,
    anatomy: Anatomy,
    prompt: Prompt,
    own_attention: OwnAttention,
) -> None:
    """Compare the stack's p with the model's own, where z_l is replaced by -z_l, layer by layer.

    The model runs as it was loaded, on one whole copy of `prompt` per layer, with nothing of
    ours but a hook that replaces z_l. That takes as long as a few prompts do; a model object is
    checked once. `own_attention` is what `quiet(model)` yields.

    Raises:
        ValueError: they differ by more than rounding, so that the scores would be wrong.
    """
    if model in _checked:
        return
    of_effect, of_p = (1e-3, 1e-4) if _is_exact(model) else (0.2, 0.1)
    for cut in range(_TRIES):
        ids = prompt.ids[: max(1, min(len(prompt.ids), _PROMPT) - cut)]
        with own_attention(), torch.no_grad():
            expected = _expected(model, anatomy, ids)
        p = _p_of_the_stack(model, anatomy, ids)
        missed = float((p.to(expected) - expected).abs().sum())
        effect = float((expected - expected[0]).abs().sum())
        if missed <= of_effect * effect + of_p * float(expected.sum()):
            _checked.add(model)
            return
    raise ValueError(
        f"model family '{model.config.model_type}' cannot be analysed: with the down-projections'"
        f" outputs negated, layer by layer, p moves by {effect:.2e} in all, of which the fast"
        f" analysis misses {missed:.2e}. Attention that is not causal, and layers that hand on more"
        " than hidden states, are not supported; the README lists tested families"
    )


def _is_exact(model: nn.Module) -> bool:
    """Whether rounding is far below what a fault would change; else only gross faults show."""
    wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return wide and products_are_exact() and not quantised_modules(model)


def _p_of_the_stack(model: nn.Module, anatomy: Anatomy, ids: tuple[int, ...]) -> torch.Tensor:
    """[1 + L]: p as it is, and with z_l replaced at the last position for l = 0 .. L-1."""
    try:
        return integrate(model, anatomy, [Prompt(ids)], Rule((_NODE,), (0.0,))).p[0]
    except ValueError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(
            f"model family '{model.config.model_type}' cannot be analysed; its layers are called in"
            f" a way that loki does not know ({type(error).__name__}: {error}). The README lists"
            " tested families"
        ) from error


def _expected(model: nn.Module, anatomy: Anatomy, ids: tuple[int, ...]) -> torch.Tensor:
    """`_p_of_the_model`; a model that cannot run says so itself, before the stack is blamed."""
    try:
        return _p_of_the_model(model, anatomy, ids)
    except Exception as error:
        if out_of_memory(error):
            raise
        device, attention = first_device(model), str(model.config._attn_implementation)
        advice = (
            "Kernels that plugins put into it (`liger_*`, `cut_cross_entropy`) need a GPU; without"
            " one, leave them out"
        )
        if "flash" in attention:
            advice = (
                f"It attends by '{attention}', which needs a GPU and the package flash-attn; give"
                " `sdp_attention: true` in place of `flash_attention: true`"
            )
        raise ValueError(
            f"the model itself does not run on {device.type.upper()}, analysed or not"
            f" ({type(error).__name__}: {error}). {advice}"
        ) from error


def _p_of_the_model(model: nn.Module, anatomy: Anatomy, ids: tuple[int, ...]) -> torch.Tensor:
    """The same [1 + L], by the model's own code."""
    device = first_device(model)
    prompt = send(torch.tensor([ids]), device)  # [1, T]
    logits = model(input_ids=prompt, use_cache=False).logits[:, -1]  # [1, V]
    y = logits.argmax(-1)
    found = [logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)[0, y]]
    at_once = max(1, _TOKENS // len(ids))
    for start in range(0, anatomy.num_layers, at_once):
        some = anatomy.down[start : start + at_once]
        with ExitStack() as hooks:
            for i, down in enumerate(some):
                hooks.enter_context(removing(down.register_forward_hook(_replacing(i, len(ids)))))
            copies = prompt.expand(len(some), -1)
            hidden = anatomy.decoder(input_ids=copies, use_cache=False).last_hidden_state
        found.append(head_gradient(model, anatomy, hidden[:, -1:], y.expand(len(some)))[1][:, 0])
    return torch.cat([p.to(device) for p in found])


def _replacing(copy: int, length: int) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    def replace(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        new = output.clone()
        new.view(-1, length, output.shape[-1])[copy, -1] *= _NODE
        return new

    return replace
