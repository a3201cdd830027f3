"""Published relatives of `protect`, by their formulas, on all linears with rank 16.

    OPLoRA (arXiv 2510.13003)      ΔW = (I - U Uᵀ) B A (I - V Vᵀ), W ≈ U S Vᵀ the leading triples
    FORA (arXiv 2606.31092)        ΔW = (I - U Uᵀ) B A (I - Q Qᵀ) + U₂ diag(δ) V₂ᵀ
    LoRA-Null (arXiv 2503.02659)   B A starts as W N Nᵀ, N the r directions that inputs use least

FORA's code was not public when this was written: how many directions, and which singular pairs its
narrow channel has, are ours. Its Q are those of `protect`'s moments, in which no massive activation
hides the others. FoLoRA (arXiv 2606.00132) gates Adam's steps, by a formula that its abstract does
not give; it is not here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from benchmarks.forgetting.building import lora
from benchmarks.real.lab import Lab
from loki_plugin.protecting.reading import ProtectedA

CHANNEL = 16  # singular pairs of FORA's narrow channel


class ProjectedB(nn.Linear):
    """A lora_B that writes nothing along U: x -> (I - U Uᵀ) B x."""

    def __init__(self, weight: nn.Parameter, u: torch.Tensor):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.u = weight, u
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = self.weight - self.u @ (self.u.T @ self.weight)
        return nn.functional.linear(x, b)


def oplora(part: float = 1 / 8) -> Callable:
    """Blind to the leading `part` of the weight's singular triples, on both sides."""

    def build(model, lab: Lab):
        wrapped = lora()(model, lab)
        for _, module in _adapted(wrapped):
            u, _, v = _triples(module)
            k = int(part * u.shape[1])
            _project(module, u[:, :k], v[:, :k])
        return wrapped

    return build


def fora(part: float = 1 / 8, energy: float = 0.9) -> Callable:
    """Writes nothing along the leading `part` of the weight's outputs, reads nothing of the
    directions that hold `energy` of what general text reads, and scales some singular pairs."""

    def build(model, lab: Lab):
        known = lab.protected(energy=energy, soft=False)
        wrapped = lora()(model, lab)
        for name, module in _adapted(wrapped):
            u, _, v = _triples(module)
            k = int(part * u.shape[1])
            _project(module, u[:, :k], known[name])
            _open(module, u[:, k : k + CHANNEL], v[:, k : k + CHANNEL])
        return wrapped

    return build


def lora_null(frozen: bool = False) -> Callable:
    """Version 1 trains A and B; version 2, `frozen`, B alone. What they start with is taken from
    the frozen weight, so that the model begins as the base."""

    def build(model, lab: Lab):
        known = {name: m for site, m in lab.moments() for name in site.names}
        wrapped = lora()(model, lab)
        least: dict[int, torch.Tensor] = {}
        for name, module in _adapted(wrapped):
            moments, r = known[name], module.r["default"]
            if id(moments) not in least:
                whole = moments.ordinary + (0 if moments.sinks is None else moments.sinks)
                least[id(moments)] = torch.linalg.eigh(whole.double()).eigenvectors[:, :r].float()
            n, weight = least[id(moments)], module.get_base_layer().weight
            with torch.no_grad():
                u, s, v = torch.linalg.svd(weight @ n, full_matrices=False)
                module.lora_B["default"].weight.copy_(u * s.sqrt())
                module.lora_A["default"].weight.copy_(s.sqrt()[:, None] * (v @ n.T))
                weight -= weight @ n @ n.T
            module.lora_A["default"].weight.requires_grad_(not frozen)
        return wrapped

    return build


def _adapted(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def _triples(module: LoraLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [O, k], S [k], V [I, k] of the frozen weight, the largest first."""
    weight = module.get_base_layer().weight.detach().float()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u, s, v.T


def _project(module: LoraLayer, u: torch.Tensor, v: torch.Tensor) -> None:
    module.lora_A["default"] = ProtectedA(module.lora_A["default"].weight, v.contiguous())
    module.lora_B["default"] = ProjectedB(module.lora_B["default"].weight, u.contiguous())


def _open(module: LoraLayer, u: torch.Tensor, v: torch.Tensor) -> None:
    """Add U diag(δ) Vᵀ, δ zero at first, to what a layer gives."""
    delta = nn.Parameter(torch.zeros(u.shape[1]))
    module.register_parameter("lora_delta", delta)

    def hook(_, args, output):
        return output + ((args[0] @ v) * delta) @ u.T

    module.register_forward_hook(hook)
