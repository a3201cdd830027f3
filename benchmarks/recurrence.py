"""Seconds per prompt of the fast analysis and of the plain loop, on layers that are recurrences.

    python -m benchmarks.recurrence                    # all shapes below
    python -m benchmarks.recurrence qwen3_5 --length 128

The plain loop is `attribution.plain`, what an unknown mixer gets, on two layers, a quarter and
three quarters up, times half the number of layers: what a layer costs falls evenly from the lowest
to the highest. Processor time on a CPU, random weights, PyTorch's own code in place of a GPU's
kernels.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.writer import command, write
from loki_plugin.analysing.attribution.engine import attribute_batch
from loki_plugin.analysing.attribution.plain import integrate_plainly
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.attribution.quiet import quiet
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.model.anatomy import find_anatomy

LAYERS, EVERY = 24, 12
COMMON = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": LAYERS, "vocab_size": 4096,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
DELTA = {
    "head_dim": 64, "linear_num_value_heads": 4, "linear_num_key_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
SHAPES = {
    # Three layers in four are linear attention, as published.
    "qwen3_5": ("qwen3_5_text", COMMON | DELTA),
    "granitemoehybrid": (
        "granitemoehybrid",
        COMMON | MAMBA | {"shared_intermediate_size": 768, "num_local_experts": 0}
        | {"layer_types": [*["mamba"] * 5, "attention"] * 4, "mamba_chunk_size": 64},
    ),
    "falcon_h1": (
        "falcon_h1", COMMON | MAMBA | {"mamba_d_ssm": 512, "mamba_chunk_size": 64}
    ),
    "lfm2": (
        "lfm2",
        COMMON | {"layer_types": ["conv", "conv", "full_attention"] * 8}
        | {"block_auto_adjust_ff_dim": False},
    ),
}  # fmt: skip


def seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(family: str, length: int, prompts: int) -> dict[str, str]:
    model_type, settings = SHAPES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    anatomy, rule = find_anatomy(model), quadrature("left", 7)
    some = [Prompt(tuple(torch.randint(1, 4096, (length,)).tolist())) for _ in range(prompts)]
    some_layers = slice(EVERY // 2, None, EVERY)
    few = replace(anatomy, down=anatomy.down[some_layers], names=anatomy.names[some_layers])
    with quiet(model) as own_attention:
        attribute_batch(model, anatomy, some[:1], rule)
        fast = min(seconds(lambda: attribute_batch(model, anatomy, some, rule)) for _ in range(3))
        with own_attention():
            plain = EVERY * seconds(lambda: integrate_plainly(model, few, some[:1], rule, "token"))
    return {
        "family": family,
        "T": str(length),
        "fast, s per prompt": f"{fast / prompts:.2f}",
        "plain, s per prompt": f"{plain:.1f}",
        "times": f"{plain * prompts / fast:.0f}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", default=list(SHAPES), metavar="FAMILY")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=4)
    options = parser.parse_args()
    rows = []
    for family in options.families:
        rows.append(measured(family, options.length, options.prompts))
        print(rows[-1], flush=True)
    about = (
        f"L = {LAYERS}, H = {COMMON['hidden_size']}, I = {COMMON['intermediate_size']}, S = 7,"
        f" float32, {options.prompts} prompts in a batch of the fast analysis."
    )
    write("recurrence", about, command("recurrence"), rows)


if __name__ == "__main__":
    main()
