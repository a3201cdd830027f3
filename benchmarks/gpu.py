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
import importlib.util
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import gpu_protecting, writer
from benchmarks.attribution import build, obvious
from benchmarks.floor import flops
from benchmarks.machine import PeakMemory, describe, matmul_rate, synchronize
from benchmarks.training import ALL, DENSE, LOW_RANK, Training, methods
from loki_plugin.analysing.analysis import analyse
from loki_plugin.analysing.attribution.devices import out_of_memory
from loki_plugin.analysing.attribution.engine import attribute_batch
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.attribution.quiet import quiet
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.model.anatomy import find_anatomy

# layers, hidden, intermediate, key heads, head size, vocabulary
SHAPES = {
    "8B": (32, 4096, 14336, 8, 128, 128256),
    "0.5B": (24, 896, 4864, 2, 64, 151936),
    "small": (4, 512, 1408, 4, 64, 8192),
    "tiny": (2, 256, 384, 2, 64, 512),
}
# What one run measures: prompts, their tokens T, tokens of a training step, steps of each method.
# Directions are found of so many layers, from so many texts.
FULL = SimpleNamespace(
    models=("8B", "0.5B"), prompts=208, length=150, tokens=2048, steps=5, found=2, texts=440
)
TINY = SimpleNamespace(models=("tiny",), prompts=4, length=10, tokens=8, steps=1, found=1, texts=16)
STEPS = 7  # S
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
GIB = 2**30


class NotRun(Exception):
    """Why a part was left out."""


class Bench:
    """The rows that were measured so far, and the time that is left."""

    def __init__(self, device: torch.device, size: SimpleNamespace, seconds: float):
        self.device, self.size = device, size
        self.end = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.rate = 0.0  # FLOP/s of products in bfloat16

    def need(self, seconds: float) -> None:
        """Raises NotRun where a part that takes so long would end too late."""
        left = self.end - time.monotonic()
        if seconds > left:
            raise NotRun(f"needs about {seconds:.0f} s, {max(left, 0):.0f} s are left")

    def need_gpu(self) -> None:
        if self.device.type != "cuda":
            raise NotRun("needs a GPU")

    @contextmanager
    def part(self, what: str, model: str, weights: str = "", attention: str = "") -> Iterator[dict]:
        """A row to be filled; what keeps it from being measured becomes its note."""
        row = {
            "what": what,
            "model": model,
            "weights": weights,
            "attention": attention,
            "ms": "",
            "of the matmul rate (%)": "",
            "above the weights (GiB)": "",
            "peak (GiB)": "",
            "note": "",
        }
        try:
            yield row
        except (NotRun, ImportError) as error:
            row["note"] = f"not run: {error}"
        except (RuntimeError, ValueError) as error:
            full = out_of_memory(error)
            row["note"] = "not run: out of memory" if full else f"FAILED: {error}".split("\n")[0]
        row["note"] = row["note"].replace("|", "/")
        self.rows.append(row)
        print({k: v for k, v in row.items() if v != ""}, flush=True)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def options_of(name: str, bench: Bench, four_bit: bool = False, **more: Any) -> SimpleNamespace:
    """What `benchmarks.attribution.build` and `benchmarks.training` are told."""
    names = ("layers", "hidden", "intermediate", "kv_heads", "head_size", "vocabulary")
    told = dict(zip(names, SHAPES[name], strict=True))
    told |= {"device": str(bench.device), "dtype": "bfloat16", "four_bit": four_bit}
    told |= {"quota": 10, "reference": None, "checkpointing": True}
    return SimpleNamespace(**told | more)


