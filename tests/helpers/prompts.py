"""Random prompts, their padding, and how far scores are from the truth."""

from __future__ import annotations

import torch

from loki_plugin.analysing.calibration.prompts import Prompt

LENGTHS = (9, 5, 12)


def prompts(vocabulary=97, lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (n,), generator=generator) for n in lengths]


def whole(ids):
    """1-D id tensors as calibration prompts without a target."""
    return [Prompt(tuple(i.tolist())) for i in ids]


def pad(ids, side):
    width = max(map(len, ids))
    batch = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, real, prompt in zip(batch, mask, ids, strict=True):
        where = slice(len(prompt)) if side == "right" else slice(width - len(prompt), width)
        row[where], real[where] = prompt, 1
    return batch, mask


def error(scores, truth):
    """Largest difference, relative to the largest score of the same prompt and layer."""
    scale = truth.abs().amax(-1, keepdim=True)
    return float(((scores - truth).abs() / scale).max())


def rms(scores, truth):
    scale = truth.abs().amax(-1, keepdim=True)
    return float(((scores - truth) / scale).square().mean().sqrt())


# A task of one's own for lm-eval: multiple choice from a .jsonl file, which `%` fills in.
LM_EVAL_TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: %s}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
