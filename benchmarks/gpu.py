"""Everything that is to be measured on a GPU, in one run of at most eight minutes.

    python -m benchmarks.gpu                           # 8B and 0.5B shapes
    python -m benchmarks.gpu --wheel bitsandbytes.whl  # NF4 where bitsandbytes is not installed
    python -m benchmarks.gpu --device cpu --size tiny  # does this file run? (seconds)

Random weights, nothing is downloaded, Axolotl is not needed. What does not run (no package, no
memory, no time) is a row that says so. The most wanted figures come first.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from benchmarks import writer
from benchmarks.attribution import build, obvious
from benchmarks.floor import flops
from benchmarks.gpu_bench import (
    ATTENTIONS,
    FULL,
    SHAPES,
    STEPS,
    TINY,
    Bench,
    attend,
    need_bitsandbytes,
    options_of,
    remember_peak,
    seconds_of,
    some_prompts,
)
from benchmarks.gpu_training import compiling, protecting, training
from benchmarks.machine import PeakMemory, describe, matmul_rate, synchronize
from loki_plugin.analysing.analysis import analyse
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.model.anatomy import find_anatomy


def rate(bench: Bench) -> None:
    """What the device sustains; everything else is held against it."""
    name = bench.size.models[0]
    with bench.part("products [2048, H] x [H, I]", name, "bf16") as row:
        bench.need(2)
        _, hidden, intermediate, *_ = SHAPES[name]
        bench.rate = matmul_rate(2048, hidden, intermediate, torch.bfloat16, bench.device)
        row["note"] = f"{bench.rate / 1e12:.3g} TFLOP/s, sustained"


def parity(bench: Bench) -> None:
    """Scores against the obvious loop in float32, ours and the loop's own at each dtype."""
    name = "small" if bench.device.type == "cuda" else bench.size.models[0]
    ids = torch.tensor(some_prompts(name, bench)[0].ids, device=bench.device)
    nodes, weights = quadrature("left", STEPS)
    truth = None
    for dtype, four_bit in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        shown = "NF4" if four_bit else dtype
        with bench.part("scores against the obvious loop", name, shown) as row:
            need_bitsandbytes(four_bit)
            bench.need(1)
            options = options_of(name, bench, four_bit, dtype=dtype)
            model = build(options.layers, options)
            loop = obvious(model, find_anatomy(model).down, ids, nodes, weights).float()
            found = _analysed(model, [Prompt(tuple(ids.tolist()))], 1)[0].to(loop)
            if truth is None or four_bit:  # quantised weights are another model
                truth = loop
            ours, plain = (
                float((x - truth).abs().max() / truth.abs().max()) for x in (found, loop)
            )
            row["note"] = f"differs by {ours:.1e} of the largest, the loop itself by {plain:.1e}"


def analysis(bench: Bench, model: nn.Module, name: str, weights: str) -> None:
    """Milliseconds per prompt: batches of all sizes, ragged prompts, each attention."""
    uniform, ragged = some_prompts(name, bench), some_prompts(name, bench, ragged=True)
    cases: list[tuple[str, list[Prompt], str, str | int]] = [
        ("analysis, B auto", uniform, "sdpa", "auto"),
        ("analysis, B = 8", uniform, "sdpa", 8),
        ("analysis, B = 1", uniform[: len(uniform) // 4], "sdpa", 1),
        ("analysis, ragged, a fifth shared, B = 8", ragged, "sdpa", 8),
        # Is it the new shapes that cost?
        ("analysis, ragged, a fifth shared, B = 8, again", ragged, "sdpa", 8),
        ("analysis, ragged, a fifth shared, B auto", ragged, "sdpa", "auto"),
        *[("analysis, B auto", uniform, other, "auto") for other in ATTENTIONS[1:]],
    ]
    for what, prompts, attention, batch in cases:
        with bench.part(what, name, weights, attention) as row:
            attend(bench, model, attention)
            before = model.config._attn_implementation
            _time_analysis(bench, model, name, prompts, batch, row)
            if model.config._attn_implementation != before:
                raise RuntimeError(f"the model is left with {model.config._attn_implementation}")
    model.set_attn_implementation("sdpa")


def _time_analysis(
    bench: Bench, model: nn.Module, name: str, prompts: list[Prompt], batch: str | int, row: dict
) -> None:
    few = prompts[: min(len(prompts), 16 if batch == "auto" else 2 * int(batch))]
    bench.need(1)
    _analysed(model, few, batch)  # warms up, and checks the model once
    per_prompt = seconds_of(bench, lambda: _analysed(model, few, batch)) / len(few)
    bench.need(per_prompt * len(prompts))
    with PeakMemory(bench.device) as memory:
        seconds = seconds_of(bench, lambda: _analysed(model, prompts, batch)) / len(prompts)
    lengths = [len(p.ids) for p in prompts]
    floor = sum(flops(*SHAPES[name], length=n, steps=STEPS) for n in lengths) / len(prompts)
    row["ms"] = round(1000 * seconds, 2)
    if bench.rate:
        row["of the matmul rate (%)"] = round(100 * floor / seconds / bench.rate, 1)
    remember_peak(row, model, memory.peak)
    row["note"] = f"prompts: {len(prompts)}, of {min(lengths)} to {max(lengths)} tokens"


def _analysed(model: nn.Module, prompts: list[Prompt], batch: str | int) -> torch.Tensor:
    rule = quadrature("left", STEPS)
    return analyse(model, find_anatomy(model), prompts, rule, batch_size=batch)


def measure(bench: Bench) -> None:
    """All parts, the most wanted first."""
    rate(bench)
    parity(bench)
    for name in bench.size.models:
        for four_bit in (False, True):
            weights = "NF4" if four_bit else "bf16"
            model: Any = None
            with bench.part("model built", name, weights) as row:
                need_bitsandbytes(four_bit)
                bench.need(10 if bench.device.type == "cuda" else 1)
                options = options_of(name, bench, four_bit)
                start = time.perf_counter()
                model = build(options.layers, options)
                synchronize(bench.device)
                row["ms"] = round(1000 * (time.perf_counter() - start))
            if model is None:
                continue
            protecting(bench, model, options, name, weights)
            analysis(bench, model, name, weights)
            training(bench, model, options, name, weights)
            if not four_bit and name == bench.size.models[-1]:
                compiling(bench, model, options, name)
            del model
            gc.collect()


def carry(wheel: str | None) -> None:
    """Make the packages of a wheel importable, for as long as this process lives."""
    if wheel:
        folder = tempfile.mkdtemp()
        zipfile.ZipFile(wheel).extractall(folder)
        sys.path.append(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part begins that ends later")
    parser.add_argument("--wheel", help="of bitsandbytes, to be used without an installation")
    options = parser.parse_args()
    if options.device == "cpu" and options.size == "full":
        parser.error("there is no GPU; `--device cpu --size tiny` tries this file out")
    carry(options.wheel)
    torch.manual_seed(0)
    size = TINY if options.size == "tiny" else FULL
    bench = Bench(torch.device(options.device), size, 60 * options.minutes)
    measure(bench)
    ran = writer.command("gpu", WHEEL=options.wheel)
    about = (
        f"loki_plugin {version('loki_plugin')}. Random weights, S = {STEPS}, rule left."
        " Milliseconds are those of one prompt, or of one"
        " training step; the share of the matmul rate counts the floor's FLOPs."
    )
    path = writer.write("gpu", about, ran, bench.rows, device=bench.device)
    facts = {"machine": describe(bench.device), "command": ran, "rows": bench.rows}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
