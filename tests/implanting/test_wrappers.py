"""Models for images, sound and text: the rows of their decoder, and nothing of their towers."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.standins import published, shrink
from benchmarks.trial import live, save_standin
from loki_plugin import RowSelection, implant
from loki_plugin.implanting.adapters import respelled
from loki_plugin.implanting.checkpoint import Base, open_checkpoint
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.verify import verify
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.building import build_empty, kinds, load
from loki_plugin.model.fingerprint import fingerprint

WRAPPERS = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",  # Ministral 3, Magistral, Mistral Small
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "glm46v": "Glm46VForConditionalGeneration",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
}
ROWS = [[1, 5, 9], [0, 2, 63], [3, 4, 5], [7, 8, 60]]


def small(family: str):
    return shrink(published(family))


def skip_what_does_not_run(config) -> None:
    """transformers 5.24 asks what Llama 4's decoder returns for `image_outputs`, in vain."""
    model = kinds(config)[0].loader.from_config(config)
    try:
        model(input_ids=torch.arange(5, 15)[None])
    except AttributeError as error:
        if "image_outputs" not in str(error):
            raise
        pytest.skip(f"transformers' own {type(model).__name__} does not run: {error}")


@pytest.mark.parametrize("family", WRAPPERS)
def test_trains_merges_and_verifies_through_its_wrapper(tmp_path, family):
    """`verify` compares every byte of the towers; a step on text changes every layer's rows."""
    skip_what_does_not_run(small(family))
    save_standin(small(family), tmp_path / "base")
    life = live(tmp_path / "base", tmp_path / "life")
    assert life.kind == WRAPPERS[family]
    assert (life.rows, life.analysed, life.trains, life.merges) == ("4 of 4", "yes", "yes", "yes")


def trained(folder, family: str, kind: str):
    """A base on disk, and an adapter of one of its classes beside it."""
    config = small(family)
    (chosen,) = (k for k in kinds(config) if k.name == kind)
    torch.manual_seed(0)
    whole = kinds(config)[0].loader.from_config(config)
    whole.save_pretrained(folder / "base")
    model = chosen.loader.from_pretrained(folder / "base", dtype=torch.float32)
    selection = RowSelection(ROWS, 64, fingerprint(model))
    tuned = implant(model, selection)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(folder / "adapter")
    return selection, tuned


@pytest.mark.parametrize("family", ["llama4", "qwen3_5"])
@pytest.mark.parametrize("ending", ["ForCausalLM", "ForConditionalGeneration"])
def test_the_class_that_was_trained_is_the_one_that_is_merged_into(tmp_path, family, ending):
    """Axolotl trains Llama 4 as its wrapper, others as its text model; both merge."""
    kind = {"llama4": "Llama4", "qwen3_5": "Qwen3_5"}[family] + ending
    selection, tuned = trained(tmp_path, family, kind)
    found = open_checkpoint(tmp_path / "base", selection.fingerprint)
    assert type(found.model).__name__ == kind
    if ending == "ForConditionalGeneration":
        skip_what_does_not_run(small(family))
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", selection, False)
    assert verify(tmp_path / "base", tmp_path / "out", selection, False).ok
    ids = torch.arange(5, 15)[None]
    merged = load(str(tmp_path / "out"), selection.fingerprint, dtype=torch.float32)
    assert type(merged).__name__ == kind
    with torch.no_grad():
        torch.testing.assert_close(
            merged.eval()(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits
        )


def test_without_a_fingerprint_it_is_the_class_that_axolotl_loads_or_that_the_run_names(tmp_path):
    config = small("llama4")
    assert type(build_empty(config)).__name__ == "Llama4ForConditionalGeneration"
    assert type(build_empty(config, "Llama4ForCausalLM")).__name__ == "Llama4ForCausalLM"
    assert type(build_empty(config, "AutoModelForCausalLM")) is type(build_empty(config))
    with pytest.raises(ValueError, match="model_type: transformers has no class 'Nothing'"):
        build_empty(config, "Nothing")
    with pytest.raises(ValueError, match=r"\(model_type 'clip'\) is of no class.*writes text"):
        build_empty(AutoConfig.for_model("clip"))
    run = {"base_model": "x", "model_type": "Llama4ForCausalLM"}
    assert Base.of_run(run).kind == "Llama4ForCausalLM"


def test_a_class_that_cannot_be_built_says_why():
    config = small("llava")
    config.text_config.num_attention_heads = 0
    with pytest.raises(ValueError, match="LlavaForCond.* cannot be built: ZeroDivisionError: int"):
        build_empty(config)


def test_an_adapter_in_the_spelling_of_the_other_class_merges_the_same(tmp_path):
    selection, _ = trained(tmp_path, "llama4", "Llama4ForConditionalGeneration")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    merge_adapter(base, adapter, tmp_path / "one", selection, False)
    file = adapter / "adapter_model.safetensors"
    renamed = {k.replace("language_model.model.", "model."): v for k, v in load_file(file).items()}
    assert renamed.keys().isdisjoint(load_file(file))
    save_file(renamed, file)
    merge_adapter(base, adapter, tmp_path / "two", selection, False)
    name = "model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


class Held:
    """An open safetensors file with these keys."""

    def __init__(self, keys):
        self._keys = keys

    def keys(self):
        return self._keys

    def get_tensor(self, key):
        assert key in self._keys
        return key


def test_names_of_a_tower_are_never_taken_for_the_decoders():
    names = [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(2)]
    head = "base_model.model.model.vision_tower.encoder."
    tower = Held([f"{head}layers.{i}.mlp.down_proj.lora_A.weight" for i in range(2)])
    assert respelled(tower, {}, names)[0] is tower
    text = Held([k.replace("vision_tower.encoder", "text_model") for k in tower.keys()])
    config = {"alpha_pattern": {"model.text_model.layers.1.mlp.down_proj": 3}}
    seen, changed = respelled(text, config, names)
    keys = [f"base_model.model.{n}.lora_A.weight" for n in names]
    assert seen.keys() == keys and seen.get_tensor(keys[1]) == text.keys()[1]
    assert changed["alpha_pattern"] == {names[1]: 3}


def test_stock_peft_loads_the_adapter_into_the_wrapper(tmp_path):
    _, tuned = trained(tmp_path, "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    towers = [n for n, _ in tuned.base_model.model.named_modules() if "visual" in n]
    assert any(n.endswith("down_proj") for n in towers)  # which its adapter must not reach
    reached = settings["target_modules"]
    assert not any(n.endswith(f".{t}") or n == t for n in towers for t in reached)
    model = load(str(tmp_path / "base"), dtype=torch.float32).eval()
    stock = PeftModel.from_pretrained(model, tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits)


def test_the_text_model_alone_is_what_auto_model_for_causal_lm_gives():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small("llama4"))
    assert find_anatomy(model).names[0] == "model.layers.0.feed_forward.shared_expert.down_proj"
