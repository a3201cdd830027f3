"""LoKI as a constraint on LoRA: ΔW = B·A, the rows of B outside the selection equal to zero.

That is the down-projections; further linears, where `targets` names them, carry an ordinary LoRA.

Dense: r = alpha = k, B is the frozen one-hot selector of the k rows, A [k, I] starts at zero and
trains, so row j of the update is a row of A. Low-rank (LoKI*): A [r, I] and the selected rows of
B [H, r] train. Both are ordinary PEFT LoRA adapters on disk; in memory only the rows exist.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..choices import DOWN, LINEAR_RANK
from ..model.anatomy import Anatomy, find_anatomy
from ..model.linears import PREFIX, chosen, chosen_down
from ..model.quantised import never_pack
from ..protecting.directions import Directions
from ..protecting.fixing import FixedA, fix_reads, task_reads
from ..protecting.installing import protect_inputs
from ..protecting.reading import ProtectedA
from ..rows import RowSelection
from .carrier import check_adaptable, lora_settings
from .naming import name_by_parameter
from .saved import save_rows_with
from .selected import KEY, RowFactor, RowScatter, RowSelector, is_ours, let_train


def implant(
    model: nn.Module,
    rows: RowSelection | list[torch.Tensor] | list[list[int]],
    rank: int | None = None,
    protect: Directions | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    targets: str | Sequence[str] = DOWN,
    linear_rank: int = LINEAR_RANK,
    task: Sequence[Sequence[int]] | None = None,
) -> PeftModel:
    """Wrap `model` so that of its down-projections only the selected rows can change.

    ΔW_l = B_l·A_l with B_l zero outside rows[l]; at the start ΔW = 0. With `protect`,
    ΔW_l = B_l·A_l·(I - V_l V_lᵀ): on inputs inside the span of orthonormal V_l the layer stays as
    it was; soft ones are read less. With `targets`, further linear modules of the decoder layers
    carry an ordinary LoRA, which reads through its own V. Works on 16/32-bit and on bitsandbytes
    8-bit and 4-bit bases, and in any trainer that takes a `PeftModel`.

    Args:
        model: a Hugging Face causal LM without an adapter.
        rows: L lists of row indices (see `select_rows`) or a `RowSelection`.
        rank: None for the dense form (L·k·I trainable parameters), or the rank r < k of LoKI*.
        protect: what `input_directions` returned for the same `targets` (V [I, u] with orthonormal
            columns, or soft ones), or a `Directions`; None protects no inputs.
        targets: `down`: the down-projections only; `all`: every linear of the decoder layers but
            routed experts; or names as LoRA takes them, which leave the rows out unless they name
            the down-projection. A `RowSelection` that has `linears` of its own keeps them.
        linear_rank: rank r of the LoRA on the further linears.
        task: token ids of some of the texts that will be trained on. With `protect`, the A of every
            low-rank update of a whole linear is set to what these use most beside what general text
            uses, and stands still (`protect.freeze_a`); None: A trains.

    Raises:
        ValueError: rows or directions that do not fit the model, a rank out of range, unknown
            targets, an unsupported family.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "implant() got a PeftModel; merge or unload its adapter first, or pass the base model"
        )
    selection = rows if isinstance(rows, RowSelection) else RowSelection(rows)
    selection = selection.check(model)
    anatomy = find_anatomy(model)
    if targets != DOWN or not selection.linears:
        selection = aimed(selection, model, anatomy, targets)
    check_adaptable(anatomy, model, selection.linears)
    settings = lora_settings(anatomy, model, selection, rank, linear_rank)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="none", **settings))
    install(wrapped, selection, rank)
    if protect is not None:
        protect = Directions.of(protect)
        if protect.still:
            raise ValueError(
                f"`protect` holds no directions for {len(protect.still)} linears, whose A stood"
                " still where it was made (`protect.freeze_a`); find them anew"
                " (`input_directions`, or `choose_directions`)"
            )
        protect_inputs(wrapped, protect)
    if task is not None:
        if protect is None:
            raise ValueError("`task` says what is read beside protected inputs; give `protect` too")
        if not len(task):
            raise ValueError("`task` holds no texts; give token ids of some, or leave it out")
        fix_reads(wrapped, task_reads(wrapped, task).a)
        freeze(wrapped)
    return wrapped


