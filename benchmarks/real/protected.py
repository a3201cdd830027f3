"""Builders of models whose updates read through directions, in the product's form and in others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer

from benchmarks.real.lab import Lab
from loki_plugin import implant
from loki_plugin.choices import LINEAR_RANK
from loki_plugin.implanting.adapter import freeze
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting.directions import SOFTEST
from loki_plugin.protecting.fixing import fix_reads, low_rank, task_reads
from loki_plugin.protecting.packed import rounded as rounded_directions


def soft_rows(
    quota: float = 90, strategy: str = "layer_balanced", rank: int | None = None, **of
) -> Callable:
    """LoKI's rows, reading through soft directions (`Lab.protected`)."""

    def build(model, lab: Lab):
        torch.manual_seed(lab.draw)
        known = lab.protected(**of)
        basis = {name: known[name] for name in find_anatomy(model).names}
        return implant(model, lab.rows(quota, strategy), rank=rank, protect=basis)

    return build


def soft_all(
    quota: float = 100,
    rank: int | None = 16,
    strategy: str = "layer_balanced",
    small: bool = False,
    frozen: bool = False,
    linear_rank: int = LINEAR_RANK,
    **of,
) -> Callable:
    """`targets: all`: rows of the down-projections and LoRA r16 on all other linears, each reading
    through its own soft directions; with all rows and rank 16 that is LoRA on all linears. `small`:
    directions in 8 bits, as on a card. `frozen`: A stays as it was drawn (LoRA-FA, arXiv
    2308.03303)."""

    def build(model, lab: Lab):
        torch.manual_seed(lab.draw)
        rows = lab.rows(quota, "random" if quota == 100 else strategy)
        known = lab.protected(**of)
        if small:
            packed = {id(v): v for v in known.values()}
            packed = {i: rounded_directions(v, SOFTEST) for i, v in packed.items()}
            known = {name: packed[id(v)] for name, v in known.items()}
        wrapped = implant(
            model, rows, rank=rank, protect=known, targets="all", linear_rank=linear_rank
        )
        for name, parameter in wrapped.named_parameters():
            if frozen and ".lora_A." in name:
                parameter.requires_grad_(False)
        return wrapped

    return build


def by_gain(frozen: bool = True, rank: int = 16, texts: int = 64, **of) -> Callable:
    """`soft_all` with what updates read set from so many of the task's `texts`, as the product does
    it (`freeze_a`); without `frozen` A starts there and trains, behind P."""

    def build(model, lab: Lab):
        assert lab.task is not None
        wrapped = soft_all(rank=rank, linear_rank=rank, **of)(model, lab)
        reads = task_reads(wrapped, [a.ids for a in lab.task.learned[:texts]]).a
        if frozen:
            fix_reads(wrapped, reads)
            freeze(wrapped)
            return wrapped
        for name, layer in low_rank(wrapped).items():
            a = layer.lora_A["default"]
            a.weight.data.copy_(reads[name])
            a.take_folded()
        return wrapped

    return build


def blind_rows(model, lab: Lab):
    """Quota 90 with soft directions as 0.6.0 found them."""
    torch.manual_seed(lab.draw)
    return implant(model, lab.rows(90, "layer_balanced"), protect=lab.blind())


def other_form(
    make: Callable[[torch.Tensor], torch.Tensor], count: float | None = None
) -> Callable:
    """`soft_all` with P [I, I] held in another form: `make` gets V and returns that P."""

    def build(model, lab: Lab):
        wrapped = soft_all()(model, lab)
        known = lab.protected(count=count)
        for name, module in wrapped.named_modules():
            if isinstance(module, LoraLayer):
                v = known[name.removeprefix("base_model.model.")]
                module.lora_A["default"] = Reading(module.lora_A["default"].weight, make(v))
        return wrapped

    return build


class Reading(torch.nn.Linear):
    """A lora_A that reads P x, P any matrix."""

    def __init__(self, weight, p: torch.Tensor):
        torch.nn.Module.__init__(self)
        self.weight, self.p = weight, p.to(weight.dtype)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight @ self.p)


def rounded(bits: int, block: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """P - I = -V Vᵀ in so many bits, a scale for each block."""

    def make(v: torch.Tensor) -> torch.Tensor:
        taken = v @ v.T
        parts = taken.reshape(-1, block)
        scale = parts.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        kept = (parts / scale).round() * scale
        return torch.eye(len(v)) - kept.reshape(taken.shape)

    return make


def blocks(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """V Vᵀ inside blocks of neighbouring inputs only."""

    def make(v: torch.Tensor) -> torch.Tensor:
        taken, size = v @ v.T, len(v) // count
        place = torch.arange(len(v)) // size
        return torch.eye(len(v)) - taken * (place[:, None] == place)

    return make


def half_precision(v: torch.Tensor) -> torch.Tensor:
    v = v.to(torch.bfloat16).float()
    return torch.eye(len(v)) - v @ v.T
