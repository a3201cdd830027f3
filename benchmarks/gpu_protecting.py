"""The part of `benchmarks.gpu` on `protect: auto`: finding directions, and steps under them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.attribution import build
from benchmarks.machine import synchronize
from loki_plugin import implant
from loki_plugin.choices import ALL, PROTECT_GB
from loki_plugin.implanting.adapter import freeze
from loki_plugin.model.anatomy import find_anatomy, linear_sizes
from loki_plugin.protecting.anchor import Anchor
from loki_plugin.protecting.directions import SOFTEST
from loki_plugin.protecting.finding import targeted
from loki_plugin.protecting.fixing import fix_reads, task_reads
from loki_plugin.protecting.packed import rounded
from loki_plugin.protecting.solving import Wanted
from loki_plugin.selecting.select import quota_to_count

EVERY = "`auto`, all linears r = 16"
MOVING = "`auto` with `freeze_a: false`, all linears r = 16"
ROWS = "`auto`, 10 % of the rows"
_TEXT, _TEXTS = 150, 2  # tokens of an anchor's text, texts in a step


def finding(options: SimpleNamespace, layers: int, texts: int, row: dict[str, Any]) -> float:
    """Seconds to set what all linears of `layers` layers read, as a run does it."""
    model = build(layers, options)
    draw = torch.Generator().manual_seed(2)
    prompts = torch.randint(options.vocabulary, (texts, _TEXT), generator=draw).tolist()
    rows = [torch.arange(options.hidden)] * layers
    tuned = implant(model, rows, rank=16, targets=ALL)
    started = time.perf_counter()
    task_reads(tuned, prompts[:64], prompts, Wanted(0.99, None, True, settles=True))
    synchronize(torch.device(options.device))
    seconds = time.perf_counter() - started
    row["ms"] = round(1000 * seconds)
    row["note"] = (
        f"{layers} of {options.layers} layers, {texts * _TEXT} tokens of text and"
        f" {len(prompts[:64]) * _TEXT} of a task; {seconds * options.layers / layers:.0f} s for all"
        " layers"
    )
    return seconds


def wrappers(options: SimpleNamespace) -> dict[str, Any]:
    """Name -> what makes the trainable model of the frozen one, under as many directions as fit."""
    count = quota_to_count(10, options.hidden)

    def still(model: nn.Module):
        rows = [torch.arange(options.hidden)] * options.layers
        tuned = implant(model, rows, rank=16, targets=ALL)
        fix_reads(tuned)  # to what is there: which costs as much
        freeze(tuned)
        return tuned

    def every(model: nn.Module):
        rows = [torch.arange(options.hidden)] * options.layers
        protected = _drawn(model, targeted(model, ALL), options)
        return implant(model, rows, rank=16, protect=protected, targets=ALL)

    def some(model: nn.Module):
        rows = [torch.arange(count)] * options.layers
        return implant(model, rows, protect=_drawn(model, targeted(model), options))

    return {EVERY: still, MOVING: every, ROWS: some}


def anchored(options: SimpleNamespace):
    """The anchor's part of a loss; the base has said its texts after the first step."""
    draw = torch.Generator().manual_seed(3)
    texts = torch.randint(options.vocabulary, (_TEXTS, _TEXT), generator=draw).tolist()
    anchor = Anchor(texts, 1.0, _TEXTS, starts=[[_TEXT // 3]] * _TEXTS)
    return lambda model: anchor.divergence(model, list(range(_TEXTS)))


def _drawn(
    model: nn.Module, modules: dict[str, nn.Module], options: SimpleNamespace
) -> dict[str, torch.Tensor]:
    """Soft directions in 8 bits as `auto` holds them on a card; which ones costs nothing."""
    sizes = [linear_sizes(m)[0] for m in modules.values()]  # type: ignore[index]
    names = list(_sites(list(modules), find_anatomy(model).names))
    per_site = [sizes[list(modules).index(some[0])] for some in names]
    most = Wanted(0.99, None, True, _memory(), torch.int8).most(per_site, 4)
    found = {}
    for some, size, number in zip(names, per_site, most or per_site, strict=True):
        basis, _ = torch.linalg.qr(torch.randn(size, number, device=options.device))
        weights = torch.linspace(SOFTEST, 0, number, device=options.device).sqrt()
        found |= dict.fromkeys(some, rounded(basis * weights, SOFTEST).cpu())
    return found


def _sites(names: list[str], down: tuple[str, ...] | list[str]) -> Iterator[list[str]]:
    """Names of modules that read one input: of a Llama, q k v, and gate up."""
    for name in down:
        if name in names:
            yield [name]
    for one in ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj"):
        leaves = one.split()
        same = [[n for n in names if n.endswith(leaf)] for leaf in leaves]
        yield from (list(some) for some in zip(*same, strict=True))


def _memory(part: float = 1.0) -> int:
    return int(part * PROTECT_GB * 10**9)
