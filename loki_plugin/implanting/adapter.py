"""LoKI as a constraint on LoRA: ΔW = B·A, the rows of B outside the selection equal to zero.

Dense: r = alpha = k, B is the frozen one-hot selector of the k rows, A [k, I] starts at zero and
trains, so row j of the update is a row of A. Low-rank (LoKI*): A [r, I] and the selected rows of
B [H, r] train. Both are ordinary PEFT LoRA adapters on disk; in memory only the rows exist.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..model.anatomy import Anatomy, find_anatomy
from ..protecting.directions import Directions
from ..protecting.reading import ProtectedA, protect_inputs
from ..rows import RowSelection
from .saved import save_rows_with
from .selected import KEY, RowFactor, RowScatter, RowSelector


def check_rank(rank: int | None, fullest: int) -> None:
    """Check a rank against the rows of the fullest layer.

    Raises:
        ValueError: rank < 1 or rank >= the rows.
    """
    if rank is not None and not 1 <= rank < fullest:
        raise ValueError(
            f"rank = {rank}, but {fullest} rows train per layer; a low-rank update needs"
            f" 1 <= rank < {fullest}. Leave `rank` out for the dense form"
        )


def lora_settings(anatomy: Anatomy, model: nn.Module, counts: list[int], rank: int | None) -> dict:
    """The `LoraConfig` fields that carry a selection with `counts` rows per layer.

    Scaling is 1 in every layer (alpha = r). Layers without rows are not targeted.

    Raises:
        ValueError: as `check_rank`.
    """
    check_rank(rank, max(counts))
    used = [name for name, count in zip(anatomy.names, counts, strict=True) if count]
    ranks = {n: rank or c for n, c in zip(anatomy.names, counts, strict=True) if c}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: r for name, r in ranks.items() if r != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": _shortest_target(model, used),
        "fan_in_fan_out": 1 in anatomy.row_dims,
        "lora_dropout": 0.0,
    }


def _shortest_target(model: nn.Module, used: list[str]) -> list[str]:
    """One suffix such as `down_proj` when it names exactly these modules, else all full names."""
    parts = used[0].split(".")
    everything = [name for name, _ in model.named_modules()]
    for depth in range(1, len(parts)):
        suffix = ".".join(parts[-depth:])
        if [n for n in everything if n == suffix or n.endswith("." + suffix)] == used:
            return [suffix]
    return used


def check_adaptable(anatomy: Anatomy, model: nn.Module) -> None:
    """Check that PEFT puts adapters where their names say.

    Raises:
        ValueError: a family of which PEFT takes every `down_proj` for its routed experts' weights,
            so that no adapter of another module could be loaded without this package.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=list(anatomy.names))
    convert_peft_config_for_transformers(config, model, None)
    if set(config.target_modules) != set(anatomy.names):
        raise ValueError(
            f"model family '{model.config.model_type}': PEFT takes an adapter for"
            f" {anatomy.names[-1]} for one of the routed experts"
            f" ({', '.join(sorted(config.target_parameters or []))}), so no standard adapter can"
            " hold rows of it. `attribute` and `select_rows` work; training them does not. Use a"
            " dense model, Qwen2-MoE, Granite-MoE-shared, or Llama 4"
        )


