"""Embeddings that grew by new tokens: what an adapter brings, and a checkpoint with them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..model.linears import PREFIX
from .checkpoint import (
    COMPANIONS,
    INDEX,
    SINGLE,
    Checkpoint,
    Stored,
    Vocabulary,
    copy_files,
    shards,
    tensors,
)

_CHUNK = 4096  # rows


def new_rows(base: Checkpoint, lora) -> dict[str, torch.Tensor]:
    """By checkpoint key: the rows of the embeddings that an adapter adds to the base's.

    PEFT saves the whole embeddings where tokens were added. The base's own rows in them must be as
    they were (to the rounding of the dtype in which the base was loaded).

    Args:
        lora: the adapter's open safetensors file.

    Raises:
        ValueError: embeddings of other sizes, or with other values for tokens that the base has.
    """
    held = {k for k in lora.keys() if ".lora_" not in k}
    found: dict[str, torch.Tensor] = {}
    for part in base.vocabulary:
        brought = [f"{PREFIX}{n}" for n in part.names if f"{PREFIX}{n}" in held]
        for name in brought:
            for key in part.keys:
                rows = _added(lora.get_slice(name), base.stored[key], name)
                if key not in found and len(rows):
                    found[key] = rows
        held -= set(brought)
    if held:
        raise ValueError(
            f"the adapter holds {sorted(held)[0]}, which is neither a LoRA matrix nor an embedding;"
            " it is not a LoKI adapter of this model"
        )
    counts = {key: len(rows) for key, rows in found.items()}
    bare = [part for part in base.vocabulary if counts and not set(part.keys) & set(counts)]
    if bare or len(set(counts.values())) > 1:
        raise ValueError(
            f"the adapter adds {counts} rows to the embeddings"
            f"{_lacking(bare)}; all of them must grow by the same number of tokens"
        )
    return found


def check_tokenizer(tokenizer: Path, base: Checkpoint, grown: dict[str, torch.Tensor]) -> None:
    """Check that an adapter's tokenizer has no token beyond the merged embeddings.

    Raises:
        ValueError: it has, and the base's own has not.
    """
    rows = min(
        base.stored[key].shape[0] + len(grown.get(key, ()))
        for part in base.vocabulary
        for key in part.keys
    )
    largest = _largest_id(tokenizer)
    if largest >= rows > _largest_id(base.folder):
        raise ValueError(
            f"the tokenizer of adapter '{tokenizer}' has tokens up to id {largest}, the embeddings"
            f" {rows} rows: the embeddings of its new tokens were not saved with it (by version"
            " 0.4.0 or earlier, where the base's configuration could not be looked up). Train it"
            " again, or put the base's tokenizer into its folder if the tokens were never used"
        )


def _largest_id(folder: Path) -> int:
    """Of all tokens in a folder's `tokenizer.json`; -1 where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return -1
    held = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = (held.get("model") or {}).get("vocab") or {}
    own = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*own, *(token["id"] for token in held.get("added_tokens") or [])], default=-1)


def _lacking(bare: list[Vocabulary]) -> str:
    return f" but none to {bare[0].names[0]}" if bare else ""


def _added(brought, place: Stored, name: str) -> torch.Tensor:
    shape, size = tuple(brought.get_shape()), place.shape[0]
    if shape[0] < size or shape[1:] != place.shape[1:]:
        raise ValueError(
            f"the adapter's {name} is {list(shape)}, the base's {list(place.shape)}: only"
            " embeddings with more tokens can be merged; give the base that was trained on"
        )
    old = place.tensor()
    dtype = brought[:1].dtype
    # The base was loaded in the adapter's dtype, or in 16 bits and held in 32 bits afterwards.
    loads = {dtype, torch.bfloat16, torch.float16}
    for i in range(0, size, _CHUNK):
        part, seen = old[i : i + _CHUNK], brought[i : min(i + _CHUNK, size)]
        loads = {d for d in loads if torch.equal(part.to(d).to(dtype), seen)}
        if not loads:
            raise ValueError(
                f"the adapter's {name} has other values for tokens {i} to {i + len(part) - 1} than"
                " the base: it was trained on another base, or trained the embeddings"
            )
    return brought[size:].to(place.torch_dtype)


def copy_model(
    base: Checkpoint, target: Path, grown: dict[str, torch.Tensor], progress: bool
) -> None:
    """Copy a checkpoint into an empty folder, with its companions; `grown` as `new_rows` says."""
    folder = base.folder
    for file in tqdm(shards(folder), desc="loki: copying shards", disable=not progress):
        inside = {k: rows for k, rows in grown.items() if base.stored[k].file == file}
        if inside:
            write_grown(file, target / file.name, inside)
        else:
            shutil.copyfile(file, target / file.name)
    copy_files(folder, target, COMPANIONS)
    if (folder / SINGLE).is_file():  # the shards of an index beside it stay behind
        (target / INDEX).unlink(missing_ok=True)
    if grown:
        key, rows = next(iter(grown.items()))
        more = sum(new.numel() for new in grown.values())
        size = base.stored[key].shape[0]
        grow_companions(target, size, size + len(rows), more)


def write_grown(source: Path, target: Path, grown: dict[str, torch.Tensor]) -> None:
    """Copy a safetensors file; the tensors in `grown` get more rows behind their own."""
    with source.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", None)
        order = sorted(header, key=lambda k: header[k]["data_offsets"])
        entries, at = {} if metadata is None else {"__metadata__": metadata}, 0
        for key in order:
            entry = header[key]
            first, last = entry["data_offsets"]
            more, shape = grown.get(key), list(entry["shape"])
            size = last - first
            if more is not None:
                shape[0] += len(more)
                size += more.numel() * more.element_size()
            entries[key] = {"dtype": entry["dtype"], "shape": shape}
            entries[key]["data_offsets"] = [at, at + size]
            at += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for key in order:
                first, last = header[key]["data_offsets"]
                stream.seek(8 + length + first)
                _copy_bytes(stream, out, last - first)
                if key in grown:
                    out.write(grown[key].contiguous().view(torch.uint8).numpy().tobytes())


def _copy_bytes(source, target, count: int) -> None:
    while count:
        data = source.read(min(count, 64 << 20))
        target.write(data)
        count -= len(data)


def grow_companions(folder: Path, size: int, new: int, more: int) -> None:
    """Set `vocab_size` in config.json from `size` to `new`, wherever it stands, in that of a text
    model inside too; count `more` numbers in the index."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    owners = [o for o in _blocks(config) if o.get("vocab_size") == size]
    if not owners:
        inner = config.get("text_config")
        owners = [inner if "vocab_size" not in config and isinstance(inner, dict) else config]
    for owner in owners:
        owner["vocab_size"] = new
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / INDEX
    if path.is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        metadata = index.setdefault("metadata", {})
        metadata["total_size"] = sum(place.size for place in tensors(folder).values())
        if "total_parameters" in metadata:
            metadata["total_parameters"] += more
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _blocks(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for inner in config.values():
        if isinstance(inner, dict):
            yield from _blocks(inner)
