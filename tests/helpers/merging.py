"""A base, an adapter on it whose values are not trivial, and their merge."""

from __future__ import annotations

import torch

from helpers.families import tiny
from loki_plugin import RowSelection, implant
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.model.fingerprint import fingerprint

POSITIONS = [[3, 1, 40], [0, 47, 5], [7, 8, 9]]


def shaken(model, by, seed=1):
    """The model with random values of that size in all that trains, as if it had been trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, by)
    return model


def make(tmp_path, family="llama", dtype=torch.float32, loaded=None, scale=1.0, **saving):
    """A base, an adapter with non-trivial values, and the rows file made on the loaded base."""
    from transformers import AutoModelForCausalLM

    tiny(family, dtype=dtype).save_pretrained(tmp_path / "base", **saving)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=loaded or dtype)
    made = {"quota": 10, "strategy": "layer_balanced"}
    rows = RowSelection(POSITIONS, 48, fingerprint(model), made)
    model = implant(model, rows, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0, scale)
    model.save_pretrained(tmp_path / "adapter")
    rows.save(tmp_path / "adapter" / "loki_rows.json")
    return rows


def merged(tmp_path, rows):
    return merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rows, False)
