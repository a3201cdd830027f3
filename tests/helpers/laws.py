"""What must hold after any training run: nothing moved but the selected rows and the targeted
linears, and those did."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors.torch import load_file

from loki_plugin.model.quantised import unpack
from loki_plugin.rows import RowSelection

DOWN = re.compile(r"\.(\d+)\.(?:mlp\.(?:down_proj|c_proj|fc2)|feed_forward\.w2)$")


def base_tensors(model) -> dict[str, torch.Tensor]:
    """Copies of every stored tensor of the base model, quantisation states included."""
    unpack(model)
    found = {}
    for name, module in model.named_modules():
        name = name.replace(".base_layer", "").removeprefix("base_model.model.")
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            if "lora_" in name:
                continue
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                found[f"{name}.absmax"] = state.absmax.clone()
                found[f"{name}.absmax2"] = state.state2.absmax.clone()
                tensor = tensor.view(torch.uint8)  # stored as 16-bit numbers, some of them NaN
            found[f"{name}.{key}"] = tensor.detach().clone()
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
            found[f"{name}.SCB"] = scale.clone()
    return found


def assert_equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Every tensor bit for bit the same, also where a wider dtype holds it now."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].to(tensor.dtype), tensor), name


def modules_of(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of a linear -> (A [r, I], B [H, r]) of a saved adapter that holds nothing else."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key)
        assert found, f"{key} is no LoRA matrix of a linear"
        parts.setdefault(found[1], {})[found[2]] = tensor
    return {name: (p["A"], p["B"]) for name, p in parts.items()}


def adapter_of(folder: Path) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (A [r, I], B [H, r]) of a saved adapter that holds down-projections only."""
    modules = modules_of(folder)
    layers = _layers(modules)
    assert len(layers) == len(modules), f"not only down-projections: {sorted(modules)}"
    return layers


def _layers(modules: dict[str, Any]) -> dict[int, Any]:
    found = ((DOWN.search(name), pair) for name, pair in modules.items())
    return {int(layer[1]): pair for layer, pair in found if layer}


def assert_confined(folder: Path, rank: int | None, linear_rank: int | None = None) -> RowSelection:
    """The saved update is zero outside the rows of the file beside it and not zero inside; of its
    further linears each has one, of rank `linear_rank`, and no other module has any."""
    selection = RowSelection.load(Path(folder) / "loki_rows.json")
    modules = modules_of(folder)
    adapter = _layers(modules)
    assert {n for n in modules if not DOWN.search(n)} == set(selection.linears)
    for name in selection.linears:
        a, b = modules[name]
        assert a.shape[0] == b.shape[1] == linear_rank, name
        update = b.float() @ a.float()
        assert torch.isfinite(update).all() and (update != 0).any(1).all(), name
    assert sorted(adapter) == [i for i, rows in enumerate(selection.rows) if len(rows)]
    for layer, (a, b) in adapter.items():
        rows = selection.rows[layer]
        assert a.shape[0] == b.shape[1] == (rank or len(rows))
        if rank is None:
            assert torch.equal(b[rows], torch.eye(len(rows), dtype=b.dtype)), layer
        update = b.float() @ a.float()  # [H, I]
        assert torch.isfinite(update).all(), layer
        frozen = torch.ones(len(update), dtype=torch.bool)
        frozen[rows] = False
        assert torch.equal(update[frozen], torch.zeros_like(update[frozen])), layer
        assert (update[rows] != 0).any(1).all(), layer
    return selection


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_merged(base: Path, merged: Path, selection: RowSelection, transposed: bool) -> None:
    """Checkpoints differ in the selected rows and in the targeted linears and nowhere else."""
    before, after = checkpoint(base), checkpoint(merged)
    assert before.keys() == after.keys()
    found, whole = 0, {f"{name}.weight" for name in selection.linears}
    assert whole <= before.keys()
    for name, old in before.items():
        new = after[name]
        assert new.dtype == old.dtype, name
        if name in whole:
            assert not torch.equal(new, old), name
            continue
        layer = DOWN.search(name.removesuffix(".weight"))
        if not layer:  # biases of down-projections too
            assert torch.equal(new, old), name
            continue
        found += 1
        changed = (new != old).any(0 if transposed else 1).nonzero()[:, 0]
        assert torch.equal(changed, selection.rows[int(layer[1])]), name
    assert found == selection.num_layers