def aimed(
    selection: RowSelection, model: nn.Module, anatomy: Anatomy, targets: str | Sequence[str]
) -> RowSelection:
    """The selection with the further linears that `targets` name, and without the rows of
    down-projections that they do not name.

    Raises:
        ValueError: unknown targets.
    """
    down, linears = set(chosen_down(anatomy, targets)), chosen(model, anatomy, targets)
    if down.issuperset(anatomy.names) and linears == selection.linears:
        return selection
    nothing = torch.empty(0, dtype=torch.long)
    pairs = zip(anatomy.names, selection.rows, strict=True)
    rows = [kept if name in down else nothing for name, kept in pairs]
    return replace(selection, rows=rows, linears=linears)


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
    modules = dict(model.named_modules())
    for name in selection.linears:
        module = modules.get(f"{PREFIX}{name}")
        if not isinstance(module, LoraLayer) or adapter not in module.lora_B:
            raise ValueError(f"{name} carries no LoRA adapter '{adapter}'")
        if module.scaling[adapter] != 1:
            raise ValueError(
                f"{name}: the adapter has scaling {module.scaling[adapter]}, expected 1; it was"
                " made without loki"
            )
        let_train(module.lora_B[adapter])
    total = sum(isinstance(m, LoraLayer) for m in modules.values())
    others = len(selection.linears)
    if total != found + others:
        more = f" and {others} further linears" if others else ""
        raise ValueError(
            f"{total} modules carry LoRA, expected only the {found} selected down-projections{more}"
        )
    never_pack(model)
    freeze(model)
    save_rows_with(model, selection)
    name_by_parameter(model)
    # A bound method, not a closure: a deep copy of the model binds it to the copy.
    model.add_adapter = types.MethodType(_add_adapter, model)


def start_at_zero(model: nn.Module) -> None:
    """Set the update of a fresh adapter to zero: in the dense form that is lora_A, in the others
    lora_B, which is zero until it trains."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, b in module.lora_B.items():
                if isinstance(b, RowSelector):
                    nn.init.zeros_(module.lora_A[name].weight)


def _add_adapter(self: PeftModel, adapter_name: str, peft_config, *args, **kwargs) -> None:
    """A second adapter of the same configuration is confined to the same rows, and frozen.

    TRL's DPOTrainer adds one to hold what the adapter was at the start, as its reference, and
    copies every parameter of the first one into it. It is not saved (`saved.is_reference`).
    """
    own = peft_config is self.peft_config[self.active_adapter]
    type(self).add_adapter(self, adapter_name, peft_config, *args, **kwargs)
    if not own:
        self._loki_copies.discard(adapter_name)  # of an earlier one, which was deleted
        return
    self._loki_copies.add(adapter_name)
    for module in self.modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_B:
            first, second = module.lora_B[self.active_adapter], module.lora_B[adapter_name]
            if isinstance(first, RowScatter):
                second = type(first)(first.rows, second.weight)  # type: ignore[call-arg]
                module.lora_B[adapter_name] = second
            else:
                let_train(second)
            second.requires_grad_(False)
            if isinstance(first, RowSelector):
                nn.init.zeros_(module.lora_A[adapter_name].weight)
            reads, own = module.lora_A[self.active_adapter], module.lora_A[adapter_name].weight
            if isinstance(reads, ProtectedA):
                module.lora_A[adapter_name] = ProtectedA(own, reads.directions)


def constrained_modules(model: nn.Module) -> Iterable[tuple[str, RowScatter]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, RowScatter))


def freeze(model: nn.Module) -> None:
    """Only lora_A, the selected rows of lora_B in the low-rank form, and the lora_B of further
    linears require gradients."""
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
    factors = [
        (name, adapter, b)
        for name, module in model.named_modules()
        for adapter, b in getattr(module, "lora_B", {}).items()
    ]
    if not any(is_ours(b) for *_, b in factors):
        raise RuntimeError("no row constraint is installed in this model")
    for name, adapter, b in factors:
        if not is_ours(b):
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
    fixed = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, FixedA)}
    a = {n for n, p in model.named_parameters() if ".lora_A." in n and p.is_floating_point()}
    b = {
        f"{n}.{p}" for n, m in model.named_modules() if is_ours(m) for p, _ in m.named_parameters()
    }
    return a - fixed | b


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
