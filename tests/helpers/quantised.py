"""Tiny models loaded in 4 bits, as a run with `load_in_4bit` loads them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.standins import INNER
from helpers.families import tiny

# NF4 on a CPU needs widths that its block of 64 divides.
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "mamba_d_head": 32, "mamba_d_ssm": 128}


def in_4_bit(family: str, folder: Path, dtype=torch.bfloat16):
    """A model of a family with NF4 weights that compute in `dtype`."""
    model = tiny(family, dtype=dtype, **WIDTHS)
    model.save_pretrained(folder)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=settings,
        attn_implementation=model.config._attn_implementation,
        experts_implementation="eager",
    ).eval()


def widened(config):
    """A small configuration whose inner widths NF4's blocks divide too."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            widened(value)
        elif value == INNER:
            setattr(config, key, WIDTHS["intermediate_size"])
    return config
