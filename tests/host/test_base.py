"""Bases that could be trained on but not merged into are refused before training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from loki_plugin.host.base import check_stored

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


def test_a_text_model_is_accepted(base):
    from axolotl.utils.dict import DictDefault

    check_stored(DictDefault({"base_model": str(base)}))
    check_stored(DictDefault({"base_model": "nobody/not-downloaded"}))