def implant(
    model: nn.Module,
    rows: RowSelection | list[torch.Tensor] | list[list[int]],
    rank: int | None = None,
    protect: Directions | Sequence[torch.Tensor] | None = None,
) -> PeftModel:
    """Wrap `model` so that only the selected rows of its down-projections can change.

    ΔW_l = B_l·A_l with B_l zero outside rows[l]; at the start ΔW = 0. With `protect`,
    ΔW_l = B_l·A_l·(I - V_l V_lᵀ): on inputs inside the span of orthonormal V_l the layer stays as
    it was; soft ones are read less. Works on
    16/32-bit and on bitsandbytes 8-bit and 4-bit bases, and in any trainer that takes a
    `PeftModel`.

    Args:
        model: a Hugging Face causal LM without an adapter.
        rows: L lists of row indices (see `select_rows`) or a `RowSelection`.
        rank: None for the dense form (L·k·I trainable parameters), or the rank r < k of LoKI*.
        protect: L tensors V_l [I, u_l] with orthonormal columns, or soft ones (see
            `input_directions`), or a `Directions`; None protects no inputs.

    Raises:
        ValueError: rows or directions that do not fit the model, a rank out of range, an
            unsupported family.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "implant() got a PeftModel; merge or unload its adapter first, or pass the base model"
        )
    selection = rows if isinstance(rows, RowSelection) else RowSelection(rows)
    selection = selection.check(model)
    anatomy = find_anatomy(model)
    check_adaptable(anatomy, model)
    settings = lora_settings(anatomy, model, selection.counts, rank)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="none", **settings))
    install(wrapped, selection, rank)
    if protect is not None:
        protect_inputs(wrapped, protect)
    return wrapped


def install(model: PeftModel, selection: RowSelection, rank: int | None, fresh: bool = True):
    """Put the constraint into a PEFT model whose LoRA targets the selected down-projections.

    `model.save_pretrained` then writes `loki_rows.json` beside the adapter.

    Args:
        model: wrapped with `lora_settings` of the same selection and rank.
        fresh: True starts the update at zero; False keeps loaded A (and B), after checking that
            they obey the constraint, and freezes B again (PEFT's loading unfreezes it).

    Raises:
        ValueError: a targeted layer is not LoRA, has another rank, or (fresh=False) the loaded
            adapter was trained on other rows.
    """
    adapter = model.active_adapter
    anatomy = find_anatomy(model)
    found = 0
    for i, (module, rows) in enumerate(zip(anatomy.down, selection.rows, strict=True)):
        if not len(rows):
            continue
        if not isinstance(module, LoraLayer) or adapter not in module.lora_B:
            raise ValueError(f"layer {i}: {anatomy.names[i]} carries no LoRA adapter '{adapter}'")
        found += 1
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        expected = rank or len(rows)
        if module.r[adapter] != expected or module.scaling[adapter] != 1:
            raise ValueError(
                f"layer {i}: the adapter has r = {module.r[adapter]} and scaling"
                f" {module.scaling[adapter]}, expected r = {expected} and scaling 1; it was made"
                " with other rows or another rank"
            )
        kind = RowSelector if rank is None else RowFactor
        constrained = kind(rows, b.weight)
        if not fresh:
            try:
                constrained.load_state_dict({KEY: b.weight.detach()})
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}") from error
        elif rank is None:
            nn.init.zeros_(a.weight)
        module.lora_B[adapter] = constrained
    total = sum(isinstance(m, LoraLayer) for m in model.modules())
    if total != found:
        raise ValueError(
            f"{total} modules carry LoRA, expected only the {found} selected down-projections"
        )
    freeze(model)
    save_rows_with(model, selection)
    # A bound method, not a closure: a deep copy of the model binds it to the copy.
    model.add_adapter = types.MethodType(_add_adapter, model)


def _add_adapter(self: PeftModel, adapter_name: str, peft_config, *args, **kwargs) -> None:
    """A second adapter of the same configuration is confined to the same rows, and frozen.

    TRL's DPOTrainer adds one to hold what the adapter was at the start, as its reference, and
    copies every parameter of the first one into it.
    """
    own = peft_config is self.peft_config[self.active_adapter]
    type(self).add_adapter(self, adapter_name, peft_config, *args, **kwargs)
    if not own:
        return
    for module in self.modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_B:
            first, like = module.lora_B[self.active_adapter], module.lora_B[adapter_name].weight
            module.lora_B[adapter_name] = type(first)(first.rows, like).requires_grad_(False)
            if isinstance(first, RowSelector):
                nn.init.zeros_(module.lora_A[adapter_name].weight)
            reads, own = module.lora_A[self.active_adapter], module.lora_A[adapter_name].weight
            if isinstance(reads, ProtectedA):
                module.lora_A[adapter_name] = ProtectedA(own, reads.directions)


def constrained_modules(model: nn.Module) -> Iterable[tuple[str, RowScatter]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, RowScatter))


def freeze(model: nn.Module) -> None:
    """Only lora_A, and in the low-rank form the selected rows of lora_B, require gradients."""
    ours = _owned(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ours)


def check(model: nn.Module, finite: bool = False) -> None:
    """Check the constraint: every lora_B confined to its rows, and nothing else trainable.

    Args:
        finite: check too that no trained weight is NaN or Inf.

    Raises:
        RuntimeError: with the first violation; the adapter must not be used.
    """
    if not any(True for _ in constrained_modules(model)):
        raise RuntimeError("no row constraint is installed in this model")
    for name, module in model.named_modules():
        for adapter, b in getattr(module, "lora_B", {}).items():
            if not isinstance(b, RowScatter):
                raise RuntimeError(f"{name}: lora_B of adapter '{adapter}' is not confined to rows")
    ours = _owned(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in ours:
            raise RuntimeError(f"{name} is trainable, but LoKI trains selected rows only")
        if finite and name in ours and not torch.isfinite(parameter).all():
            raise RuntimeError(
                f"{name} holds NaN or Inf: the training diverged. Go back to a checkpoint, with a"
                " lower learning rate or without the batch that broke it"
            )


def _owned(model: nn.Module) -> set[str]:
    """The names of the parameters that LoKI trains."""
    a = {n for n, p in model.named_parameters() if ".lora_A." in n and p.is_floating_point()}
    b = {f"{n}.{p}" for n, m in constrained_modules(model) for p, _ in m.named_parameters()}
    return a | b


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, all parameters of the base model)."""
    ours = _owned(model)
    parameters = list(model.named_parameters())
    trainable = sum(p.numel() for n, p in parameters if n in ours)
    base = sum(_numel(p) for n, p in parameters if ".lora_" not in n)
    return trainable, base


def _numel(parameter: torch.Tensor) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights in a byte
    return parameter.numel() if state is None else state.shape.numel()
