"""A run to estimate."""

from __future__ import annotations

import pytest


@pytest.fixture
def big(tmp_path):
    """The configuration of Llama-3.1-8B, without weights or tokenizer."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    ).save_pretrained(tmp_path / "8b")  # fmt: skip
    return {
        "base_model": str(tmp_path / "8b"),
        "plugins": ["loki"],
        "adapter": "loki",
        "loki": {"quota": 10, "protect": "off"},
        "sequence_len": 2048,
        "micro_batch_size": 1,
        "bf16": True,
        "optimizer": "adamw_bnb_8bit",
        "gradient_checkpointing": True,
    }
