"""Quiet the model, check it, attribute: the one place that says in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..choices import BATCH_SIZE, PATH, PATHS, PathName
from ..model.anatomy import Anatomy
from .attribution.batches import Kernel, attribute_many
from .attribution.checking import NotReproduced, check_reproduces
from .attribution.engine import attribute_batch, convergence_error
from .attribution.quadrature import Rule
from .attribution.quiet import quiet
from .attribution.sequence import attribute_sequences
from .calibration.prompts import Prompt

# What is left where a model cannot be analysed.
WITHOUT_SCORES = (
    "Its rows train without an analysis: `strategy: random`, `quota: 100`, or a file of rows in"
    " `rows`, in the `loki:` block"
)
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
    model object that has not been analysed before is checked against itself first.

    Raises:
        ValueError: an unknown path, or a model that the fast analysis does not reproduce.
        RuntimeError: one prompt alone does not fit into memory.
    """
    if path not in KERNELS:
        raise ValueError(f"attribution path {path!r} is unknown; expected {' or '.join(PATHS)}")
    check_analysable(anatomy)
    with quiet(model) as own_attention:
        try:
            shortest = min(prompts, key=lambda p: len(p.ids))
            check_reproduces(model, anatomy, shortest, own_attention)
        except NotReproduced as error:
            raise ValueError(
                f"model family '{model.config.model_type}' cannot be analysed: {error}"
            ) from error
        parts = []
        for part in attribute_many(model, anatomy, prompts, rule, batch_size, KERNELS[path]):
            parts.append(part)
            done(len(part))
        return torch.cat(parts)


def check_analysable(anatomy: Anatomy) -> None:
    """What can be said before a prompt runs.

    Raises:
        ValueError: layers without a down-projection.
    """
    if not anatomy.whole:
        raise ValueError(
            f"only {anatomy.num_layers} of {len(anatomy.layers)} layers have a down-projection, and"
            f" loki cannot analyse such a model. {WITHOUT_SCORES}"
        )


def convergence(model: nn.Module, anatomy: Anatomy, prompts: Sequence[Prompt], rule: Rule) -> float:
    """The share of the change of p that the scores of some prompts miss (`path="token"`)."""
    with quiet(model):
        return convergence_error(model, anatomy, prompts, rule)
