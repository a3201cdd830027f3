"""Runs through Axolotl: a model for images and text, a mixture of experts, a hybrid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.tokenizers import make_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig

from benchmarks.standins import shrink
from loki_plugin.cli import loki
from loki_plugin.implanting.proven import merge_run
from loki_plugin.model.building import kinds

TOWER = "vision_tower"


def save(config, folder):
    """A stand-in that knows a tokenizer, which is returned."""
    tokenizer = make_tokenizer(folder)
    config.get_text_config().vocab_size = len(tokenizer) + 4
    for each in (config, config.get_text_config()):
        each.bos_token_id, each.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        each.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    kinds(config)[0].loader.from_config(config).save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    """A LLaVA with a processor that Axolotl can load; its tower is deeper than its decoder."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    folder = tmp_path_factory.mktemp("wrapper")
    config = shrink(AutoConfig.for_model("llava"))
    config.vision_config.num_hidden_layers = 6
    tokenizer = save(config, folder)
    LlavaProcessor(
        CLIPImageProcessor(), tokenizer, patch_size=14, chat_template=tokenizer.chat_template
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_text_through_a_wrapper_trains_and_merges_byte_by_byte(wrapper, run_config, train):
    config = run_config | {"base_model": str(wrapper)}
    out = Path(train(config).output_dir)
    report = json.loads((out / "loki_report.json").read_text(encoding="utf-8"))
    assert report["verified"] and report["adapter_fits"] == "LlavaForConditionalGeneration"
    _, proof = merge_run(config, [out], out / "merged")
    assert proof.ok and all(proof.changed_rows)
    before, after = (load_file(f / "model.safetensors") for f in (wrapper, out / "merged"))
    changed = sorted(k for k in before if not torch.equal(before[k], after[k]))
    assert len(changed) == 4 and all(k.endswith("mlp.down_proj.weight") for k in changed)
    assert not any(TOWER in k for k in changed) and any(TOWER in k for k in before)


# family -> how its rows are chosen, how many layers have any, and a key of its checkpoint
OTHERS = {
    "glm4_moe": ({}, 4, "layers.2.mlp.shared_experts.down_proj.weight"),
    "jamba": ({}, 2, "layers.2.feed_forward.down_proj.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("rank", [None, 2])
def test_a_mixture_and_a_hybrid_train_go_on_and_merge(tmp_path, run_config, train, family, rank):
    block, layers, key = OTHERS[family]
    base = tmp_path / "base"
    save(shrink(AutoConfig.for_model(family)), base)
    more = {"loki": run_config["loki"] | block | ({"rank": rank} if rank else {})}
    config = run_config | {"base_model": str(base)} | more
    out = Path(train(config).output_dir)
    named = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert bool(named["target_parameters"]) == (family == "glm4_moe")
    second = config | {"lora_model_dir": str(out), "output_dir": str(tmp_path / "second")}
    again = Path(train(second).output_dir)
    for folder in (out, again):
        report = json.loads((folder / "loki_report.json").read_text(encoding="utf-8"))
        assert report["verified"], report["faults"]
    _, proof = merge_run(second, [again], again / "merged")
    assert proof.ok and len(proof.changed_rows) == layers and all(proof.changed_rows)
    before, after = (load_file(f / "model.safetensors") for f in (base, again / "merged"))
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert len(changed) == layers and any(k.endswith(key) for k in changed)


ROUTED = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe")


@pytest.mark.slow
@pytest.mark.parametrize("family", ROUTED)
def test_of_routed_experts_only_all_else_trains_protected(
    tmp_path, run_config, train, family, monkeypatch
):
    """No rows, no analysis; attention alone moves, and reads through its directions."""
    monkeypatch.setattr("loki_plugin.protecting.texts.TEXT_TOKENS", 16)
    base = tmp_path / "base"
    save(shrink(AutoConfig.for_model(family)), base)
    block = run_config["loki"] | {"targets": "all", "protect": "auto"}
    config = run_config | {"base_model": str(base), "loki": block}
    with pytest.raises(ValueError, match="routed experts only.*`targets: all` trains every other"):
        train(config | {"loki": run_config["loki"]})
    out = Path(train(config).output_dir)
    report = json.loads((out / "loki_report.json").read_text(encoding="utf-8"))
    kinds = {name.rpartition(".")[2] for name in report["linears"]}
    assert report["verified"] and kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(report["protection"]["inputs"]) == len(report["linears"]) // 2
    _, proof = merge_run(config, [out], out / "merged")
    assert proof.ok
    before, after = (load_file(f / "model.safetensors") for f in (base, out / "merged"))
    changed = sorted(k for k in before if not torch.equal(before[k], after[k]))
    assert len(changed) == len(report["linears"])
    assert all(k.endswith("_proj.weight") and "self_attn" in k for k in changed)
    more = config | {"lora_model_dir": str(out), "output_dir": str(tmp_path / "more")}
    assert json.loads(
        (Path(train(more).output_dir) / "loki_report.json").read_text(encoding="utf-8")
    )["verified"]


@pytest.mark.slow
def test_of_routed_experts_only_a_4_bit_run_merges_onto_either_base(
    tmp_path, run_config, train, monkeypatch
):
    """Experts are no modules, so that attention alone is stored in 4 bits."""
    monkeypatch.setattr("loki_plugin.protecting.texts.TEXT_TOKENS", 16)
    base, yaml = tmp_path / "base", tmp_path / "run.yaml"
    save(shrink(AutoConfig.for_model("mixtral")), base)
    block = run_config["loki"] | {"targets": "all", "protect": "auto"}
    more = {"load_in_4bit": True, "gradient_checkpointing": False}
    config = run_config | more | {"base_model": str(base), "loki": block}
    out = Path(train(config).output_dir)
    yaml.write_text(json.dumps(config | {"output_dir": str(out)}))
    for onto in ("original", "dequantised"):
        output = str(tmp_path / onto)
        done = CliRunner().invoke(
            loki, ["merge", str(yaml), "--onto", onto, "--output", output, "--json"]
        )
        assert done.exit_code == 0, done.output
        merged = json.loads(done.stdout)
        assert merged["proof"]["ok"]
        assert len(merged["advice"]["ratios"]) == merged["linears"] > 0
        assert merged["advice"]["losses"].keys() == {"original", "dequantised"}
