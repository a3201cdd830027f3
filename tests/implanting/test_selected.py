"""Rows of B outside the selection do not exist in memory; on disk B is an ordinary LoRA B."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import torch
from helpers.families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from transformers.optimization import Adafactor

from loki_plugin import RowSelection, implant
from loki_plugin.implanting import adapter
from loki_plugin.implanting.selected import RowFactor, rows_outside
from loki_plugin.implanting.training import accept_whole_states

ROWS = [[3, 1, 40], [0, 47, 5], [7, 8, 9]]
IDS = torch.arange(1, 13).view(2, 6)
FORMS = pytest.mark.parametrize("rank", [None, 2], ids=["dense", "rank2"])


def factors(model):
    return [m for _, m in adapter.constrained_modules(model)]


def trained(rank):
    model = implant(tiny("llama"), ROWS, rank)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def ordinary(model, adapter_name="default"):
    """A stock PEFT model with the same LoRA settings and no constraint."""
    config = model.peft_config[adapter_name]
    plain = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=["down_proj"])
    return get_peft_model(tiny("llama"), plain)


@FORMS
def test_the_state_dict_is_that_of_an_ordinary_lora(rank):
    model = trained(rank)
    ours, theirs = model.state_dict(), ordinary(model).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    for (name, module), rows in zip(adapter.constrained_modules(model), ROWS, strict=True):
        b = ours[f"{name}.weight"]
        assert rows_outside(b, torch.tensor(rows)) == []
        wanted = torch.eye(3) if rank is None else module.values
        assert torch.equal(b[sorted(rows)], wanted)
        assert torch.equal(b, module.weight)  # what PEFT reads to merge


@FORMS
def test_memory_holds_the_rows_only(rank):
    """8B at quota 30: the float32 one-hot matrices alone were 0.64 GB."""
    for module in factors(trained(rank)):
        held = sum(t.numel() for t in [*module.parameters(), *module.buffers()])
        assert held == (0 if rank is None else 3 * 2)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@FORMS
def test_loads_what_it_saves(rank, assign):
    model = trained(rank)
    saved = get_peft_model_state_dict(model)
    again = implant(tiny("llama"), ROWS, rank)
    result = set_peft_model_state_dict(again, saved, low_cpu_mem_usage=assign)
    assert not result.unexpected_keys and not any("lora" in k for k in result.missing_keys)
    assert torch.equal(logits(again), logits(model))
    full = implant(tiny("llama"), ROWS, rank)
    full.load_state_dict(model.state_dict(), strict=True, assign=assign)
    assert torch.equal(logits(full), logits(model))
    adapter.check(full)


@FORMS
def test_a_saved_adapter_is_loaded_back_into_the_constraint(rank, tmp_path):
    """As `Trainer` does when it resumes."""
    model = trained(rank)
    model.save_pretrained(tmp_path)
    again = implant(tiny("llama"), ROWS, rank)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    adapter.check(again)
    stock = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.allclose(logits(stock), logits(model), atol=1e-5)


@FORMS
def test_loading_refuses_another_selection_and_names_the_row(rank):
    model = trained(rank)
    name, _ = next(iter(adapter.constrained_modules(model)))
    saved = model.state_dict()
    b = saved[f"{name}.weight"].clone()
    b[30, 1] = 1e-30
    problem = "not the one-hot selector of the rows .row 30" if rank is None else r"\[30\]"
    with pytest.raises(ValueError, match=f"{name}.weight: lora_B .*{problem}.*loki_rows.json"):
        model.load_state_dict(saved | {f"{name}.weight": b})
    with pytest.raises(ValueError, match=r"lora_B has shape \[47, .\], expected \[48, .\]"):
        model.load_state_dict(saved | {f"{name}.weight": b[:47]})
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}.weight"):
        model.load_state_dict({k: v for k, v in saved.items() if k != f"{name}.weight"})
    if rank is None:
        b = saved[f"{name}.weight"].flip(1)
        with pytest.raises(ValueError, match=r"one-hot selector of the rows \(row 1 differs"):
            model.load_state_dict(saved | {f"{name}.weight": b})


@FORMS
def test_the_rows_survive_meta_copies_and_casts(rank):
    model = trained(rank)
    whole = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), whole)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    twin = implant(tiny("llama"), ROWS, rank).to("meta")
    assert {m.weight.device.type for m in factors(twin)} == {"meta"}
    twin.load_state_dict(saved, assign=True)
    for module in factors(twin):
        assert module.rows.tolist() in [sorted(r) for r in ROWS]
    emptied = implant(tiny("llama"), ROWS, rank).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(saved, strict=True)
    for ours, theirs in zip(factors(emptied), factors(model), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    assert {m.weight.dtype for m in factors(model.to(torch.bfloat16))} == {torch.bfloat16}


OPTIMIZERS = {
    "adamw-decay": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.5),
    "adafactor": lambda p: Adafactor(p, lr=0.05, relative_step=False, scale_parameter=False),
    "adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(
        p, lr=0.05, weight_decay=0.5, min_8bit_size=1
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_reaches_rows_outside(optimizer):
    """Weight decay, momentum, 8-bit blocks and one NaN step through gradient clipping."""
    model = implant(tiny("llama"), ROWS, 2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    chosen = OPTIMIZERS[optimizer](parameters)
    for bad in (False, False, True):
        chosen.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        (loss * float("nan") if bad else loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        chosen.step()
    assert torch.isnan(factors(model)[0].values).any()
    for module, rows in zip(factors(model), ROWS, strict=True):
        assert isinstance(module, RowFactor)
        assert rows_outside(module.weight, torch.tensor(rows)) == []
        outside = [j for j in range(48) if j not in rows]
        assert torch.equal(module.weight[outside], torch.zeros(45, 2))


@FORMS
def test_merging_and_unmerging_through_peft(rank):
    model = trained(rank).double()
    whole = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), whole, atol=1e-9)
    assert not torch.equal(
        model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight,
        tiny("llama").double().model.layers[0].mlp.down_proj.weight,
    )
    model.unmerge_adapter()
    assert torch.allclose(logits(model), whole, atol=1e-9)


def test_rows_outside_counts_what_is_not_zero_and_not_selected():
    b = torch.zeros(6, 2)
    b[1, 0], b[2, 1], b[4, 0] = 1, -1e-30, float("nan")
    assert rows_outside(b, torch.tensor([1, 3])) == [2, 4]
    assert rows_outside(b, torch.tensor([1, 2, 4])) == []


def test_the_install_of_loaded_factors_names_the_layer(tmp_path):
    trained(2).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    other = RowSelection([ROWS[0], [0, 47, 6], ROWS[2]])
    with pytest.raises(ValueError, match=r"layer 1: lora_B has non-zero rows outside.*\[5\]"):
        adapter.install(loaded, other, 2, fresh=False)


def whole_state(kind):
    """What 0.1.1 saved: the optimizer of a low-rank run, with moments of all rows of lora_B."""
    model = ordinary(implant(tiny("llama"), ROWS, 2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[kind](parameters)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("kind", ["adamw-decay", "sgd-momentum", "adafactor"])
def test_an_optimizer_state_of_all_rows_gives_its_rows(kind):
    saved = whole_state(kind)
    model = implant(tiny("llama"), ROWS, 2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[kind](parameters)
    accept_whole_states(optimizer, model)
    optimizer.load_state_dict(saved)
    for module in factors(model):
        index = next(i for i, p in enumerate(parameters) if p is module.values)
        for key, tensor in optimizer.state[module.values].items():
            before = saved["state"][index][key]
            if isinstance(tensor, torch.Tensor) and before.shape[:1] == (48,):
                before = before[module.rows]
            assert tensor is before is None or torch.equal(*map(torch.as_tensor, (tensor, before)))
    again = optimizer.state_dict()
    optimizer.load_state_dict(again)  # its own states pass unchanged
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def test_an_eight_bit_state_of_all_rows_is_refused():
    model = implant(tiny("llama"), ROWS, 2)
    optimizer = OPTIMIZERS["adamw8bit"]([p for p in model.parameters() if p.requires_grad])
    accept_whole_states(optimizer, model)
    with pytest.raises(ValueError, match="lora_B.default: .*8-bit.*all 48 rows.*lora_model_dir"):
        optimizer.load_state_dict(whole_state("adamw8bit"))


@FORMS
def test_a_rank_without_weights_gets_them_from_the_one_that_has_them(rank):
    """As FSDP2 fills the other ranks: implanted on the meta device, then loaded."""
    whole = trained(rank)
    empty = implant(tiny("llama").to("meta"), ROWS, rank)
    assert all(p.is_meta for p in empty.parameters())
    for module in factors(empty):  # buffers are moved, and nothing can be moved off meta
        assert not any(buffer.is_meta for buffer in module.buffers())
    empty.load_state_dict(whole.state_dict(), assign=True)
    for own, other in zip(factors(empty), factors(whole), strict=True):
        assert torch.equal(own.weight, other.weight)
