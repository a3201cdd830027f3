"""A safetensors checkpoint folder, tensor by tensor, without loading it."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..model.anatomy import Anatomy, find_anatomy

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: `size` bytes from `start` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"'{self.file}' stores a down-projection as {self.dtype}; rows can only be merged"
                f" into {', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype]

    def bytes(self) -> np.ndarray:
        """The tensor's bytes as a read-only memory map."""
        if not self.size:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", self.start, (self.size,))


def resolve(model: str | Path) -> Path:
    """The local folder of a model: itself, or the snapshot of a hub id.

    Raises:
        ValueError: neither a folder nor a model that the hub (or its local cache) has.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model)))
    except Exception as error:
        raise ValueError(
            f"'{model}' is neither a local folder nor a model that can be fetched"
            f" ({type(error).__name__}: {error})"
        ) from error


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder.

    Raises:
        ValueError: no safetensors weights, or a shard named by the index is missing.
    """
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise ValueError(f"'{folder}' lacks the shards {missing} that its index names")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    old = sorted(f.name for f in folder.glob("*.bin"))
    hint = (
        f"; it has {old[:3]}: convert it with AutoModelForCausalLM.from_pretrained(...)"
        ".save_pretrained(...)"
        if old
        else ""
    )
    raise ValueError(f"'{folder}' has no {SINGLE} or {INDEX}{hint}")


def tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, by key, from the headers of its shards."""
    found = {}
    for file in shards(folder):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            first, last = entry["data_offsets"]
            start = 8 + length + first
            if start + last - first > file.stat().st_size:
                raise ValueError(f"'{file}' is cut off: tensor {key} ends behind the file")
            found[key] = Stored(file, entry["dtype"], tuple(entry["shape"]), start, last - first)
    return found


def down_projections(folder: Path) -> tuple[Anatomy, list[str]]:
    """The anatomy of the checkpoint's model (on the meta device) and its down-projections' keys.

    Raises:
        ValueError: a quantised checkpoint, an unsupported family, or keys that do not match.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"'{folder}' is a quantised checkpoint; rows can only be merged into and compared in"
            " the 16-bit or 32-bit one that it was made from"
        )
    with torch.device("meta"):
        anatomy = find_anatomy(AutoModelForCausalLM.from_config(config))
    stored = tensors(folder)
    return anatomy, [_key(f"{name}.weight", stored) for name in anatomy.names]


def _key(name: str, stored: dict[str, Stored]) -> str:
    """A checkpoint may leave out or add a prefix (GPT-2's has no `transformer.`)."""
    if name in stored:
        return name
    matches = [k for k in stored if f".{name}".endswith(f".{k}") or k.endswith(f".{name}")]
    if len(matches) != 1:
        raise ValueError(
            f"the model's {name} matches {len(matches)} tensors of the checkpoint"
            f" {matches[:3]}; expected exactly one"
        )
    return matches[0]