def some_prompts(name: str, bench: Bench, ragged: bool = False) -> list[Prompt]:
    """Random ids; ragged ones lack up to 39 tokens and begin with the same fifth of them."""
    draw = torch.Generator().manual_seed(0)
    vocabulary, length = SHAPES[name][-1], bench.size.length
    ids = torch.randint(vocabulary, (bench.size.prompts, length), generator=draw)
    if not ragged:
        return [Prompt(tuple(line)) for line in ids.tolist()]
    ids[:, : length // 5] = ids[0, : length // 5]
    cut = [3 * i % min(40, length // 2) for i in range(len(ids))]
    some = [Prompt(tuple(line[: length - n])) for line, n in zip(ids.tolist(), cut, strict=True)]
    return sorted(some, key=lambda p: len(p.ids))


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
            _need_bitsandbytes(four_bit)
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
        *[("analysis, B auto", uniform, other, "auto") for other in ATTENTIONS[1:]],
    ]
    for what, prompts, attention, batch in cases:
        with bench.part(what, name, weights, attention) as row:
            _attend(bench, model, attention)
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
    per_prompt = _seconds(bench, lambda: _analysed(model, few, batch)) / len(few)
    bench.need(per_prompt * len(prompts))
    with PeakMemory(bench.device) as memory:
        seconds = _seconds(bench, lambda: _analysed(model, prompts, batch)) / len(prompts)
    lengths = [len(p.ids) for p in prompts]
    floor = sum(flops(*SHAPES[name], length=n, steps=STEPS) for n in lengths) / len(prompts)
    row["ms"] = round(1000 * seconds, 2)
    if bench.rate:
        row["of the matmul rate (%)"] = round(100 * floor / seconds / bench.rate, 1)
    _remember_peak(row, model, memory.peak)
    row["note"] = f"prompts: {len(prompts)}, of {min(lengths)} to {max(lengths)} tokens"


def training(bench: Bench, model: nn.Module, options: SimpleNamespace, name: str, weights: str):
    """Milliseconds of a step, LoKI against LoRA on all linears, with each attention."""
    wrappers = {k: w for k, w in methods(options).items() if k in (DENSE, LOW_RANK, ALL)}
    batch = torch.randint(options.vocabulary, (1, bench.size.tokens)).to(bench.device)
    for attention in ATTENTIONS:
        seconds: dict[str, float] = {}
        for method in (ALL, DENSE, LOW_RANK):
            if attention != "sdpa" and method == LOW_RANK:
                continue
            with bench.part(f"training step, {method}", name, weights, attention) as row:
                _attend(bench, model, attention)
                seconds[method] = _time_step(bench, model, wrappers[method], batch, options, row)
                if ALL in seconds and method != ALL:
                    row["note"] += f", {seconds[method] / seconds[ALL]:.2f} x LoRA's"
    model.set_attn_implementation("sdpa")


def protecting(
    bench: Bench, model: nn.Module, options: SimpleNamespace, name: str, weights: str
) -> None:
    """What `protect: auto` costs: to find directions, and in a step against LoRA without it."""
    batch = torch.randint(options.vocabulary, (1, bench.size.tokens)).to(bench.device)
    plain = methods(options)[ALL]
    with bench.part(f"training step, {ALL}, again", name, weights, "sdpa") as row:
        lora = _time_step(bench, model, plain, batch, options, row)
    for method, wrap in gpu_protecting.wrappers(options).items():
        with bench.part(f"training step, {method}", name, weights, "sdpa") as row:
            extra = gpu_protecting.anchored(options)
            seconds = _time_step(bench, model, wrap, batch, options, row, extra=extra)
            row["note"] += f", {seconds / lora:.2f} x LoRA's"
    with bench.part("finding the directions of all linears", name, weights, "sdpa") as row:
        bench.need(30 if bench.device.type == "cuda" else 1)
        gpu_protecting.finding(options, bench.size.found, bench.size.texts, row)


def _time_step(
    bench, model, wrap, batch, options, row, compiled: bool = False, extra=None
) -> float:
    bench.need(60 if compiled else 2)
    with PeakMemory(bench.device) as memory:
        trained = Training(model, wrap, options)
        trained.extra = extra
        if compiled:
            for layer in find_anatomy(trained.model).layers:
                layer.compile()
        trained.step(batch)
        first = trained.step(batch)
    bench.need(first * bench.size.steps)
    seconds = min(trained.step(batch) for _ in range(bench.size.steps))
    row["ms"] = round(1000 * seconds, 1)
    _remember_peak(row, model, memory.peak)
    row["note"] = f"1 x {batch.shape[1]} tokens, checkpointing, AdamW"
    return seconds


def compiling(bench: Bench, model: nn.Module, options: SimpleNamespace, name: str) -> None:
    """Is `torch.compile` of the layers, or a CUDA graph of the analysis, worth anything?"""
    wrappers = methods(options)
    batch = torch.randint(options.vocabulary, (1, bench.size.tokens)).to(bench.device)
    for method in (ALL, DENSE):
        with bench.part(f"training step, {method}, layers compiled", name, "bf16", "sdpa") as row:
            bench.need_gpu()
            _time_step(bench, model, wrappers[method], batch, options, row, compiled=True)
    some = some_prompts(name, bench)[:8]
    anatomy, rule = find_anatomy(model), quadrature("left", STEPS)
    for captured in (False, True):  # the last part of a model: a failed capture breaks the context
        what = "one batch, B = 8, CUDA graph " + ("on" if captured else "off")
        with bench.part(what, name, "bf16", "sdpa") as row, quiet(model):
            bench.need_gpu()
            bench.need(5)
            run: Callable[[], Any] = lambda: attribute_batch(model, anatomy, some, rule)  # noqa: E731
            run()
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
                run = graph.replay
            seconds = min(_seconds(bench, run) for _ in range(5)) / len(some)
            row["ms"] = round(1000 * seconds, 2)


def _analysed(model: nn.Module, prompts: list[Prompt], batch: str | int) -> torch.Tensor:
    rule = quadrature("left", STEPS)
    return analyse(model, find_anatomy(model), prompts, rule, batch_size=batch)


def _seconds(bench: Bench, run: Callable[[], Any]) -> float:
    synchronize(bench.device)
    start = time.perf_counter()
    run()
    synchronize(bench.device)
    return time.perf_counter() - start


def _remember_peak(row: dict[str, Any], model: nn.Module, above: int) -> None:
    kept = [*model.parameters(), *model.buffers()]
    weights = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in kept}.values())
    row["above the weights (GiB)"] = round(above / GIB, 2)
    row["peak (GiB)"] = round((weights + above) / GIB, 2)


