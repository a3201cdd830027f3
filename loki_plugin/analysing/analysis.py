"""Quiet the model, check it, attribute: the one place that says in which order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from ..choices import BATCH_SIZE, PATH, PATHS, PathName
from ..model.anatomy import Anatomy
from .attribution.batches import Kernel, attribute_many
from .attribution.checking import NotReproduced, check_reproduces
from .attribution.engine import attribute_batch, convergence_error, integrate
from .attribution.plain import attribute_plainly, integrate_plainly
from .attribution.quadrature import Rule
from .attribution.quiet import OwnAttention, quiet
from .attribution.sequence import attribute_sequences
from .calibration.prompts import Prompt
from .pace import duration

LOG = logging.getLogger("loki_plugin")
# Why the fast analysis cannot be used for a model, and models of which the log says so.
_unknown: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_told: WeakSet[nn.Module] = WeakSet()
KERNELS: dict[PathName, Kernel] = {"token": attribute_batch, "sequence": attribute_sequences}


def analyse(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: Sequence[Prompt],
    rule: Rule,
    path: PathName = PATH,
    batch_size: int | str = BATCH_SIZE,
    done: Callable[[int], None] = lambda count: None,
) -> torch.Tensor:
    """Scores [N, L, H] of N prompts, in their order, on the CPU; `done(b)` is told of each batch.

    Neighbours share a batch: sort prompts by length, or by their ids where many begin alike. A
    model object that has not been analysed before is checked against itself first; one that the
    fast analysis does not reproduce is analysed by the plain loop, and the log says so.

    Raises:
        ValueError: an unknown path, or a model that does not run here.
        RuntimeError: one prompt alone does not fit into memory.
    """
    if path not in KERNELS:
        raise ValueError(f"attribution path {path!r} is unknown; expected {' or '.join(PATHS)}")
    with quiet(model) as own_attention, ExitStack() as stack:
        why = not_known(model, anatomy, prompts, own_attention)
        if why is None:
            kernel = KERNELS[path]
            batches = attribute_many(model, anatomy, prompts, rule, batch_size, kernel)
        else:
            stack.enter_context(own_attention())
            batches = attribute_plainly(model, anatomy, prompts, rule, path, batch_size)
        parts, started = [], time.perf_counter()
        for part in batches:
            if why is not None and model not in _told:
                _told.add(model)
                _tell(model, anatomy, rule, why, (time.perf_counter() - started) / len(part))
            parts.append(part)
            done(len(part))
        return torch.cat(parts)


def not_known(
    model: nn.Module, anatomy: Anatomy, prompts: Sequence[Prompt], own_attention: OwnAttention
) -> str | None:
    """Why the fast analysis cannot be used for a model; None: it can. Asked once of each."""
    if not anatomy.whole:
        layers = f"{anatomy.num_layers} of {len(anatomy.layers)} layers"
        return f"only {layers} have a down-projection"
    if model not in _unknown:
        try:
            shortest = min(prompts, key=lambda p: len(p.ids))
            check_reproduces(model, anatomy, shortest, own_attention)
        except NotReproduced as error:
            _unknown[model] = str(error)
    return _unknown.get(model)


def _tell(model: nn.Module, anatomy: Anatomy, rule: Rule, why: str, seconds: float) -> None:
    LOG.warning(
        "loki: model family '%s' is analysed by the plain loop, since %s. Its scores are exact, but"
        " it takes %d passes of every prompt, here %s for each. Few prompts suffice: lower"
        " `calibration.samples_per_subject` or give a short `calibration.source`; `loki stability`"
        " says from the scores whether there were enough",
        model.config.model_type,
        why,
        anatomy.num_layers * rule.steps,
        duration(seconds),
    )


def convergence(model: nn.Module, anatomy: Anatomy, prompts: Sequence[Prompt], rule: Rule) -> float:
    """The share of the change of p that the scores of some prompts miss (`path="token"`)."""
    with quiet(model) as own_attention:
        if not_known(model, anatomy, prompts, own_attention) is None:
            return convergence_error(model, anatomy, prompts, rule, integrate)
        plainly = partial(integrate_plainly, path="token")
        with own_attention():
            return convergence_error(model, anatomy, prompts, rule, plainly)
