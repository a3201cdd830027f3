"""The shapes of the models that the example configurations name, as their makers publish them."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

QWEN_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
LLAMA_LIKE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
GEMMA = {
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    },
}
PHI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200064,
    "partial_rotary_factor": 0.75,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "pad_token_id": 199999,
}
LFM2 = {
    "hidden_size": 2048,
    "intermediate_size": 12288,  # adjusted to 8,192
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 65536,
    "max_position_embeddings": 128000,
    "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
}
OLMOE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
}

# name on the hub -> (model_type, settings)
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", QWEN_05B),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", QWEN_7B),
    "Qwen/Qwen3-4B": (
        "qwen3",
        QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-8B": (
        "qwen3",
        QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        "llama",
        LLAMA_LIKE | {"vocab_size": 128256, "max_position_embeddings": 131072},
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        "mistral",
        LLAMA_LIKE
        | {"vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None},
    ),
    "google/gemma-3-4b-it": ("gemma3", GEMMA),
    "microsoft/Phi-4-mini-instruct": ("phi3", PHI),
    "LiquidAI/LFM2-1.2B": ("lfm2", LFM2),
    "allenai/OLMoE-1B-7B-0924-Instruct": ("olmoe", OLMOE),
}


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a model on the hub, made here."""
    model_type, settings = PUBLISHED[name]
    return AutoConfig.for_model(model_type, **settings)


def save(name: str, folder: Path) -> Path:
    """A folder with nothing but that configuration."""
    config_of(name).save_pretrained(folder)
    return folder
