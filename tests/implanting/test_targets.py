"""Every linear layer that trains: LoRA beside the rows, each reading through its own directions."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import tiny
from helpers.protected import CALIBRATION, IDS, ROWS, train, trainable
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loki_plugin import RowSelection, implant, input_directions
from loki_plugin.implanting import adapter
from loki_plugin.implanting.adapters import Adapter, check_disjoint
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.saved import check_saved, check_saved_protection
from loki_plugin.implanting.verify import verify
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting.directions import FILE_NAME, Directions
from loki_plugin.protecting.leaking import check_adapter, measure_leakage
from loki_plugin.protecting.reading import ProtectedA

FAMILIES = ["llama", "gpt2", "qwen2_moe", "llama4", "phi3"]


def directions(family, **more):
    settings = {"energy": 0.7, "targets": "all"} | more
    return input_directions(tiny(family), *CALIBRATION, **settings)


def rows_of(family):
    return ROWS[: find_anatomy(tiny(family)).num_layers]


def implanted(family="llama", rank=None, protect=None, targets="all"):
    return implant(
        tiny(family), rows_of(family), rank, protect=protect, targets=targets, linear_rank=4
    )


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_targeted_linears_change_and_down_projections_in_their_rows(family, rank):
    base = tiny(family)
    before = {n: p.clone() for n, p in base.named_parameters()}
    names, dims = find_anatomy(base).names, find_anatomy(base).row_dims
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
    model = implanted(family, rank, directions(family, soft=True))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    train(model)
    adapter.check(model)
    linears = {f"{n}.weight" for n in model._loki_selection.linears}
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, tuned, atol=1e-4, rtol=1e-4)
    for name, new in merged.named_parameters():
        old = before[name]
        if name in linears:
            assert not torch.equal(new, old), name
        elif name.removesuffix(".weight") in names:
            layer = names.index(name.removesuffix(".weight"))
            differs = (old != new).any(0 if dims[layer] else 1).nonzero()[:, 0].tolist()
            assert differs == sorted(ROWS[layer]), name
        else:
            assert torch.equal(new, old), name
    assert len(linears) >= 4 and not any(".experts" in n for n in linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_linear_reads_what_is_protected(family):
    """Hard directions: ΔW U = 0 of every module, each against the directions of its own input."""
    known = directions(family)
    model = implanted(family, None, known)
    train(model)
    moved = 0
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.lora_A["default"], ProtectedA):
            update = module.get_delta_weight("default").detach().double()
            update = update.T if type(module.base_layer).__name__ == "Conv1D" else update
            u = known[name.removeprefix("base_model.model.")].double()
            assert float(update.norm()) > 0.01, name
            assert float((update @ u).norm()) < 1e-5 * float(update.norm()), name
            moved += 1
    assert moved == len(known)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_saved_read_back_merged_and_proven(tmp_path, rank, soft):
    known = directions("llama", soft=soft)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny("llama").save_pretrained(base)
    model = implant(
        type(tiny("llama")).from_pretrained(base), ROWS, rank, known, "all", linear_rank=4
    )
    train(model)
    model.save_pretrained(folder)
    found = RowSelection.load(folder / "loki_rows.json")
    assert found == model._loki_selection and len(found.linears) == 18
    names = find_anatomy(model).names
    check_saved(folder, names, found, rank)
    kept = Directions.load(folder / FILE_NAME)
    assert len(kept.sites) == 12 and kept == Directions.of(known)
    shares = check_saved_protection(folder, names, kept)
    assert len(shares) == 12 and (max(shares) < 1e-5) == (not soft)
    # Stock PEFT loads it.
    stock = PeftModel.from_pretrained(type(tiny("llama")).from_pretrained(base), folder)
    with torch.no_grad():
        a, b = stock(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert torch.allclose(a, b, atol=1e-5)
    report = merge_adapter(base, folder, tmp_path / "merged", found, progress=False)
    assert report.linears == 18 and "and 18 whole linears" in report.text()
    proof = verify(base, tmp_path / "merged", found, progress=False)
    assert proof.ok and proof.linears == (18, 18)
    assert "outside the selected rows and the targeted linears" in proof.text()
    leaks = measure_leakage(base, tmp_path / "merged", found, kept)
    assert (max(leaks.shares) < 1e-4) == (not soft) and "mlp." in leaks.text() + "mlp."
    assert "and on 18 targeted linears" in check_adapter(base, folder, found)
    # The rows file alone decides what may differ: without its linears the proof fails.
    bare = RowSelection(found.rows, found.hidden_size, found.fingerprint)
    refused = verify(base, tmp_path / "merged", bare, progress=False)
    assert len(refused.faults) == 18 and "q_proj.weight changed" in " ".join(refused.faults)
    with pytest.raises(ValueError, match="18 modules that the rows file does not name"):
        merge_adapter(base, folder, tmp_path / "again", bare, progress=False)


@pytest.mark.parametrize("rank", [None, 2])
def test_resuming_goes_on_bit_by_bit(tmp_path, rank):
    known = directions("llama", soft=True)
    model = implanted("llama", rank, known)
    optimizer = train(model, 3)
    model.save_pretrained(tmp_path / "first")
    states = copy.deepcopy(optimizer.state_dict())
    again = implanted("llama", rank, known)
    again.load_adapter(tmp_path / "first", "default", is_trainable=True)
    adapter.freeze(again)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    train(model, 3, optimizer)
    fresh = torch.optim.AdamW(trainable(again), lr=0.05, weight_decay=0.1)
    fresh.load_state_dict(states)
    train(again, 3, fresh)
    resumed = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed[name]), name


def test_directions_in_bfloat16_are_resumed_and_saved_with_their_own_function(tmp_path):
    """P is that of the rounded V, which is not quite orthogonal; it is undone exactly."""
    known = {n: v.to(torch.bfloat16) for n, v in directions("llama", soft=True).items()}
    named = list(known.items())
    shared = {id(v): v for v in directions("llama", soft=True).values()}
    assert len(shared) == 12 and named
    model = implanted("llama", None, known)
    train(model, 3)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path / "a")
        after = model(input_ids=IDS).logits
    assert torch.allclose(before, after, atol=1e-4)
    stock = PeftModel.from_pretrained(tiny("llama"), tmp_path / "a")
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=IDS).logits, after, atol=1e-4)
    model.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_some_linears_without_the_rows():
    model = implanted(targets=["q_proj", "v_proj"])
    assert model._loki_selection.counts == [0, 0, 0]
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 12 and all("q_proj" in n or "v_proj" in n for n in names)
    train(model, 1)
    adapter.check(model)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="is called z_proj; there are down_proj, gate_proj"):
        implanted(targets=["z_proj"])
    down = input_directions(tiny("llama"), *CALIBRATION, energy=0.7)
    with pytest.raises(ValueError, match=r"no directions for .*q_proj.*same `targets`"):
        implanted(protect=down)
    some = directions("llama", targets=["mlp.up_proj", "mlp.gate_proj"])
    other = {n.replace("layers.0.", "layers.7."): v for n, v in some.items()}
    with pytest.raises(ValueError, match="layers.7.*this model has no such linear module"):
        implanted(protect=other)
    selection = RowSelection(ROWS, 48, linears=["model.layers.9.self_attn.q_proj"])
    with pytest.raises(ValueError, match="layers.9.self_attn.q_proj, which this model does not"):
        implant(tiny("llama"), selection)


def test_two_adapters_of_the_same_linears_are_not_disjoint():
    names = ["model.layers.0.self_attn.q_proj"]
    one = Adapter("a", RowSelection([[1], [], []], 48, linears=names))
    other = Adapter("b", RowSelection([[2], [], []], 48, linears=names))
    with pytest.raises(ValueError, match="both change model.layers.0.self_attn.q_proj"):
        check_disjoint([one, other])