def _attend(bench: Bench, model: nn.Module, attention: str) -> None:
    """Let the model attend so; transformers would look for a kernel on the hub."""
    if attention == "flash_attention_2":
        bench.need_gpu()
        if importlib.util.find_spec("flash_attn") is None:
            raise NotRun("flash_attn is not installed")
    model.set_attn_implementation(attention)


def _need_bitsandbytes(four_bit: bool) -> None:
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed; give its wheel with --wheel")


def measure(bench: Bench) -> None:
    """All parts, the most wanted first."""
    rate(bench)
    parity(bench)
    for name in bench.size.models:
        for four_bit in (False, True):
            weights = "NF4" if four_bit else "bf16"
            model: Any = None
            with bench.part("model built", name, weights) as row:
                _need_bitsandbytes(four_bit)
                bench.need(10 if bench.device.type == "cuda" else 1)
                options = options_of(name, bench, four_bit)
                start = time.perf_counter()
                model = build(options.layers, options)
                synchronize(bench.device)
                row["ms"] = round(1000 * (time.perf_counter() - start))
            if model is None:
                continue
            analysis(bench, model, name, weights)
            training(bench, model, options, name, weights)
            protecting(bench, model, options, name, weights)
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
        f"Random weights, S = {STEPS}, rule left. Milliseconds are those of one prompt, or of one"
        " training step; the share of the matmul rate counts the floor's FLOPs."
    )
    path = writer.write("gpu", about, ran, bench.rows, device=bench.device)
    facts = {"machine": describe(bench.device), "command": ran, "rows": bench.rows}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
