"""What the fast analysis and the plain loop take on layers that are recurrences.

    python -m benchmarks.recurrence                    # all shapes below
    python -m benchmarks.recurrence qwen3_5 --length 128

The plain loop is `attribution.plain`, what an unknown mixer gets, on two layers, a quarter and
three quarters up, times half the number of layers: what a layer costs falls evenly from the lowest
to the highest. Processor time on a CPU, random weights, PyTorch's own code in place of a GPU's
kernels. FLOPs are those of products, convolutions and attention. Memory is what the process needs
at its highest above what it needed with the model loaded, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
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


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


def extra(run: Callable[[], object]) -> float:
    """Bytes that the process needs at its highest, above what it needs now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew
    before = _highest()
    run()
    return _highest() - before


def _highest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def ways(family: str, length: int, prompts: int) -> dict[str, Callable[[], object]]:
    """The fast analysis of all prompts, and the plain loop of one on two layers."""
    model_type, settings = SHAPES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    anatomy, rule = find_anatomy(model), quadrature("left", 7)
    some = [Prompt(tuple(torch.randint(1, 4096, (length,)).tolist())) for _ in range(prompts)]
    some_layers = slice(EVERY // 2, None, EVERY)
    few = replace(anatomy, down=anatomy.down[some_layers], names=anatomy.names[some_layers])

    def fast():
        with quiet(model):
            attribute_batch(model, anatomy, some, rule)

    def plain():
        with quiet(model) as own_attention, own_attention():
            integrate_plainly(model, few, some[:1], rule, "token")

    with torch.no_grad():  # whatever is made on first use
        model(torch.ones(1, 2, dtype=torch.long))
    return {"fast": fast, "plain": plain}


def needed(family: str, length: int, prompts: int, way: str, threads: int) -> float:
    """`extra` of one way, in a process of its own."""
    torch.set_num_threads(threads)
    return extra(ways(family, length, prompts)[way])


def measured(family: str, length: int, prompts: int) -> dict[str, str]:
    both = ways(family, length, prompts)
    both["fast"]()
    fast = min(seconds(both["fast"]) for _ in range(3)) / prompts
    plain = EVERY * seconds(both["plain"])
    work = flops(both["fast"]) / prompts, EVERY * flops(both["plain"])
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        calls = [(family, length, prompts, way, torch.get_num_threads()) for way in both]
        memory = pool.starmap(needed, calls, chunksize=1)
    return {
        "family": family,
        "T": str(length),
        "fast, s per prompt": f"{fast:.2f}",
        "plain, s per prompt": f"{plain:.1f}",
        "times": f"{plain / fast:.0f}",
        "fast, GFLOP": f"{work[0] / 1e9:.0f}",
        "plain, GFLOP": f"{work[1] / 1e9:.0f}",
        "times fewer": f"{work[1] / work[0]:.0f}",
        f"fast, MB for {prompts} prompts": f"{memory[0] / 1e6:.0f}",
        "plain, MB for one": f"{memory[1] / 1e6:.0f}",
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
