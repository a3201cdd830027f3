"""Bytes of the files that a run writes, to the byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch

from ..analysing.scores.log import SHARD_PROMPTS

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def safetensors_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]
) -> int:
    """The size of a safetensors file with tensors of one dtype: its length, a JSON header padded
    to whole words, the tensors in the order of their names."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(shapes):
        start = end
        end += _elements(shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [start, end],
        }
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def adapter_bytes(
    names: Sequence[str],
    inputs: Sequence[int],
    hidden: int,
    counts: Sequence[int],
    rank: int | None,
    dtype: torch.dtype,
    linears: Mapping[str, tuple[int, int, int]],
) -> int:
    """`adapter_model.safetensors`: A [r, I] and B [H, r] of every layer that trains rows, and of
    further linears.

    Args:
        names: of the L down-projections in the base model.
        inputs: I of each.
        counts: rows of each that train.
        rank: None for the dense form, where r is the layer's count.
        linears: (inputs, outputs, rank) by name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size, count in zip(names, inputs, counts, strict=True):
        if count:
            shapes[f"base_model.model.{name}.lora_A.weight"] = (rank or count, size)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (hidden, rank or count)
    for name, (size, outputs, r) in linears.items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = (r, size)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (outputs, r)
    return safetensors_bytes(shapes, dtype, {"format": "pt"})


def score_log_bytes(prompts: int, layers: int, hidden: int) -> int:
    """The shards of the score log of N prompts: scores [n, L, H] in float32 each."""
    digest, total = "0" * 64, 0
    for shard, start in enumerate(range(0, prompts, SHARD_PROMPTS)):
        count = min(SHARD_PROMPTS, prompts - start)
        about = json.dumps({"log": digest, "shard": shard, "checksum": digest})
        shape = {"scores": (count, layers, hidden)}
        total += safetensors_bytes(shape, torch.float32, {"loki": about})
    return total


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
