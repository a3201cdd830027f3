"""The parts of `benchmarks.gpu` on training: steps, protected ones, compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import gpu_protecting
from benchmarks.gpu_bench import (
    ATTENTIONS,
    STEPS,
    Bench,
    attend,
    remember_peak,
    seconds_of,
    some_prompts,
)
from benchmarks.machine import PeakMemory
from benchmarks.training import ALL, DENSE, LOW_RANK, Training, methods
from loki_plugin.analysing.attribution.engine import attribute_batch
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.attribution.quiet import quiet
from loki_plugin.model.anatomy import find_anatomy


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
                attend(bench, model, attention)
                seconds[method] = _time_step(bench, model, wrappers[method], batch, options, row)
                if ALL in seconds and method != ALL:
                    row["note"] += f", {seconds[method] / seconds[ALL]:.2f} x LoRA's"
    model.set_attn_implementation("sdpa")


def protecting(
    bench: Bench, model: nn.Module, options: SimpleNamespace, name: str, weights: str
) -> None:
    """What `protect: auto` costs: to set what updates read, and in a step beside LoRA's own."""
    batch = torch.randint(options.vocabulary, (1, bench.size.tokens)).to(bench.device)
    plain = methods(options)[ALL]
    with bench.part(f"training step, {ALL}, again", name, weights, "sdpa") as row:
        lora = _time_step(bench, model, plain, batch, options, row)
    for method, wrap in gpu_protecting.wrappers(options).items():
        with bench.part(f"training step, {method}", name, weights, "sdpa") as row:
            extra = gpu_protecting.anchored(options)
            seconds = _time_step(bench, model, wrap, batch, options, row, extra=extra)
            row["note"] += f", {seconds / lora:.2f} x LoRA's"
    with bench.part("setting what all linears read", name, weights, "sdpa") as row:
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
    remember_peak(row, model, memory.peak)
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
            seconds = min(seconds_of(bench, run) for _ in range(5)) / len(some)
            row["ms"] = round(1000 * seconds, 2)
