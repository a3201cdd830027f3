"""The ways people train, each through Axolotl: nothing outside the selected rows moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.laws import adapter_of, assert_confined, assert_equal, assert_merged, base_tensors
from helpers.tokenizers import make_tokenizer
from safetensors.torch import load_file

from loki_plugin.implanting.merge import merge_adapter

pytestmark = pytest.mark.slow

# Half of the rows: a layer's A [32, 128] is just large enough for 8-bit optimizer states.
QUOTA = 50
REENTRANT, PLAIN = (
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for reentrant in (True, False)
)
PACKED = {"sample_packing": True, "pad_to_sequence_len": True}
PROTECTED = {"protect": {"inputs": 0.9, "anchor": 0.5, "anchor_batch": 2}}
ACCUMULATED = {"gradient_accumulation_steps": 2, "micro_batch_size": 2}
BF16 = {"bf16": True, "plugins": ["loki", "helpers.on_cpu.OnCpu"]}
# No autocast: only what the adapter keeps is in 32 bits.
BFLOAT16 = {"bf16": True, "plugins": ["loki", "helpers.on_cpu.WithoutAutocast"]}
INT8, NF4 = {"load_in_8bit": True}, {"load_in_4bit": True}  # NF4 with double quantisation


def optimizer(name):
    return {"optimizer": name}


# name -> (family of the base, rank, settings)
MATRIX = {
    "fp32-dense-adamw-reentrant-accumulated": (
        "llama", None, optimizer("adamw_torch") | REENTRANT | ACCUMULATED),
    "fp32-rank-fused-checkpointed-packed": (
        "llama", 2, optimizer("adamw_torch_fused") | PLAIN | PACKED | {"loki": PROTECTED}),
    "fp32-dense-muon": ("llama", None, optimizer("muon")),
    "bf16-dense-fused-reentrant": (
        "llama", None, BF16 | optimizer("adamw_torch_fused") | REENTRANT),
    "plain_bf16-dense": ("llama", None, BFLOAT16 | optimizer("adamw_torch")),
    "plain_bf16-nf4-rank": ("llama", 2, BFLOAT16 | NF4 | optimizer("adamw_torch")),
    "bf16-rank-schedule_free": ("llama", 2, BF16 | optimizer("schedule_free_adamw")),
    "int8-dense-adamw_8bit-checkpointed": (
        "llama", None, INT8 | optimizer("adamw_8bit") | PLAIN),
    "int8-rank-muon-accumulated": ("llama", 2, INT8 | optimizer("muon") | ACCUMULATED),
    "nf4-dense-paged_adamw_8bit-reentrant-packed": (
        "llama", None, NF4 | optimizer("paged_adamw_8bit") | REENTRANT | PACKED),
    "nf4-rank-adamw-checkpointed-accumulated": (
        "llama", 2, NF4 | optimizer("adamw_torch") | PLAIN | ACCUMULATED),
    "bias-dense": ("starcoder2", None, optimizer("adamw_torch")),
    "bias-conv1d-rank": ("gpt2", 2, optimizer("adamw_torch")),
    "bias-nf4-dense": ("phi", None, NF4 | optimizer("adamw_torch")),
    "tied-dense": ("tied", None, optimizer("adamw_torch")),
}  # fmt: skip


@pytest.fixture(scope="session")
def bases(base, tmp_path_factory):
    """Folders of small bases: biased down-projections (one Conv1D), tied embeddings."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    gpt2 = {"n_embd": 64, "n_inner": 128, "n_layer": 3, "n_head": 4, "n_positions": 512}
    families = {
        "starcoder2": ("starcoder2", common | {"num_key_value_heads": 2, "use_bias": True}),
        "gpt2": ("gpt2", gpt2),
        "phi": ("phi", common),
        "tied": ("llama", common | {"tie_word_embeddings": True}),
    }
    folders = {"llama": base}
    for name, (model_type, settings) in families.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer = make_tokenizer(folders[name])
        special = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id")}
        special |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **settings, **special)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for tensor_name, parameter in model.named_parameters():
                if tensor_name.endswith("bias"):
                    parameter.normal_(0, 0.1)  # not at their trivial initial zeros
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def short(run_config, prepared):
    """A run of three steps with weight decay and clipping; its data are prepared once."""
    run_config["loki"]["quota"] = QUOTA
    return run_config | {
        "max_steps": 3,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "dataset_prepared_path": str(prepared),
        "dataloader_num_workers": 0,
    }


