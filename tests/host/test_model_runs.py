"""Runs through Axolotl: a model for images and text, a mixture of experts, a hybrid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.quantised import widened
from helpers.tokenizers import make_tokenizer
from helpers.wrappers import asked_of, image_data, save_gemma3, save_llava, save_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor

from benchmarks.standins import shrink
from loki_plugin.cli import loki
from loki_plugin.implanting.proven import merge_run
from loki_plugin.model.building import load
from loki_plugin.picturing.page import rebuild

TOWER = "vision_tower"


def save(config, folder):
    """A stand-in that knows a tokenizer."""
    save_model(folder, config, make_tokenizer(folder))


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrapper")
    save_llava(folder)
    return folder


@pytest.mark.slow
def test_text_through_a_wrapper_trains_and_merges_byte_by_byte(wrapper, run_config, train, our_log):
    config = run_config | {"base_model": str(wrapper)}
    out = Path(train(config).output_dir)
    report = json.loads((out / "loki_report.json").read_text(encoding="utf-8"))
    assert report["verified"] and report["adapter_fits"] == "LlavaForConditionalGeneration"
    assert "names       of modules are those of LlavaForConditionalGeneration" in our_log.text
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f'model = LlavaForConditionalGeneration.from_pretrained("{wrapper}")' in card
    assert "`loki export ADAPTER OUT --names text`" in card
    _, proof = merge_run(config, [out], out / "merged")
    assert proof.ok and all(proof.changed_rows)
    before, after = (load_file(f / "model.safetensors") for f in (wrapper, out / "merged"))
    changed = sorted(k for k in before if not torch.equal(before[k], after[k]))
    assert len(changed) == 4 and all(k.endswith("mlp.down_proj.weight") for k in changed)
    assert not any(TOWER in k for k in changed) and any(TOWER in k for k in before)


# family -> its base, how it is stored, a method that every image passes through
IMAGES = {
    "llava": (save_llava, {}, "LlavaModel"),
    "gemma3": (
        save_gemma3,
        {"load_in_4bit": True, "gradient_checkpointing": False}
        | {"bnb_config_kwargs": {"llm_int8_skip_modules": ["vision_tower", "lm_head"]}},
        "Gemma3Model",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", IMAGES)
def test_images_and_text_train_the_rows_of_the_decoder(
    tmp_path, run_config, train, family, monkeypatch
):
    """Axolotl's processor path, with everything beside it that reads text: protection, the
    anchor, forgetting at each evaluation. In 4 bits too, with the tower left whole."""
    monkeypatch.setattr("loki_plugin.protecting.texts.TEXT_TOKENS", 16)
    save_base, storage, name = IMAGES[family]
    base, seen = tmp_path / "base", []
    save_base(base)
    kind = getattr(transformers, name)
    features = kind.get_image_features

    def get_image_features(self, pixel_values, **more):
        seen.append(pixel_values.shape)
        return features(self, pixel_values, **more)

    monkeypatch.setattr(kind, "get_image_features", get_image_features)
    data = {"path": str(image_data(tmp_path)), "ds_type": "json", "type": "chat_template"}
    config = run_config | storage | {
        "base_model": str(base), "processor_type": "AutoProcessor", "datasets": [data],
        "skip_prepare_dataset": True, "remove_unused_columns": False, "sample_packing": False,
        "micro_batch_size": 2, "val_set_size": 4, "eval_steps": 3,
        "loki": run_config["loki"] | {"protect": "auto"},
    }  # fmt: skip
    out = Path(train(config).output_dir)
    report = json.loads((out / "loki_report.json").read_text(encoding="utf-8"))
    assert report["verified"], report["faults"]
    assert len(report["forgetting_while_training"]["path"]) == 3
    assert len(seen) >= 6 and all(shape[0] == 2 for shape in seen)  # every batch of every step
    quantised = "load_in_4bit" in storage
    onto = "dequantised" if quantised else "original"
    _, proof = merge_run(config, [out], out / "merged", onto=onto)
    assert proof.ok and all(proof.changed_rows)
    if quantised:  # the command says too what either base answers
        yaml, output = tmp_path / "run.yaml", str(tmp_path / "elsewhere")
        yaml.write_text(json.dumps(config))
        done = CliRunner().invoke(loki, ["merge", str(yaml), "--output", output, "--json"])
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert told["proof"]["ok"] and len(told["advice"]["ratios"]) == 4
        assert told["advice"]["losses"].keys() == {"original", "dequantised"}, told["advice"]

    # With an image before its question the merged model answers as the adapter does.
    processor = AutoProcessor.from_pretrained(out / "merged")
    inputs = processor.apply_chat_template(
        asked_of(tmp_path / "3.png", "say 3"), add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    model = load(str(out / "merged"), dtype=torch.float32)
    answers = model.eval()(**inputs).logits
    beside = load(str(out / "merged-base" if quantised else base), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(beside, out).eval()
    torch.testing.assert_close(answers, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    assert not torch.allclose(answers, model(**inputs).logits, atol=1e-3)


@pytest.mark.slow
def test_what_axolotl_leaves_whole_in_4_bits_is_left_whole_for_the_merge(
    tmp_path, run_config, train
):
    """Falcon-H1's `out_proj`; the base that the rows were learned beside is found again."""
    base = tmp_path / "base"
    config = widened(shrink(AutoConfig.for_model("falcon_h1")))
    config.tie_word_embeddings = False  # Axolotl's settings quantise its head
    save(config, base)
    bf16 = {"bf16": True, "plugins": ["loki", "helpers.on_cpu.WithoutAutocast"]}
    more = bf16 | {"load_in_4bit": True, "gradient_checkpointing": False, "base_model": str(base)}
    run = run_config | more | {"loki": run_config["loki"] | {"rank": 2}}
    out = Path(train(run).output_dir)
    _, proof = merge_run(run, [out], out / "merged", onto="dequantised")
    assert proof.ok and all(proof.changed_rows)
    before, after = (load_file(f / "model.safetensors") for f in (base, out / "merged"))
    kept = [k for k in before if "out_proj" in k]
    assert len(kept) == 4 and all(torch.equal(before[k], after[k]) for k in kept)
    rounded = [k for k in before if "in_proj.weight" in k]
    assert len(rounded) == 4 and not any(torch.equal(before[k], after[k]) for k in rounded)


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "lfm2", "qwen3_5_text", "glm4_moe", "mixtral"])
def test_a_resumed_run_of_theirs_is_the_uninterrupted_one_bit_by_bit(
    tmp_path, run_config, train, family
):
    """A wrapper, two hybrids, a mixture with shared experts, and one with routed experts only."""
    base = tmp_path / "base"
    if family == "llava":
        save_llava(base)
    else:
        save(shrink(AutoConfig.for_model(family)), base)
    block = run_config["loki"] | ({"targets": "all", "rank": 2} if family == "mixtral" else {})
    config = run_config | {"base_model": str(base), "loki": block}
    config |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    out, again = Path(train(config).output_dir), tmp_path / "again"
    checkpoint = out / "checkpoint-2"
    train(config | {"output_dir": str(again), "resume_from_checkpoint": str(checkpoint)})
    halfway, whole, resumed = (
        load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, out, again)
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(halfway[name], whole[name]) for name in whole)


