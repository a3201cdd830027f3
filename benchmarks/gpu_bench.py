"""What the parts of `benchmarks.gpu` share: shapes, rows, the time that is left."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.machine import synchronize
from loki_plugin.analysing.attribution.devices import out_of_memory
from loki_plugin.analysing.calibration.prompts import Prompt

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


def seconds_of(bench: Bench, run: Callable[[], Any]) -> float:
    synchronize(bench.device)
    start = time.perf_counter()
    run()
    synchronize(bench.device)
    return time.perf_counter() - start


def remember_peak(row: dict[str, Any], model: nn.Module, above: int) -> None:
    kept = [*model.parameters(), *model.buffers()]
    weights = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in kept}.values())
    row["above the weights (GiB)"] = round(above / GIB, 2)
    row["peak (GiB)"] = round((weights + above) / GIB, 2)


def attend(bench: Bench, model: nn.Module, attention: str) -> None:
    """Let the model attend so; transformers would look for a kernel on the hub."""
    if attention == "flash_attention_2":
        bench.need_gpu()
        if importlib.util.find_spec("flash_attn") is None:
            raise NotRun("flash_attn is not installed")
    model.set_attn_implementation(attention)


def need_bitsandbytes(four_bit: bool) -> None:
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed; give its wheel with --wheel")
