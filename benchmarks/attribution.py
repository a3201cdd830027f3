"""Seconds per prompt of the attribution: ours, the obvious loop, and the authors' code.

    python -m benchmarks.attribution                      # ours against the obvious loop
    python -m benchmarks.attribution --reference CLONE    # and the authors' releases from a clone
    python -m benchmarks.attribution --growth             # cost by number of prompts and by T

On a GPU, the 8B and 0.5B shapes (add --four-bit for NF4):

    python -m benchmarks.attribution --dtype bfloat16 --hidden 4096 --intermediate 14336 \\
        --kv-heads 8 --head-size 128 --vocabulary 128256 --shapes 32,150 --prompts 200
    python -m benchmarks.attribution --dtype bfloat16 --hidden 896 --intermediate 4864 \\
        --kv-heads 2 --vocabulary 151936 --shapes 24,150 --prompts 200

The obvious loop (tests/helpers/reference.py) runs, per layer, S copies of the whole prompt in one
batch, with logits at the last token only. All in one process, on one model with random weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.floor import flops
from benchmarks.machine import (
    PeakMemory,
    authors,
    best_seconds,
    matmul_rate,
    synchronize,
)
from benchmarks.writer import RESULTS, command, write
from loki_plugin.analysing.analysis import analyse
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.model.anatomy import find_anatomy

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "tests"))
from helpers.reference import obvious  # noqa: E402

FIRST_RELEASE = "44f67d9:src/loki/kva/kva_llama.py"
CAPTUM_RELEASE = "a63aec3:src/loki/core/base_kva_model.py"
SHAPES = ((24, 128), (24, 256), (32, 512))


def build(layers: int, options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=options.hidden // options.head_size,
        num_key_value_heads=options.kv_heads or options.hidden // options.head_size,
        vocab_size=options.vocabulary,
        max_position_embeddings=8192,
    )
    with torch.device(options.device):
        model = LlamaForCausalLM._from_config(
            config, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        )
    model.eval()
    if options.four_bit:
        quantise(model, getattr(torch, options.dtype))
    return model.requires_grad_(False)


def quantise(model, dtype) -> None:
    """Every linear of the layers to NF4, as `load_in_4bit` does.

    They stay in training mode: in evaluation, some CPUs repack them and give no gradient.
    """
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if not isinstance(linear, torch.nn.Linear):
                continue
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, dtype, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
            layer.set_submodule(name, packed.to(linear.weight.device))


def ours(model, prompts, steps, batch_size):
    some = [Prompt(tuple(ids.tolist())) for ids in prompts]
    rule = quadrature("left", steps)
    return analyse(model, find_anatomy(model), some, rule, batch_size=batch_size)


def first_release(clone, model, ids, steps):
    theirs = authors(clone, FIRST_RELEASE, "first_release").KVALlamaForCausalLM(model.config)
    theirs.load_state_dict(model.state_dict())
    theirs = theirs.eval().to(model.device, model.dtype)
    mask = torch.ones_like(ids)[None]

    def run():
        with torch.enable_grad():
            logits = theirs(-1, input_ids=ids[None], attention_mask=mask)
            theirs.forward_with_partitioning(-1, steps, int(logits.argmax()))
        scores = torch.stack([g.float() for g in theirs.integrated_gradients])
        theirs.clean()
        return scores

    return run


def captum_release(clone, model, ids, steps):
    base = authors(clone, CAPTUM_RELEASE, "captum_release").BaseKVAModel

    class Theirs(base):
        def __init__(self):
            self.model, self.lm_head, self.config = model.model, model.lm_head, model.config
            self.integrated_gradients = [None] * model.config.num_hidden_layers
            for layer in model.model.layers:  # as their own constructor leaves the model
                layer.mlp.down_proj.weight.requires_grad_(True)

        def _get_down_proj_layer(self, layer_idx):
            return self.model.layers[layer_idx].mlp.down_proj

    theirs = Theirs()
    y = int(model(input_ids=ids[None]).logits[0, -1].argmax())

    def run():
        scores = theirs.compute_integrated_gradients(
            ids[None], torch.ones_like(ids)[None], -1, y, steps
        )
        return torch.stack([s.float() for s in scores])

    return run


def compare(layers, length, options):
    """Rows of the table for one shape."""
    device = torch.device(options.device)
    model = build(layers, options)
    down = find_anatomy(model).down
    prompts = list(torch.randint(0, options.vocabulary, (options.prompts, length), device=device))
    nodes, weights = quadrature("left", options.steps)
    shape = 1024, options.hidden, options.intermediate, getattr(torch, options.dtype), device
    rate = matmul_rate(*shape)
    with PeakMemory(device) as memory:
        scores = ours(model, prompts, options.steps, options.batch)[0].to(device)
    seconds = best_seconds(
        lambda: ours(model, prompts, options.steps, options.batch), device, options.repeat
    ) / len(prompts)
    rate = max(rate, matmul_rate(*shape))  # a shared machine is not always equally fast
    floor = (
        flops(
            layers,
            options.hidden,
            options.intermediate,
            options.kv_heads or options.hidden // options.head_size,
            options.head_size,
            options.vocabulary,
            length=length,
            steps=options.steps,
        )
        / rate
    )
    yield _row("ours", layers, length, options, seconds, seconds, memory.peak, 0.0, floor, rate)
    rivals = {}
    if not options.alone:
        rivals["obvious loop"] = lambda: obvious(model, down, prompts[0], nodes, weights)
    if options.reference:
        arguments = (options.reference, model, prompts[0], options.steps)
        rivals["authors' Captum release"] = captum_release(*arguments)
        rivals["authors' first release"] = first_release(*arguments)  # the hungriest comes last
    for name, run in rivals.items():
        # One timed run: it takes a minute, of which a warm-up would be a thousandth.
        with PeakMemory(device) as memory:
            synchronize(device)
            start = time.perf_counter()
            theirs = run()
            synchronize(device)
            best = time.perf_counter() - start
        difference = None
        if "Captum" not in name:  # which attributes along another path
            difference = float((theirs.to(device) - scores).abs().max() / scores.abs().max())
        yield _row(
            name, layers, length, options, best, seconds, memory.peak, difference, floor, rate
        )


def _row(name, layers, length, options, seconds, ours_seconds, peak, difference, floor, rate):
    return {
        "what": name,
        "L": layers,
        "T": length,
        "S": options.steps,
        "dtype": options.dtype + (" NF4" if options.four_bit else ""),
        "prompts": options.prompts if name == "ours" else 1,
        "seconds_per_prompt": round(seconds, 4),
        "minutes_for_2850": round(2850 * seconds / 60, 1),
        "times_slower_than_ours": round(seconds / ours_seconds, 1),
        "percent_of_floor": round(100 * floor / seconds, 1) if name == "ours" else "",
        "peak_MiB": round(peak / 2**20),
        "relative_difference": "" if difference is None else f"{difference:.1e}",
        "matmul_GFLOP_per_s": round(rate / 1e9),
    }


def growth(options):
    """Seconds by number of prompts (at T = 128) and by T (8 prompts), L = 24."""
    device = torch.device(options.device)
    model = build(24, options)
    rows = []
    for prompts, length in [(n, 128) for n in (4, 8, 16, 32)] + [
        (8, t) for t in (32, 64, 128, 256, 512)
    ]:
        ids = list(torch.randint(0, options.vocabulary, (prompts, length), device=device))
        seconds = best_seconds(
            lambda ids=ids: ours(model, ids, options.steps, options.batch), device, options.repeat
        )
        rows.append({"prompts": prompts, "T": length, "seconds": round(seconds, 3)})
        print(rows[-1], flush=True)
    return rows


def plot(rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, chosen, key, label in (
        (axes[0], rows[:4], "prompts", "prompts (T = 128)"),
        (axes[1], rows[4:], "T", "T, tokens per prompt (8 prompts)"),
    ):
        axis.plot([r[key] for r in chosen], [r["seconds"] for r in chosen], "o-")
        axis.set(xlabel=label, ylabel="seconds", xlim=(0, None), ylim=(0, None))
    figure.savefig(path, dpi=110)


def report(rows, name: str, options) -> None:
    shape = f"H = {options.hidden}, I = {options.intermediate}, V = {options.vocabulary}"
    ran = command("attribution", CLONE=options.reference)
    write(name, f"{shape}, random weights.", ran, rows, device=options.device, as_csv=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", help="a clone of the LoKI authors' repository")
    parser.add_argument("--growth", action="store_true", help="cost by prompts and by T instead")
    parser.add_argument("--shapes", default=";".join(f"{a},{b}" for a, b in SHAPES), help="L,T;...")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--batch", default="auto")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--four-bit", action="store_true", help="NF4 weights in the layers")
    parser.add_argument("--alone", action="store_true", help="without the obvious loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", default="attribution", help="name of the results file")
    options = parser.parse_args()
    if options.device == "cpu":
        print("no GPU is used; for one, see the commands at the top of this file", flush=True)
    options.batch = options.batch if options.batch == "auto" else int(options.batch)
    if options.growth:
        rows = growth(options)
        report(rows, "attribution_growth", options)
        plot(rows, RESULTS / "attribution_growth.png")
        return
    rows = []
    for shape in options.shapes.split(";"):
        for row in compare(*map(int, shape.split(",")), options):
            print(row, flush=True)
            rows.append(row)
            report(rows, options.output, options)


if __name__ == "__main__":
    main()