ROUTED = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe")


@pytest.mark.slow
@pytest.mark.parametrize("family", ROUTED)
def test_of_routed_experts_only_all_else_trains_protected(
    tmp_path, run_config, train, family, monkeypatch, our_log
):
    """No rows, no analysis; attention alone moves, and what it reads stands still."""
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
    assert report["protection"]["still"] == report["linears"]
    assert not report["protection"]["inputs"] and report["protection"]["set_from"]["texts"] > 0
    beside = report["protection"]["set_beside"]
    assert sorted(n for names in beside["inputs"] for n in names) == sorted(report["linears"])
    assert 0 < min(beside["energy"]) <= max(beside["energy"]) < 1 <= min(beside["directions"])
    # So little text holds fewer directions than were asked for, and that is told.
    capped = f"at {beside['capped']} of {len(beside['inputs'])} inputs low-rank updates are set"
    assert (capped in our_log.text) == bool(beside["capped"])
    low, high = min(beside["directions"]), max(beside["directions"])
    told = f"beside {low} to {high} directions at each of {len(beside['inputs'])} inputs, which"
    told += f" hold at least {100 * min(beside['energy']):.1f} % of what {beside['tokens']:,}"
    assert told in our_log.text
    assert told in rebuild(out)[0].read_text(encoding="utf-8")
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"loki": {"protect": {"anchor": 1.0}}},
        {"loki": {"report": True}},
        {"val_set_size": 0.2, "eval_steps": 2},
    ],
    ids=["anchor", "report", "evaluations"],
)
def test_texts_beyond_the_positions_of_a_model_end_a_run_before_it_trains(
    tmp_path, run_config, train, more
):
    """Where nothing is analysed or searched, the anchor and what measures would meet them first."""
    folder, rows = tmp_path / "gpt2", tmp_path / "rows.json"
    settings = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 128}
    save(AutoConfig.for_model("gpt2", **settings), folder)
    rows.write_text(json.dumps([[1, 2]] * 3))
    block = {"rows": str(rows), "calibration": {"source": "builtin"}} | more.get("loki", {})
    config = run_config | {"base_model": str(folder), "sequence_len": 64} | more
    config["loki"] = run_config["loki"] | block
    with pytest.raises(ValueError, match="too long for this model, which has 128 positions"):
        train(config)
