"""Bases that could be trained on but not merged into are refused before training."""

from __future__ import annotations

import pytest
import torch
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


def test_a_wrapper_of_vision_and_language_is_refused(tmp_path):
    with pytest.raises(ValueError, match="could not be merged into it afterwards: ") as error:
        check_stored(stored("qwen2.5-vl", tmp_path))
    assert len(str(error.value)) < 600


def test_one_whose_text_model_loads_alone_is_accepted(tmp_path):
    check_stored(stored("gemma3", tmp_path))


def test_a_text_model_is_accepted(base):
    from axolotl.utils.dict import DictDefault

    check_stored(DictDefault({"base_model": str(base)}))
    check_stored(DictDefault({"base_model": "nobody/not-downloaded"}))
