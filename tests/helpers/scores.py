"""A score log's manifest, and scores that tell every prompt from every other."""

from __future__ import annotations

import torch

from loki_plugin.analysing.scores.log import SHARD_PROMPTS

N = 5 * SHARD_PROMPTS + 7
MANIFEST = {"prompts": [f"p{i}" for i in range(N)], "num_layers": 2, "hidden_size": 8, "by": 1}


def make(positions):
    """Scores that tell every prompt from every other."""
    return torch.stack([torch.arange(16.0).view(2, 8) + 100 * i for i in positions])
