"""An implanted llama whose inputs are protected, and a training that changes it."""

from __future__ import annotations

import torch

from .prompts import pad, prompts

ROWS = [[3, 1, 40], [0, 47, 5], [7, 8, 9]]
IDS = torch.arange(1, 13).view(2, 6)
CALIBRATION = pad(prompts(lengths=(40, 64, 23, 57, 64, 31)), "right")


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, times=4, optimizer=None, ids=IDS):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=0.05, weight_decay=0.1)
    for _ in range(times):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer
