"""A model made ready for the analysis, and left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ...model.quantised import dequantising, set_evaluating, training_kernels, unpack
from ...model.whole import whole_sequences
from . import attention

# Inside it, the model attends as it was loaded.
OwnAttention = Callable[[], AbstractContextManager[None]]


@contextmanager
def quiet(model: nn.Module) -> Iterator[OwnAttention]:
    """Evaluation mode, no parameter gradients, our attention, sequences whole; all put back after.

    Yields a context manager inside which the model attends as it was loaded.
    """
    training = {id(m) for m in model.modules() if m.training}
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = attention_settings(model)
    unpack(model)

    @contextmanager
    def own_attention() -> Iterator[None]:
        ours = [(config, config._attn_implementation_internal) for config, _ in found]
        _set_attention(found)
        try:
            yield
        finally:
            _set_attention(ours)

    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        _set_attention([(config, implementation(model)) for config, _ in found])
        with training_kernels(model), dequantising(model), whole_sequences(model):
            set_evaluating(model)
            yield own_attention
    finally:
        _set_attention(found)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in model.modules():
            module.training = id(module) in training


@contextmanager
def attending(model: nn.Module, implementation: str) -> Iterator[None]:
    """For the duration the model attends by that entry of transformers' attention interface."""
    found = attention_settings(model)
    try:
        _set_attention([(config, implementation) for config, _ in found])
        yield
    finally:
        _set_attention(found)


def attention_settings(model: nn.Module) -> list[tuple[Any, str | None]]:
    """The configurations that say how the model attends, and what they say."""
    configs = {id(m.config): m.config for m in model.modules() if _has_attention_setting(m)}
    return [(c, c._attn_implementation_internal) for c in configs.values()]


def implementation(model: nn.Module) -> str:
    """Our entry in transformers' attention interface, or the plain call that we intercept."""
    return attention.NAME if model._supports_attention_backend else "sdpa"


def _set_attention(settings: list[tuple[Any, str | None]]) -> None:
    for config, value in settings:
        config._attn_implementation_internal = value


def _has_attention_setting(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation_internal")
