"""Rows of routed experts: found, adapted by stock PEFT, confined, and written into a checkpoint."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

from loki_plugin.implanting.checkpoint import Stored, tensors
from loki_plugin.implanting.merge import _write_rows
from loki_plugin.implanting.selected import RowFactor
from loki_plugin.implanting.verify import _changed_rows

IDS = torch.arange(5, 69).view(4, 16)
RANK, ROWS = 4, 6
AGREE = 1e-4  # logits, float32


def experts_of(model: torch.nn.Module) -> list[str]:
    """The names of the routed experts' down-projections, a parameter of three dimensions each."""
    found = [n for n, p in model.named_parameters() if p.dim() == 3]
    return [n for n in found if n.endswith("experts.down_proj")]


def row_dim(experts: Any) -> int:
    """Which dimension of one expert's matrix counts rows; its shape does not say where I = H."""
    return int(getattr(getattr(experts, "base_layer", experts), "is_transposed", False))


def by_rows(experts: Any, weights: torch.Tensor) -> torch.Tensor:
    """[E, H, I], whichever way the parameter lies."""
    return weights.transpose(1, 2) if row_dim(experts) else weights


def choose(experts: int, hidden: int, layer: int, own: bool) -> torch.Tensor:
    """Which rows [E, H] of a layer's experts train: the same ones, or for each expert its own."""
    chosen = torch.zeros(experts, hidden, dtype=torch.bool)
    for e in range(experts):
        first = layer + (e * ROWS if own else 0)
        chosen[e, (torch.arange(ROWS) * 2 + first) % hidden] = True
    return chosen


def adapt(model: Any, names: list[str]) -> PeftModel:
    """Wrapped by stock PEFT; nothing here is ours."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=names
    )
    return get_peft_model(model, config)


def wrappers(tuned: PeftModel) -> list[Any]:
    return [m for m in tuned.modules() if type(m).__name__ == "ParamWrapper"]


def confine(tuned: PeftModel, own: bool) -> list[torch.Tensor]:
    """Confine lora_B to its rows: by our own `RowFactor` where all experts share them, else by a
    mask on the gradient of B, which begins at zero. Column i E + e of B is expert e's i-th."""
    chosen = []
    for layer, module in enumerate(wrappers(tuned)):
        b = module.lora_B["default"]
        rows = choose(module.num_experts, b.out_features, layer, own)
        chosen.append(rows)
        if own:
            mask = rows.T.repeat(1, RANK)
            b.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        else:
            kept = RowFactor(rows[0].nonzero()[:, 0], b.weight)
            module.lora_B["default"] = kept
    return chosen


def train(tuned: PeftModel, steps: int = 4) -> None:
    """Steps that move every matrix of the adapter.

    Raises:
        ValueError: a matrix without a gradient.
    """
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0)
    for step in range(steps):
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in tuned.named_parameters():
            late = step > 0 or "lora_A" not in name  # beside B = 0 A has none
            if parameter.requires_grad and late and not parameter.grad.abs().sum() > 0:
                raise ValueError(f"{name} gets no gradient")
        optimizer.step()
        optimizer.zero_grad()


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def check(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < AGREE:
        raise ValueError(f"{what}: logits differ by {difference:.2g}")


def check_rows(what: str, changed: torch.Tensor, chosen: torch.Tensor) -> None:
    """That what changed [E, H] lies in the rows, and that something did in each expert's."""
    if (changed & ~chosen).any():
        raise ValueError(f"{what}: {int((changed & ~chosen).sum())} rows outside the selection")
    if not (changed & chosen).any():
        raise ValueError(f"{what}: no row changed")


def load(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def parts_of(
    model: Any, stored: dict[str, Stored], names: list[str]
) -> dict[str, list[tuple[str, Stored]]]:
    """Where a checkpoint stores the experts of each parameter: E matrices in order, and their keys.

    transformers' own conversion says which keys it joins to which parameter; a stored tensor of
    three dimensions is E matrices one behind the other.

    Raises:
        ValueError: nothing becomes one of the parameters.
    """
    steps = get_model_conversion_mapping(model)
    renamings = [s for s in steps if isinstance(s, WeightRenaming)]
    joined = [s for s in steps if not isinstance(s, WeightRenaming)]
    found: dict[str, list[tuple[str, Stored]]] = defaultdict(list)
    for key in sorted(stored, key=dot_natural_key):
        name = rename_source_key(key, renamings, joined)[0]
        if name in names:
            found[name] += [(key, place) for place in matrices(stored[key])]
    missing = [n for n in names if not found[n]]
    if missing:
        raise ValueError(f"the checkpoint has no tensor that becomes {missing[0]}")
    return found


def matrices(place: Stored) -> list[Stored]:
    if len(place.shape) == 2:
        return [place]
    size = place.size // place.shape[0]
    starts = range(place.start, place.start + place.size, size)
    return [replace(place, shape=place.shape[1:], start=s, size=size) for s in starts]


def patch(base: Path, output: Path, tuned: PeftModel, chosen: list[torch.Tensor]) -> None:
    """Write the selected rows into a copy of the checkpoint, and compare all bytes of both.

    Raises:
        ValueError: a byte outside the rows that differs, or rows that did not change.
    """
    shutil.copytree(base, output)
    model = load(base)
    names = experts_of(model)
    before, after = tensors(base), tensors(output)
    old, new = parts_of(model, before, names), parts_of(model, after, names)
    for name, module, rows in zip(names, wrappers(tuned), chosen, strict=True):
        dim = row_dim(module)
        delta = by_rows(module, module.get_delta_weight("default").detach())
        changed = torch.zeros_like(rows)
        for e, ((_, was), (_, place)) in enumerate(zip(old[name], new[name], strict=True)):
            which = rows[e].nonzero()[:, 0]
            _write_rows(place, which, delta[e, which], dim)
            changed[e, torch.as_tensor(_changed_rows(was, place, dim))] = True
        check_rows("the patched checkpoint", changed, rows)
    touched = {key for places in old.values() for key, _ in places}
    for key in before.keys() - touched:
        if not np.array_equal(before[key].bytes(), after[key].bytes()):
            raise ValueError(f"the patched checkpoint: {key} differs")