@pytest.fixture
def watched(monkeypatch):
    """The base as the first hook got it and as the last one sees it, and the trainer."""
    from loki_plugin.plugin import LokiPlugin

    seen = {}

    def wrap(hook, before=lambda *_: None):
        original = getattr(LokiPlugin, hook)

        def wrapped(self, cfg, what):
            before(what)
            return original(self, cfg, what)

        monkeypatch.setattr(LokiPlugin, hook, wrapped)

    wrap("post_model_build", lambda model: seen.update(before=base_tensors(model)))
    wrap("post_trainer_create", lambda trainer: seen.update(trainer=trainer))
    wrap("post_train", lambda model: seen.update(after=base_tensors(model), model=model))
    return seen


@pytest.mark.parametrize("case", MATRIX)
def test_only_the_selected_rows_move(case, short, train, bases, watched):
    family, rank, settings = MATRIX[case]
    loki = short["loki"] | {"rank": rank} | settings.get("loki", {})
    short |= {"base_model": str(bases[family])} | settings | {"loki": loki}
    train(short)
    assert_equal(watched["before"], watched["after"])
    out = Path(short["output_dir"])
    selection = assert_confined(out, rank)
    assert selection.counts == [32, 32, 32]
    stored = torch.bfloat16 if "bf16" in settings else torch.float32
    assert (
        "load_in_8bit" in settings or watched["model"].get_input_embeddings().weight.dtype == stored
    )
    assert_optimizer(watched["trainer"].optimizer, settings["optimizer"])
    if "protect" in settings.get("loki", {}):
        report = json.loads((out / "loki_report.json").read_text())
        assert report["anchor_kl_last_step"] > 0
        assert max(report["protection"]["leakage_per_layer"]) < 1e-6
    merge_adapter(bases[family], out, out / "merged", selection, False)
    assert_merged(bases[family], out / "merged", selection, transposed=family == "gpt2")


def test_checkpointing_changes_no_bit_of_the_update(short, train, tmp_path):
    adapters = []
    for i, settings in enumerate(({}, REENTRANT, PLAIN)):
        train(short | settings | {"output_dir": str(tmp_path / str(i))})
        adapters.append(load_file(tmp_path / str(i) / "adapter_model.safetensors"))
    plain, *checkpointed = adapters
    for other in checkpointed:
        assert_equal(plain, other)


RESUMED = {
    "nf4-rank-adamw_8bit": (2, NF4 | optimizer("adamw_8bit") | ACCUMULATED),
    "int8-dense-adamw_8bit": (None, INT8 | optimizer("adamw_8bit")),
    "bf16-dense-schedule_free": (None, BF16 | optimizer("schedule_free_adamw")),
    "fp32-rank-muon": (2, optimizer("muon")),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(case, short, train, tmp_path):
    rank, settings = RESUMED[case]
    short["loki"]["rank"] = rank
    short |= settings | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(short)
    out, again = Path(short["output_dir"]), tmp_path / "again"
    train(short | {"output_dir": str(again), "resume_from_checkpoint": str(out / "checkpoint-2")})
    halfway, whole, resumed = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (out / "checkpoint-2", out, again)
    )
    assert_equal(whole, resumed)
    assert any(not torch.equal(halfway[name], whole[name]) for name in whole)


@pytest.mark.parametrize("rank", [None, 2], ids=["dense", "rank"])
def test_an_adapter_trains_on_from_where_it_was(rank, short, train, watched, tmp_path):
    """On NF4: the update of the second run goes on from the first one's, in its rows."""
    short["loki"]["rank"] = rank
    short |= NF4
    train(short)
    first, second = Path(short["output_dir"]), tmp_path / "second"
    # So small a rate that the second adapter must be the first one but for rounding.
    more = {"lora_model_dir": str(first), "output_dir": str(second), "learning_rate": 1e-7}
    train(short | more)
    assert_equal(watched["before"], watched["after"])
    assert assert_confined(second, rank) == assert_confined(first, rank)
    before, after = adapter_of(first), adapter_of(second)
    for layer in before:
        for old, new in zip(before[layer], after[layer], strict=True):
            assert torch.allclose(old, new, atol=1e-6)
        assert not torch.equal(before[layer][0], after[layer][0])


CLASSES = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_8bit": "AdamW",
    "paged_adamw_8bit": "AdamW",
    "muon": "Muon",
    "schedule_free_adamw": "AdamWScheduleFree",
}


def assert_optimizer(optimizer, name):
    """The run had the optimizer that its settings name, and that one had work to do."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's
    assert type(optimizer).__name__ == CLASSES[name], type(optimizer)
    states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert any(t.dtype == torch.uint8 for t in states) == ("8bit" in name)
    assert any(g.get("fused") for g in optimizer.param_groups) == ("fused" in name)
    decay = {g.get("weight_decay", g.get("wd")) for g in optimizer.param_groups if g["params"]}
    assert decay == {0.1}
