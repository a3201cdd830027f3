"""A score log's manifest, scores that tell every prompt from every other, the authors' files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loki_plugin.analysing.scores.log import SHARD_PROMPTS

N = 5 * SHARD_PROMPTS + 7
MANIFEST = {"prompts": [f"p{i}" for i in range(N)], "num_layers": 2, "hidden_size": 8, "by": 1}


def make(positions):
    """Scores that tell every prompt from every other."""
    return torch.stack([torch.arange(16.0).view(2, 8) + 100 * i for i in positions])


def score_file(path, scores, name="dataset", **metadata):
    """Resizable, chunked by h5py's guess, gzip, float16, one prompt appended at a time."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        data = file.create_dataset(
            name,
            (0, *scores.shape[1:]),
            np.float16,
            maxshape=(None, *scores.shape[1:]),
            chunks=True,
            compression="gzip",
            compression_opts=4,
        )
        for key, value in metadata.items():
            data.attrs[f"metadata_{key}"] = value
        for i, prompt in enumerate(scores):
            data.resize(i + 1, axis=0)
            data[i] = prompt.numpy().astype(np.float16)
    return path
