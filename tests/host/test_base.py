"""Bases that could be trained on but not merged into are refused before training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from loki_plugin.host.base import check_base, check_stored

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIGLIP |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
WRAPPERS = {
    "gemma3": (
        Gemma3ForConditionalGeneration,
        Gemma3Config(
            text_config=TEXT | {"head_dim": 8}, vision_config=SIGLIP, mm_tokens_per_image=4
        ),
    ),
    "qwen2.5-vl": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(
            text_config=TEXT,
            vision_config={"hidden_size": 32, "depth": 1, "num_heads": 4, "out_hidden_size": 32},
        ),
    ),
}


def stored(name, folder):
    from axolotl.utils.dict import DictDefault

    kind, config = WRAPPERS[name]
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return DictDefault({"base_model": str(folder)})


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("trust", [None, True])
def test_a_wrapper_of_vision_and_language_is_accepted(tmp_path, name, trust):
    cfg = stored(name, tmp_path)
    cfg.trust_remote_code = trust
    check_stored(cfg)


@pytest.mark.parametrize("trust", [None, True])
def test_what_could_not_be_merged_is_refused_with_trusted_code_too(tmp_path, trust):
    cfg = stored("qwen2.5-vl", tmp_path)
    cfg.trust_remote_code = trust
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    lost = next(k for k in held if k.endswith("layers.1.mlp.down_proj.weight"))
    save_file({k: v for k, v in held.items() if k != lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="could not be merged into it afterwards: ") as error:
        check_stored(cfg)
    assert "layers.1.mlp.down_proj.weight matches 0 tensors" in str(error.value)


def test_so_is_a_further_linear_that_is_stored_in_another_form(tmp_path):
    cfg = stored("qwen2.5-vl", tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    lost = next(k for k in held if k.endswith("layers.1.mlp.up_proj.weight"))
    save_file({k: v for k, v in held.items() if k != lost}, file, {"format": "pt"})
    check_stored(cfg)  # rows of the down-projections alone are not concerned
    cfg.loki = {"targets": "all"}
    with pytest.raises(ValueError, match=r"afterwards: .*layers.1.mlp.up_proj.weight matches 0"):
        check_stored(cfg)


def test_a_text_model_is_accepted(base):
    from axolotl.utils.dict import DictDefault

    check_stored(DictDefault({"base_model": str(base)}))
    check_stored(DictDefault({"base_model": "nobody/not-downloaded"}))


REFUSED = {
    "mixtral": ({"num_local_experts": 2}, "routed experts only"),
    "mamba": ({}, "no down-projection"),
    "clip": ({}, "is of no class of transformers that writes text"),
}


def configuration(folder, family, **more):
    from transformers import AutoConfig

    sizes = TEXT if family != "clip" else {}
    AutoConfig.for_model(family, **sizes | REFUSED.get(family, ({},))[0] | more).save_pretrained(
        folder
    )


@pytest.fixture
def on_the_hub(monkeypatch, tmp_path):
    """`some/FAMILY`, whose config.json alone can be read."""
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained

    def from_pretrained(name, **kwargs):
        return read(tmp_path / name if str(name).startswith("some/") else name, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    for family in (*REFUSED, "llama"):
        configuration(tmp_path / "some" / family, family)
    return "some"


def run_on(base, **block):
    return {"base_model": base, "plugins": ["loki"], "adapter": "loki", "loki": block}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_train_is_refused_when_the_configuration_is_registered(on_the_hub, family):
    """Of a hub id only config.json is read: nothing of the weights, here or anywhere."""
    from axolotl.utils.dict import DictDefault

    from loki_plugin.plugin import LokiPlugin

    cfg = DictDefault(run_on(f"{on_the_hub}/{family}"))
    before = dict(cfg)
    plugin = LokiPlugin()
    plugin._acts_on = lambda cfg: True
    with pytest.raises(ValueError, match=REFUSED[family][1]):
        plugin.register(cfg)
    assert dict(cfg) == before
    cfg.inference = True  # an adapter that is only read was trained somewhere
    plugin.register(cfg)
    LokiPlugin.register(plugin, DictDefault(run_on(f"{on_the_hub}/llama")))
    plugin.register(DictDefault(run_on("nobody/not-downloaded")))  # Axolotl's to say


@pytest.mark.parametrize("command", ["estimate", "doctor"])
def test_the_commands_say_the_same(on_the_hub, tmp_path, command):
    import yaml
    from click.testing import CliRunner

    from loki_plugin.cli import loki

    file = tmp_path / "run.yaml"
    for base in (f"{on_the_hub}/mixtral", str(tmp_path / "awq")):
        configuration(tmp_path / "awq", "llama", quantization_config={"quant_method": "awq"})
        file.write_text(yaml.safe_dump(run_on(base)))
        result = CliRunner().invoke(loki, [command, str(file)])
        assert result.exit_code == 1, result.output
        assert "routed experts only" in result.output or "quantised with 'awq'" in result.output
    file.write_text(yaml.safe_dump(run_on(f"{on_the_hub}/llama")))
    result = CliRunner().invoke(loki, [command, str(file)])
    assert result.exit_code == 0, result.output


def test_a_quantised_base_that_could_not_be_trained_anyway_says_both(tmp_path):
    """gpt-oss: its whole weights would be refused for their routed experts."""
    from axolotl.utils.dict import DictDefault
    from transformers import GptOssConfig

    sizes = TEXT | {"head_dim": 8, "num_local_experts": 4}
    config = GptOssConfig(**sizes, quantization_config={"quant_method": "mxfp4"})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'mxfp4', stored as 16 bits neither: .*routed experts"):
        check_base(DictDefault({"base_model": str(tmp_path)}))
    llama = LlamaConfig(**TEXT, quantization_config={"quant_method": "gptq", "bits": 4})
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="'gptq': rows cannot be merged into it. Train on the 16"):
        check_base(DictDefault({"base_model": str(tmp_path / "llama")}))


def test_an_override_that_is_no_setting_of_the_base_is_told(tmp_path, our_log):
    """It is set after the reading, and `rope_theta` is looked at in reading alone."""
    from axolotl.utils.dict import DictDefault

    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    overrides = {"rope_theta": 1e6, "max_position_embeddings": 64}
    cfg = DictDefault({"base_model": str(tmp_path), "overrides_of_model_config": overrides})
    check_base(cfg)
    assert "overrides_of_model_config: rope_theta is no setting of base_model" in our_log.text
    our_log.clear()
    del cfg["overrides_of_model_config"]["rope_theta"]
    check_base(cfg)
    assert "overrides" not in our_log.text
