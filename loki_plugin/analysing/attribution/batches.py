"""How many prompts at once: a budget measured at start, halved when memory runs out."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ...choices import BATCH_SIZE
from ...model.anatomy import Anatomy
from ..calibration.prompts import Prompt
from .devices import first_device, out_of_memory
from .engine import attribute_batch, shared_prefix
from .quadrature import Rule

# Scores [B, L, H] of one batch, on the model's device.
Kernel = Callable[[nn.Module, Anatomy, Sequence[Prompt], Rule], torch.Tensor]
LOG = logging.getLogger("loki_plugin")

# On a CPU more prompts per batch stop paying once the matrices fill the cores' caches.
_CPU_BYTES = 2 << 30
# What a first estimate may claim of the free memory; the rest is for what it does not foresee.
_SHARE = 0.6
# Neighbours with this share of their tokens in common (few-shot) run apart from others.
_ALIKE = 0.75


def prompt_bytes(anatomy: Anatomy, length: int, n_steps: int, itemsize: int) -> int:
    """Estimated bytes one prompt of `length` tokens holds at the peak.

    The stack keeps for its backward about 12 H-wide and 5 I-wide tensors per token and layer, for
    S·L·(L+1)/2 pairs of token and layer; the prefix keeps K and V (at most 2 H per token and layer)
    and works on about 6 I-wide tensors at a time.
    """
    h, i, layers = anatomy.hidden_size, anatomy.intermediate_size, anatomy.num_layers
    tokens = n_steps * layers * (layers + 1) // 2
    stack = tokens * (12 * h + 5 * i)
    prefix = length * (2 * h * layers + 6 * i)
    return itemsize * (stack + prefix)


def memory_budget(device: torch.device) -> int:
    """Bytes the analysis may use on `device`: a share of what is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE * (free + reusable))
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CPU_BYTES, int(_SHARE * pages))


def runs(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Cut where prompts that begin alike meet others: a batch runs what all of it shares once."""
    alike = [
        shared_prefix([a, b]) >= _ALIKE * min(len(a.ids), len(b.ids))
        for a, b in zip(prompts, prompts[1:], strict=False)
    ]
    sides = [False, *alike, False]
    cuts = [i + 1 for i, same in enumerate(alike) if not same and (sides[i] or sides[i + 2])]
    return list(zip([0, *cuts], [*cuts, len(prompts)], strict=True))


def plan(batch_size: int | str, costs: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Cut consecutive prompts into batches of about equal size: [(start, stop), ...].

    `auto` makes as few batches as keep each within `budget` bytes; one prompt alone may exceed it.
    """
    count = len(costs)
    largest = batch_size if isinstance(batch_size, int) else max(1, budget // max(costs))
    batches = -(-count // largest)
    cuts = [count * i // batches for i in range(batches + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


def attribute_many(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: Sequence[Prompt],
    rule: Rule,
    batch_size: int | str = BATCH_SIZE,
    kernel: Kernel = attribute_batch,
) -> Iterator[torch.Tensor]:
    """Scores of many prompts, in their order, batch by batch: tensors [b, L, H] on the CPU.

    `model` must be inside `quiet(model)`. Neighbours share a batch: sort prompts by length, or by
    their ids where many begin alike.
    A batch that does not fit is halved and done again; what is done stays done.

    Raises:
        RuntimeError: one prompt alone does not fit.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    device = first_device(model)
    costs = [prompt_bytes(anatomy, len(p.ids), rule.steps, parameter.itemsize) for p in prompts]
    budget = memory_budget(device)
    todo = [
        (start + first, start + last)
        for start, stop in runs(prompts)
        for first, last in plan(batch_size, costs[start:stop], budget)
    ][::-1]
    waiting = None  # one batch's scores travel to the CPU while the next one runs
    while todo:
        start, stop = todo.pop()
        try:
            scores = kernel(model, anatomy, prompts[start:stop], rule)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if stop - start == 1:
                raise RuntimeError(
                    f"one calibration prompt of {len(prompts[start].ids)} tokens does not fit into"
                    " memory; lower `calibration.max_tokens` or `attribution.steps`"
                ) from error
            scores = None
        if scores is None:  # outside the handler, whose traceback keeps the batch's tensors alive
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            middle = (start + stop) // 2
            # Every later batch is cut as small: the one that failed was planned like them.
            todo = [piece for batch in todo for piece in _cut(batch, middle - start)]
            todo += [(middle, stop), (start, middle)]
            LOG.info("loki: out of memory, going on with %d prompts at once", middle - start)
            continue
        if waiting is not None:
            yield waiting()
        waiting = _to_cpu(scores)
    if waiting is not None:
        yield waiting()


def _to_cpu(scores: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start the copy; the returned call waits for it."""
    if scores.device.type != "cuda":
        return scores.cpu
    host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
    host.copy_(scores, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(scores.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return host

    return wait


def _cut(batch: tuple[int, int], size: int) -> list[tuple[int, int]]:
    """Pieces of at most `size` prompts, last first."""
    start, stop = batch
    return [(i, min(i + size, stop)) for i in range(start, stop, size)][::-1]
