"""The families that people fine-tune, each as it is published, dense and low-rank, in float32 and
in NF4: trained on text, saved, read by stock PEFT, gone on from, merged, verified.

Wrappers for images are the wrappers: their towers are quantised with the rest, and stay as they
are. Families of routed experts only train every other linear instead of rows.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.laws import assert_equal, base_tensors, checkpoint
from helpers.protected import train, trainable
from helpers.quantised import widened
from peft import PeftModel
from transformers import AutoConfig, BitsAndBytesConfig

from benchmarks.standins import published, shrink
from benchmarks.trial import save_standin, stock_peft
from loki_plugin import RowSelection, implant
from loki_plugin.choices import ALL, DOWN
from loki_plugin.implanting import adapter
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.proven import merge_run
from loki_plugin.implanting.verify import verify
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.building import kinds
from loki_plugin.model.fingerprint import fingerprint
from loki_plugin.model.linears import chosen
from loki_plugin.model.quantised import evaluating, quantised_modules

EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
NO_EXPERTS = {"num_local_experts": 0, "shared_intermediate_size": 128}
ATTENDS = {"layer_types": ["full_attention"] * 4}
WRAPPER, TEXT = "ForConditionalGeneration", "ForCausalLM"
TOWER = "vision|visual|audio"
LAYERS = 4
IDS = torch.arange(5, 23).view(2, 9)


@dataclass(frozen=True)
class Family:
    """`more` is set in the configuration of its text model; `text`: another text model than the
    wrapper's default. `rows` of how many layers; without any, everything but the experts trains."""

    type: str
    kind: str
    rows: int = LAYERS
    text: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "gemma3": Family("gemma3", f"Gemma3{WRAPPER}"),
    "gemma4": Family("gemma4", f"Gemma4{WRAPPER}"),
    "gemma4-experts": Family(
        "gemma4", f"Gemma4{WRAPPER}", more={"enable_moe_block": True} | EXPERTS
    ),
    "ministral3": Family("mistral3", f"Mistral3{WRAPPER}", text="ministral3"),
    "qwen2_5_vl": Family("qwen2_5_vl", f"Qwen2_5_VL{WRAPPER}"),
    "qwen3_vl": Family("qwen3_vl", f"Qwen3VL{WRAPPER}"),
    "llama4": Family("llama4", f"Llama4{WRAPPER}"),
    "qwen3_5": Family("qwen3_5", f"Qwen3_5{WRAPPER}"),
    "qwen3_5_moe": Family("qwen3_5_moe", f"Qwen3_5Moe{WRAPPER}"),
    "granite4": Family("granitemoehybrid", f"GraniteMoeHybrid{TEXT}", more=NO_EXPERTS | ATTENDS),
    "granite4-hybrid": Family("granitemoehybrid", f"GraniteMoeHybrid{TEXT}", more=NO_EXPERTS),
    "granite4-experts": Family("granitemoehybrid", f"GraniteMoeHybrid{TEXT}"),
    "falcon_h1": Family("falcon_h1", f"FalconH1{TEXT}"),
    "lfm2": Family("lfm2", f"Lfm2{TEXT}"),
    "qwen3_moe": Family("qwen3_moe", f"Qwen3Moe{TEXT}", rows=0),
    "mixtral": Family("mixtral", f"Mixtral{TEXT}", rows=0),
    "gpt_oss": Family("gpt_oss", f"GptOss{TEXT}", rows=0),
}
# Each family in both storages and both forms, in two cells; what is of storage and form together is
# no family's own. Those without rows have one form: ordinary LoRA on every other linear.
ALL_CELLS = ("gemma4", "qwen3_5")
CELLS = [
    pytest.param(name, storage, rank, id=f"{name}-{storage}-{f'rank{rank}' if rank else 'dense'}")
    for name, family in FAMILIES.items()
    for storage, rank in (("float32", None), ("nf4", 4), ("nf4", None), ("float32", 4))
    if name in ALL_CELLS or (storage == "float32") == (rank is None) or not family.rows
    if family.rows or rank is None
]
NF4 = {  # as Axolotl sets it, but for the dtype: float32 tells rounding from faults
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_compute_dtype": torch.float32,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """family -> the folder of its base, made when it is first asked for."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            family = FAMILIES[name]
            config = widened(shrink(published(family.type, family.text)))
            for key, value in family.more.items():
                setattr(config.get_text_config(), key, value)
            save_standin(config, made[name])
        return made[name]

    return base


def load(base: Path, storage: str):
    """By the class that Axolotl loads, in float32 beside what is quantised."""
    kind = kinds(AutoConfig.from_pretrained(base))[0]
    more = {"quantization_config": BitsAndBytesConfig(**NF4)} if storage == "nf4" else {}
    return kind.loader.from_pretrained(base, dtype=torch.float32, **more)


def logits(model):
    with torch.no_grad(), evaluating(model):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name, storage, rank", CELLS)
def test_trains_is_read_goes_on_merges_and_verifies(tmp_path, bases, name, storage, rank):
    family, base = FAMILIES[name], bases(name)
    model = load(base, storage)
    assert type(model).__name__ == family.kind
    assert bool(quantised_modules(model)) == (storage == "nf4")
    anatomy = find_anatomy(model)
    assert anatomy.num_layers == family.rows
    targets = DOWN if family.rows else ALL
    selection = RowSelection(
        [torch.arange(1, 7) + layer for layer in range(family.rows)],
        anatomy.hidden_size,
        fingerprint(model),
        linears=chosen(model, anatomy, targets),
    )
    tuned = implant(model, selection, rank, targets=targets, linear_rank=4)
    before, untrained = base_tensors(tuned), logits(tuned)
    towers = [n for n in before if re.search(TOWER, n)]
    assert bool(towers) == family.kind.endswith(WRAPPER)
    assert any(n.endswith(".absmax") for n in towers) == (bool(towers) and storage == "nf4")

    # A few steps, saved; what goes on from the save is bit by bit what never stopped.
    optimizer = train(tuned.train(), 2, ids=IDS)
    tuned.save_pretrained(tmp_path / "first")
    resumed = PeftModel.from_pretrained(load(base, storage), tmp_path / "first", is_trainable=True)
    known = RowSelection.load(tmp_path / "first" / "loki_rows.json")
    assert known == selection
    adapter.install(resumed, known, rank, fresh=False)
    for each in (tuned, resumed.train()):
        fresh = torch.optim.AdamW(trainable(each), lr=0.05, weight_decay=0.1)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(each, 2, fresh, ids=IDS)
    adapter.check(tuned, finite=True)
    assert_equal(before, base_tensors(tuned))
    assert_equal(before, base_tensors(resumed))
    ours, theirs = (dict(m.named_parameters()) for m in (tuned, resumed))
    moved = [n for n, p in ours.items() if p.requires_grad]
    assert len(moved) == (2 if rank or not family.rows else 1) * (
        family.rows or len(selection.linears)
    )
    for parameter in moved:
        assert torch.equal(ours[parameter], theirs[parameter]), parameter

    # Saved again, PEFT without us answers the same.
    tuned.save_pretrained(tmp_path / "adapter")
    wanted = logits(tuned)
    with stock_peft():
        stock = PeftModel.from_pretrained(load(base, storage), tmp_path / "adapter")
        close(logits(stock), wanted)
    assert float((wanted - untrained).abs().max()) > 0.01 * float(wanted.abs().max())

    # Merged onto what lies on disk: what trained, in its rows, and no other byte.
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", known, progress=False)
    proof = verify(base, tmp_path / "merged", known, progress=False)
    assert proof.ok and all(proof.changed_rows), proof.text()
    assert_changed(base, tmp_path / "merged", known)
    merged = tmp_path / "merged"
    if storage == "nf4":  # beside the weights that it was learned beside it answers as it did
        run, merged = {"base_model": str(base)}, tmp_path / "beside"
        assert merge_run(run, [tmp_path / "adapter"], merged, onto="dequantised")[1].ok
    close(logits(load(merged, "float32")), wanted)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def assert_changed(base: Path, merged: Path, selection: RowSelection) -> None:
    """By the names on disk, which no mapping of ours has touched."""
    before, after = checkpoint(base), checkpoint(merged)
    assert before.keys() == after.keys()
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert not any(re.search(f"{TOWER}|experts|router|gate$", n) for n in changed)
    if selection.linears:
        assert len(changed) == len(selection.linears)
        assert all("self_attn" in n for n in changed)
        return
    layers = {int(re.search(r"layers\.(\d+)\.", n)[1]): n for n in changed}
    assert sorted(layers) == list(range(LAYERS)) and len(changed) == LAYERS
    for layer, name in layers.items():
        rows = (before[name] != after[name]).any(1).nonzero()[:, 0]
        assert torch.equal(rows, selection.rows[layer]), name
