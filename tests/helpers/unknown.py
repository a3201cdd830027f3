"""Tiny models of families that the growing stack does not know."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.families import COMMON, GQA

UNKNOWN = {
    # Attends twice in a layer.
    "diffllama": GQA,
    # Hands on hidden states of four dimensions.
    "gemma3n_text": GQA
    | {"head_dim": 12, "num_kv_shared_layers": 1, "activation_sparsity_pattern": None}
    | {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
    # Attends by code of its own.
    "mpt": {"d_model": 48, "n_heads": 4, "n_layers": 3, "vocab_size": 97},
    "gpt_neo": {"hidden_size": 48, "num_heads": 4, "num_layers": 3, "vocab_size": 97}
    | {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
    # A gated linear recurrence with a convolution.
    "recurrent_gemma": COMMON
    | {"num_key_value_heads": 1, "lru_width": 48, "attention_window_size": 8, "pad_token_id": 0},
}


def unknown(model_type: str, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **UNKNOWN[model_type])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.15)
    return model.to(dtype).eval()
