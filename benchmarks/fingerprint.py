"""Seconds to tell an 8B model from its fine-tunes: the checksum over all of its weights.

python -m benchmarks.fingerprint      # needs 16 GB of free memory
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import best_seconds
from benchmarks.writer import command, write
from loki_plugin.model.fingerprint import fingerprint


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=options.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    device = torch.device(options.device)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(0.01 * (i % 7))  # written, so that the memory is really there
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    before = fingerprint(model)
    seconds = best_seconds(lambda: fingerprint(model), device, 3)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[7, 9] += 2.0**-10
    told = fingerprint(model)["weights"] != before["weights"]
    told_apart = "yes" if told else "NO"
    path = write(
        "fingerprint",
        f"Llama-3.1-8B shapes, {options.layers} layers, bf16, {size:.1f} GB in memory.",
        command("fingerprint"),
        more=f"{seconds:.2f} s ({size / seconds:.1f} GB/s). One changed weight in"
        f" {size / 2:.0f} billion is told apart: {told_apart}.",
        device=device,
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
