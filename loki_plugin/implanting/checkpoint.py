"""A safetensors checkpoint folder, tensor by tensor, without loading it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..model.anatomy import Anatomy, find_anatomy
from ..model.building import build_empty
from ..model.linears import row_dim

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a base folder brings along besides weights.
TEMPLATES = "additional_chat_templates/*.jinja"  # by name, beside the usual one
_BESIDE = ("*.json", "*.jinja", "*.model", "*.model.v*", "*.txt", "*.py", "*.tiktoken")
COMPANIONS = (*_BESIDE, TEMPLATES)
_FETCHED = ("*.safetensors", *_BESIDE)
# Other forms of the weights that some models carry beside them, in folders or under other names.
_NOT_FETCHED = ("*/*", "consolidated*.safetensors")
_NEOX_HEAD = "embed_out.weight"  # what transformers holds as lm_head, and stores as it was
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
                f"'{self.file}' stores a weight as {self.dtype}; rows can only be merged"
                f" into {', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype]

    def bytes(self) -> np.ndarray:
        """The tensor's bytes as a read-only memory map."""
        if not self.size:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", self.start, (self.size,))

    def tensor(self) -> torch.Tensor:
        """A copy, aligned even where the file is not."""
        data = torch.from_numpy(np.array(self.bytes()))
        return data.view(self.torch_dtype).view(self.shape)


@dataclass(frozen=True)
class Base:
    """Which base model, as an Axolotl YAML says it.

    Attributes:
        name: a folder or a hub id.
        revision: of a hub id; None = the newest.
        trust_remote_code: whether its configuration may bring code of its own.
        overrides: of its configuration, under which it was trained.
        kind: the class of transformers that the YAML names (`model_type`); None = any that fits.
        unquantised: modules that the YAML has a quantised run leave whole (`bnb_config_kwargs`).
    """

    name: str | Path
    revision: str | None = None
    trust_remote_code: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None
    unquantised: tuple[str, ...] = ()

    @classmethod
    def of(cls, base: str | Path | Base) -> Base:
        return base if isinstance(base, Base) else cls(base)

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> Base:
        """From the keys of an Axolotl YAML."""
        return cls(
            run["base_model"],
            run.get("revision_of_model") or None,
            bool(run.get("trust_remote_code")),
            dict(run.get("overrides_of_model_config") or {}),
            run.get("model_type") or None,
            tuple((run.get("bnb_config_kwargs") or {}).get("llm_int8_skip_modules") or ()),
        )

    def folder(self) -> Path:
        """The local folder: itself, or the snapshot of a hub id (config, tokenizer, safetensors).

        Raises:
            ValueError: neither a folder nor a model that the hub (or its local cache) has.
        """
        if Path(self.name).is_dir():
            return Path(self.name)
        from huggingface_hub import snapshot_download

        try:
            found = snapshot_download(
                str(self.name),
                revision=self.revision,
                allow_patterns=list(_FETCHED),
                ignore_patterns=list(_NOT_FETCHED),
            )
            snapshot_download(str(self.name), revision=self.revision, allow_patterns=[TEMPLATES])
        except Exception as error:
            raise ValueError(
                f"'{self.name}' is neither a local folder nor a model that can be fetched"
                f" ({type(error).__name__}: {error})"
            ) from error
        return Path(found)

    def read(self, folder: Path) -> Any:
        """The configuration in a folder."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, trust_remote_code=self.trust_remote_code)

    def configuration(self, folder: Path) -> Any:
        """That of a folder under the overrides, set as Axolotl sets them: after it was read."""
        config = self.read(folder)
        for key, value in self.overrides.items():
            setattr(config, key, value)
        return config


def copy_files(folder: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a folder that one of the patterns names, to the same places."""
    for file in (f for pattern in patterns for f in folder.glob(pattern) if f.is_file()):
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder; where it has two forms, transformers takes the one
    file before the index.

    Raises:
        ValueError: no safetensors weights, or a shard named by the index is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        files = [folder / name for name in _named_by(folder / INDEX)]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise ValueError(f"'{folder}' lacks the shards {missing} that its index names")
        return files
    old = sorted(f.name for f in folder.glob("*.bin"))
    hint = (
        f"; it has {old[:3]}: convert it with AutoModelForCausalLM.from_pretrained(...)"
        ".save_pretrained(...)"
        if old
        else ""
    )
    raise ValueError(f"'{folder}' has no {SINGLE} or {INDEX}{hint}")


def _named_by(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{index}' is no index of a checkpoint ({error!r}); fetch or save it again"
        ) from error


def open_tensors(file: Path) -> Any:
    """Open a safetensors file, to be used as a context.

    Raises:
        ValueError: it is none, or cut off; safetensors has looked at all of its header.
    """
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"'{file}' is no whole safetensors file ({error}); fetch or save it again, after"
            " `git lfs install` where it comes from a git clone"
        ) from error


def tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, by key, from the headers of its shards.

    Raises:
        ValueError: as `shards`, or a shard that is damaged.
    """
    found = {}
    for file in shards(folder):
        with open_tensors(file), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            first, last = entry["data_offsets"]
            shape, start = tuple(entry["shape"]), 8 + length + first
            found[key] = Stored(file, entry["dtype"], shape, start, last - first)
    return found


@dataclass(frozen=True)
class Vocabulary:
    """A parameter with one row per token: the model's names for it (several where embeddings are
    tied), and the checkpoint's keys."""

    names: list[str]
    keys: list[str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and the model that it holds.

    Attributes:
        folder: where it lies.
        model: on the meta device.
        anatomy: of `model`.
        stored: all tensors of the checkpoint by key.
        down: keys of the L down-projections.
        vocabulary: input and output embeddings (and the bias of the latter).
        renamed: the model's names of tensors that transformers renames while it loads -> keys.
    """

    folder: Path
    model: nn.Module
    anatomy: Anatomy
    stored: dict[str, Stored]
    down: list[str]
    vocabulary: list[Vocabulary]
    renamed: dict[str, str]

    def first(self, linears: Sequence[str]) -> Stored:
        """The first down-projection; of a model without any the first of `linears`."""
        return self.stored[self.down[0] if self.down else self.linear(linears[0])[0]]

    def linear(self, name: str) -> tuple[str, int]:
        """The key of a linear module's weight, and the dimension of it that counts outputs.

        Raises:
            ValueError: the model has no such module, or the checkpoint stores it in another form.
        """
        try:
            module = self.model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"the model in '{self.folder}' has no module {name}, which the rows file names; it"
                " is another model"
            ) from error
        return _only(f"{name}.weight", self.stored, self.renamed), row_dim(module)


def open_checkpoint(
    base: str | Path | Base, made_for: Mapping[str, str] | None = None
) -> Checkpoint:
    """Find out what a checkpoint stores where; only the headers of its files are read.

    Args:
        made_for: the fingerprint in a rows file: which of the classes that fit the checkpoint (a
            model for images and text, or its text model alone) was trained.

    Raises:
        ValueError: a quantised checkpoint, an unsupported family, or keys that do not match.
    """
    base = Base.of(base)
    folder = base.folder()
    trust = base.trust_remote_code
    config = base.configuration(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"'{folder}' is a quantised checkpoint; rows can only be merged into and compared in"
            " the 16-bit or 32-bit one that it was made from"
        )
    model = build_empty(config, base.kind, trust, made_for)
    anatomy = find_anatomy(model)
    stored = tensors(folder)
    renamed = _renamed(model, stored)
    down = [_only(f"{name}.weight", stored, renamed) for name in anatomy.names]
    vocabulary = _vocabulary(model, stored, renamed)
    return Checkpoint(folder, model, anatomy, stored, down, vocabulary, renamed)


def _renamed(model: nn.Module, stored: dict[str, Stored]) -> dict[str, str]:
    """Names that differ by more than a prefix: Gemma 3's `language_model.model.` and the like."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    steps = [s for s in get_model_conversion_mapping(model) if isinstance(s, WeightRenaming)]
    names = {key: rename_source_key(key, steps, [])[0] for key in sorted(stored)}
    return {name: key for key, name in names.items() if name != key}


def _only(name: str, stored: dict[str, Stored], renamed: dict[str, str]) -> str:
    matches = matching_keys(name, stored, renamed)
    if len(matches) != 1:
        raise ValueError(
            f"the model's {name} matches {len(matches)} tensors of the checkpoint"
            f" {matches[:3]}; expected exactly one"
        )
    return matches[0]


def matching_keys(name: str, stored: dict[str, Stored], renamed: dict[str, str]) -> list[str]:
    """A checkpoint may leave out or add a prefix (GPT-2's has no `transformer.`)."""
    if name in stored:
        return [name]
    if name in renamed:
        return [renamed[name]]
    if name == "lm_head.weight" and _NEOX_HEAD in stored:
        return [_NEOX_HEAD]
    return [k for k in stored if f".{name}".endswith(f".{k}") or k.endswith(f".{name}")]


def _vocabulary(
    model: nn.Module, stored: dict[str, Stored], renamed: dict[str, str]
) -> list[Vocabulary]:
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = {id(p): p for module in both if module is not None for p in module.parameters()}
    names: dict[int, list[str]] = {i: [] for i in wanted}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            names[id(parameter)].append(name)
    return [
        Vocabulary(n, [k for x in n for k in matching_keys(x, stored, renamed)])
        for n in names.values()
    ]
