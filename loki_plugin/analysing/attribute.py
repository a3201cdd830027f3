"""Knowledge Vector Attribution: the public entry."""

from __future__ import annotations

import torch
from torch import nn

from ..choices import PATH, PATHS, RULE, STEPS
from ..model.anatomy import find_anatomy
from .analysis import analyse
from .attribution.quadrature import quadrature
from .calibration.prompts import Prompt


def attribute(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    targets: torch.Tensor | list[int] | None = None,
    n_steps: int = STEPS,
    rule: str = RULE,
    path: str = PATH,
) -> torch.Tensor:
    """Integrated gradients of the next-token probability for every row of every layer.

    score[b, l, j] = z_l[j] · Σ_k w_k ∂p/∂z_l[j] |_(z_l = α_k z_l), with z_l ∈ R^H the output of
    layer l's down-projection at the prompt's last token, p = softmax(logits)[y] at that token
    (paper, Eq. 4-5, with the factor z of integrated gradients as the authors' code has it).

    Args:
        model: a Hugging Face causal LM in any precision, as it stands. One whose layers mix tokens
            in a way that the fast analysis does not know takes L·S passes per prompt.
        input_ids: [B, T] token ids.
        attention_mask: [B, T], 1 for real tokens; padding left or right. None: no padding.
        targets: [B] token ids y; None: the model's own arg-max prediction.
        n_steps: S, integration steps.
        rule: see `quadrature`.
        path: "token" scales z_l at the last token only, from zero; "sequence" scales it at all
            positions, from its value on a prompt of token id 0 (the authors' Captum variant).

    Returns:
        [B, L, H] on the CPU, float32 (float64 for a float64 model). Against a plain loop in the
        same precision the relative error is about 1e-6 in float32 and 1e-13 in float64.

    Raises:
        ValueError: shapes that do not fit, an empty prompt, padding in the middle, a target
            outside the vocabulary, an unknown rule or path, a model without down-projections.
    """
    if path not in PATHS:
        raise ValueError(f"attribution path {path!r} is unknown; expected {' or '.join(PATHS)}")
    nodes_and_weights = quadrature(rule, n_steps)
    ids = unpad(input_ids, attention_mask)
    wanted = check_targets(targets, len(ids), model)
    prompts = [Prompt(tuple(i), y) for i, y in zip(ids, wanted, strict=True)]
    order = sorted(range(len(prompts)), key=lambda b: len(ids[b]))
    anatomy = find_anatomy(model)
    anatomy.check_rows()
    scores = analyse(model, anatomy, [prompts[b] for b in order], nodes_and_weights, path)
    return scores[torch.tensor(order).argsort()]


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The token ids of the B prompts without their padding.

    Raises:
        ValueError: not [B, T], an empty prompt, or padding between real tokens.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [B, T] and not empty, got {list(input_ids.shape)}")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {list(input_ids.shape)}, got"
            f" {list(attention_mask.shape)}"
        )
    prompts = []
    masks = attention_mask.bool().tolist()
    for b, (ids, mask) in enumerate(zip(input_ids.tolist(), masks, strict=True)):
        real = [t for t, is_real in enumerate(mask) if is_real]
        if not real:
            raise ValueError(f"prompt {b} has no real token: its attention_mask is all zero")
        if real[-1] - real[0] + 1 != len(real):
            raise ValueError(
                f"prompt {b} has padding between real tokens; pad on the left or on the right"
            )
        prompts.append(ids[real[0] : real[-1] + 1])
    return prompts


def check_targets(
    targets: torch.Tensor | list[int] | None, batch: int, model: nn.Module
) -> list[int | None]:
    if targets is None:
        return [None] * batch
    values: list[int | None] = [int(t) for t in targets]
    if len(values) != batch:
        raise ValueError(f"targets must hold one token id per prompt: {batch}, got {len(values)}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for b, value in enumerate(values):
        if value is None or not 0 <= value < vocabulary:
            raise ValueError(f"target {value} of prompt {b} is outside [0, {vocabulary})")
    return values
