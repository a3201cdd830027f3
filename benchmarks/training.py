"""Seconds and peak memory of one training step: LoKI, LoRA, the authors' module, full rows.

    python -m benchmarks.training                      # ours against PEFT's LoRA
    python -m benchmarks.training --reference CLONE    # and the authors' module from a clone

On a GPU, the shape of an 8B model (add --four-bit for NF4):

    python -m benchmarks.training --device cuda --dtype bfloat16 --hidden 4096 \\
        --intermediate 14336 --kv-heads 8 --head-size 128 --vocabulary 128256 --layers 32 \\
        --batch 1 --tokens 2048 --checkpointing

The same frozen weights (random), the same batch, AdamW, in one process. The methods take turns,
step by step, and each counts with its fastest, so that none has the quiet machine for itself; the
peaks are measured before, one method alone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.attribution import build
from benchmarks.machine import PeakMemory, authors, synchronize
from benchmarks.writer import command, write
from loki_plugin import implant
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.selecting.select import quota_to_count

AUTHORS = "a63aec3:src/loki/core/loki_linear.py"
MLP = ["gate_proj", "up_proj", "down_proj"]
DENSE, LOW_RANK = "LoKI dense", "LoKI* r = 16"
PROTECTED = "LoKI dense, an eighth of the input directions protected"
ALL, EQUAL = "(a) LoRA r = 16, all linears", "(b) LoRA, MLP, equal trainable parameters"
SPLIT, FULL = "(c) the authors' split linear", "(d) full down-projections"


def methods(options) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Name -> what makes the trainable model of the frozen one."""
    k = quota_to_count(options.quota, options.hidden)
    draw = torch.Generator().manual_seed(0)
    rows = [
        torch.randperm(options.hidden, generator=draw)[:k].sort().values
        for _ in range(options.layers)
    ]
    # r (2 (H + I) + (I + H)) = k I
    equal = round(k * options.intermediate / (3 * (options.hidden + options.intermediate)))

    def protected(model):
        # Hard and soft directions cost the same; which ones they are does not matter here.
        size = (options.intermediate, options.intermediate // 8)
        drawn = (torch.randn(size, device=options.device) for _ in rows)
        return implant(model, rows, protect=[torch.linalg.qr(x)[0].cpu() for x in drawn])

    def lora(r, targets):
        return lambda m: get_peft_model(m, LoraConfig(r=r, lora_alpha=r, target_modules=targets))

    def full(model):
        for module in find_anatomy(model).down:
            module.weight = nn.Parameter(module.weight.detach().clone())
        return model

    def split(model):
        linear = authors(options.reference, AUTHORS, "loki_linear").LoKILinear
        anatomy = find_anatomy(model)
        for name, module, some in zip(anatomy.names, anatomy.down, rows, strict=True):
            model.set_submodule(name, linear(module, some.tolist()))
        return model

    found = {
        DENSE: lambda m: implant(m, rows),
        PROTECTED: protected,
        LOW_RANK: lambda m: implant(m, rows, rank=16),
        ALL: lora(16, "all-linear"),
        EQUAL: lora(equal, MLP),
    }
    if options.reference and not options.four_bit:
        found[SPLIT] = split
    if not options.four_bit:  # packed weights do not train
        found[FULL] = full
    return found


class Training:
    """One method's model and optimizer; the frozen weights are `model`'s own, shared by all."""

    def __init__(self, model: nn.Module, wrap, options):
        shared = {id(p): p for p in model.parameters()}
        self.model = wrap(copy.deepcopy(model, shared)).train()
        self.device = torch.device(options.device)
        if options.checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.1)
        self.extra: Callable[[nn.Module], torch.Tensor] | None = None  # what is added to its loss

    def step(self, batch: torch.Tensor) -> float:
        """Its seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(input_ids=batch, labels=batch).loss
        if self.extra:
            loss = loss + self.extra(self.model)
        loss.backward()
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - start


def peak(model: nn.Module, wrap, batch: torch.Tensor, options) -> int:
    """Bytes above the frozen model, what trains included, after two steps alone."""
    with PeakMemory(torch.device(options.device)) as memory:
        training = Training(model, wrap, options)
        training.step(batch)
        training.step(batch)
    del training
    gc.collect()
    return memory.peak


def parse() -> SimpleNamespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", metavar="CLONE", help="a clone of the authors' repository")
    for name, default in (
        ("hidden", 512), ("intermediate", 1792), ("layers", 6), ("kv-heads", 2),
        ("head-size", 64), ("vocabulary", 4096), ("batch", 4), ("tokens", 128),
        ("steps", 12),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quota", default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    return parser.parse_args()


def main():
    options = parse()
    draw = torch.Generator().manual_seed(1)
    size = (options.batch, options.tokens)
    batch = torch.randint(options.vocabulary, size, generator=draw).to(options.device)
    wrappers = methods(options)
    model = build(options.layers, options)
    peaks = {name: peak(model, wrap, batch, options) for name, wrap in wrappers.items()}
    trainings = {name: Training(model, wrap, options) for name, wrap in wrappers.items()}
    for training in trainings.values():
        training.step(batch)  # makes the optimizer's states
    runs = [{n: t.step(batch) for n, t in trainings.items()} for _ in range(options.steps)]
    seconds = {name: min(run[name] for run in runs) for name in trainings}
    rows = [
        {
            "method": name,
            "trained parameters": f"{sum(p.numel() for p in training.parameters):,}",
            "step (s)": f"{seconds[name]:.3f}",
            "peak above the frozen model (MiB)": f"{peaks[name] / 2**20:.0f}",
        }
        | {f"time / {n[:3]}": f"{seconds[name] / s:.2f}" for n, s in seconds.items() if n[0] == "("}
        for name, training in trainings.items()
    ]
    about = (
        f"Llama of {options.layers} layers, H = {options.hidden}, I = {options.intermediate},"
        f" {'NF4' if options.four_bit else options.dtype}, quota {options.quota};"
        f" {options.batch} x {options.tokens} tokens, AdamW,"
        f" gradient checkpointing {'on' if options.checkpointing else 'off'}; fastest of"
        f" {options.steps} steps."
    )
    ran = command("training", CLONE=options.reference)
    path = write("training", about, ran, rows, device=options.device, as_csv=True)
    print(path.read_text())


if __name__ == "__main__":
    main()
