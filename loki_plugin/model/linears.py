"""The linear modules of the decoder layers, besides the down-projections: what else may train."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..choices import ALL, DOWN
from .anatomy import Anatomy, in_experts, linear_sizes

PREFIX = "base_model.model."  # PEFT's, around the base model
# Weights that are read past their modules, and so past an adapter on them: of Mamba's layers by
# kernels, or by transformers' own code while it trains; of Gemma 3n while it trains alone.
_OF_MAMBA, _OF_ALTUP = ("out_proj", "x_proj", "dt_proj"), "correction_coefs"
_ROUTER = re.compile(r"gate|router")


def other_linears(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
    """By name inside the model, in the model's order: every linear module of its decoder layers.

    Left out are down-projections, routed experts (transformers holds them as one parameter, which
    is no module), what routes to them, what chooses tokens for sparse attention, without a gradient
    (DeepSeek's indexer), and linears whose weight is read past the module or not as that of one.
    """
    names = {id(module): name for name, module in model.named_modules()}
    down = {id(module) for module in anatomy.down}
    found: dict[str, nn.Module] = {}
    for layer in anatomy.layers:
        inside: list[str] = []  # of adapted linears: their base and their LoRA are no further ones
        for local, module in layer.named_modules():
            if any(local.startswith(f"{each}.") for each in inside):
                continue
            if linear_sizes(module) is None:
                continue
            inside.append(local)
            if id(module) in down or in_experts(local):
                continue
            if not _routes(layer, local) and not _is_read_past(layer, local):
                found[names[id(module)]] = module
    return found


def _routes(layer: nn.Module, local: str) -> bool:
    """Whether a linear, or the router around it, stands beside routed experts: it says where a
    token goes. So does an indexer, to the tokens that are looked at."""
    around = local.rpartition(".")[0]
    if _ROUTER.fullmatch(kind_of(around)):
        around = around.rpartition(".")[0]
    beside: Any = layer.get_submodule(around)
    return isinstance(getattr(beside, "experts", None), nn.Module) or ".indexer." in f".{local}"


def _is_read_past(layer: nn.Module, local: str) -> bool:
    """Whether the weight is read past the module, or, grouped, not as that of a linear."""
    parent: Any = layer.get_submodule(local.rpartition(".")[0])
    mamba = hasattr(parent, "A_log") and hasattr(parent, "D")
    grouped = type(layer.get_submodule(local)).__name__.endswith("GroupedLinear")
    return grouped or kind_of(local) == _OF_ALTUP or (mamba and kind_of(local) in _OF_MAMBA)


def has_routed_experts(anatomy: Anatomy) -> bool:
    """Whether there are weights of routed experts, which no target names."""
    return any(in_experts(n) for layer in anatomy.layers for n, _ in layer.named_modules())


def row_dim(module: nn.Module) -> int:
    """The dimension of a linear's `weight` that counts outputs: 1 for transformers' `Conv1D`."""
    return int(type(getattr(module, "base_layer", module)).__name__ == "Conv1D")


_HOW = "; a text is a regular expression for whole names, as in `.*\\.(q_proj|v_proj)`"


def kind_of(name: str) -> str:
    """What a module is called in every layer: `model.layers.3.self_attn.q_proj` -> `q_proj`."""
    return name.rpartition(".")[2]


def chosen(model: nn.Module, anatomy: Anatomy, targets: str | Sequence[str]) -> tuple[str, ...]:
    """The further linears that train, by name.

    Args:
        targets: `down`; `all`; names of modules as LoRA takes them (`q_proj`, `mlp.up_proj`); or,
            as PEFT has it, one regular expression for whole names.

    Raises:
        ValueError: a name that no linear module of a decoder layer has; what there is is listed. Or
            `all` of a model that has none.
    """
    if targets == DOWN:
        return ()
    others = other_linears(model, anatomy)
    if targets == ALL:
        if not others and not anatomy.down:
            raise ValueError(
                f"model family '{model.config.model_type}': its decoder layers have routed experts"
                " only, in their attention too: no linear module can train"
            )
        return tuple(others)
    every = [*others, *anatomy.names]
    wanted = [targets] if isinstance(targets, str) else targets
    unknown = [t for t in wanted if not any(_named(name, t, targets) for name in every)]
    if unknown:
        kinds = sorted({kind_of(name) for name in every})
        raise ValueError(
            f"targets: no linear module of a decoder layer is called {', '.join(unknown)}; there"
            f" are {', '.join(kinds)}, or write `all`" + (_HOW if isinstance(targets, str) else "")
        )
    return tuple(name for name in others if any(_named(name, t, targets) for t in wanted))


def chosen_down(anatomy: Anatomy, targets: str | Sequence[str]) -> list[str]:
    """The names of the down-projections that `targets` name; their rows train.

    Raises:
        ValueError: `targets` are rows alone, and the model has no down-projection.
    """
    if targets == DOWN:
        anatomy.check_rows()
    if targets in (DOWN, ALL):
        return list(anatomy.names)
    wanted = [targets] if isinstance(targets, str) else targets
    return [n for n in anatomy.names if any(_named(n, t, targets) for t in wanted)]


def _named(name: str, target: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return bool(re.fullmatch(target, name))
    return name == target or name.endswith(f".{target}")
