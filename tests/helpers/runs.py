"""A model and a `loki:` block for runs of the pipeline."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.families import FAMILIES
from loki_plugin.args import LokiConfig


def model(seed=0):
    """A Llama that knows the tokenizer's ids."""
    torch.manual_seed(seed)
    settings = FAMILIES["llama"][1] | {"vocab_size": 320, "max_position_embeddings": 256}
    llama = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return llama


def configure(source, cache, **more):
    more = {"quota": 20, "cache_dir": str(cache)} | more
    return LokiConfig(calibration={"source": source}, **more)
