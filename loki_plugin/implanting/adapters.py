"""A saved adapter as merging and verifying read it: a plain LoRA, confined to its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from ..rows import FILE_NAME, RowSelection, common_rows
from .checkpoint import open_tensors
from .saved import FAILED_NAME, WEIGHTS
from .selected import rows_outside
from .vocabulary import PREFIX

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """The folder of an adapter, and the rows that it may change."""

    folder: Path
    selection: RowSelection

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """With the rows file that stands in the folder.

        Raises:
            ValueError: no folder, or none with a sound rows file.
        """
        if not Path(folder).is_dir():
            raise ValueError(
                f"'{folder}' is no folder of a saved adapter; train first, or give the folder of"
                " one with --adapter"
            )
        return cls(Path(folder), RowSelection.load(Path(folder) / FILE_NAME))


@dataclass(frozen=True)
class Opened:
    """An adapter whose file is open, after all checks.

    Attributes:
        folder: where it lies.
        selection: the rows that it may change.
        lora: the open safetensors file.
        layers: layer -> the name of its module in the file.
        scalings: layer -> alpha/r.
    """

    folder: Path
    selection: RowSelection
    lora: Any
    layers: dict[int, str]
    scalings: dict[int, float]

    def update(self, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """(alpha/r · B A)[rows], [k, I], in `dtype`."""
        a, b = (self.lora.get_tensor(f"{self.layers[layer]}.lora_{x}.weight") for x in "AB")
        rows = self.selection.rows[layer]
        return self.scalings[layer] * (b[rows].to(dtype) @ a.to(dtype))


@contextmanager
def opened(adapters: Sequence[Adapter], names: list[str]) -> Iterator[list[Opened]]:
    """Open adapters and check them.

    Args:
        names: of the L down-projections.

    Raises:
        ValueError: no plain LoRA on the down-projections; a failed check of its training; NaN or
            Inf; non-zero rows of B outside its selection.
    """
    with ExitStack() as files:
        found = []
        for adapter in adapters:
            _check_mark(adapter.folder)
            config = _lora_config(adapter.folder)
            lora = files.enter_context(open_tensors(adapter.folder / WEIGHTS))
            layers = adapted_layers(lora.keys(), names, adapter.selection)
            check_rows(lora, layers, adapter.selection)
            scalings = {i: _scaling(config, names[i], _rank(lora, m)) for i, m in layers.items()}
            found.append(Opened(adapter.folder, adapter.selection, lora, layers, scalings))
        yield found


def check_disjoint(adapters: Sequence[Adapter]) -> None:
    """Check that no row is changed by two adapters.

    Raises:
        ValueError: the first two that share rows; layer and rows are named.
    """
    for n, one in enumerate(adapters):
        for other in adapters[n + 1 :]:
            common = common_rows(one.selection, other.selection)
            if any(common):
                layer = next(i for i, shared in enumerate(common) if shared)
                raise ValueError(
                    f"adapters '{one.folder}' and '{other.folder}' change"
                    f" {sum(map(len, common))} rows in common (layer {layer}:"
                    f" {common[layer][:5]}); neither was trained with the other's update there."
                    " Train one of them with the other's rows file in `loki.exclude`, or ask for"
                    " the sum of their updates with --sum-overlaps"
                )


def _check_mark(adapter: Path) -> None:
    mark = adapter / FAILED_NAME
    if mark.is_file():
        raise ValueError(
            f"'{mark}' says: {' '.join(mark.read_text(encoding='utf-8').split())}. Train again;"
            " or, if you have looked into it and the adapter is sound, delete that file"
        )


def _lora_config(adapter: Path) -> dict:
    missing = [n for n in (CONFIG, WEIGHTS) if not (adapter / n).is_file()]
    if missing:
        raise ValueError(
            f"'{adapter}' is no saved LoRA adapter: it has no {' and no '.join(missing)}"
        )
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{adapter / CONFIG}' is not JSON ({error}); save it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{adapter / CONFIG}' is not a JSON object; save it again")
    wrong = [k for k in ("use_dora", "use_rslora", "modules_to_save", "lora_bias") if config.get(k)]
    if config.get("peft_type") != "LORA" or wrong:
        raise ValueError(
            f"'{adapter}' is not a plain LoRA adapter (peft_type {config.get('peft_type')},"
            f" {wrong or 'no special options'}); LoKI adapters are"
        )
    return config


def _scaling(config: dict, name: str, r: int) -> float:
    pattern = config.get("alpha_pattern") or {}
    return pattern.get(get_pattern_key(pattern.keys(), name), config["lora_alpha"]) / r


def _rank(lora, module: str) -> int:
    return lora.get_slice(f"{module}.lora_A.weight").get_shape()[0]


def adapted_layers(keys, down: list[str], selection: RowSelection) -> dict[int, str]:
    names = {f"{PREFIX}{name}": i for i, name in enumerate(down)}
    modules = {key.rpartition(".lora_")[0] for key in keys if ".lora_" in key}
    foreign = sorted(m for m in modules if m not in names)
    if foreign:
        raise ValueError(
            f"the adapter changes {len(foreign)} modules that are no down-projection, such as"
            f" {foreign[0]}; it is not a LoKI adapter of this model"
        )
    layers = {names[m]: m for m in modules}
    bare = [i for i, rows in enumerate(selection.rows) if len(rows) and i not in layers]
    if bare:
        raise ValueError(f"the rows file selects rows in layers {bare} that the adapter lacks")
    return layers


def check_rows(lora, layers: dict[int, str], selection: RowSelection) -> None:
    for i, module in sorted(layers.items()):
        a, b = (lora.get_tensor(f"{module}.lora_{x}.weight") for x in "AB")
        for name, matrix in (("lora_A", a), ("lora_B", b)):
            if not torch.isfinite(matrix).all():
                raise ValueError(
                    f"layer {i}: the adapter's {name} holds NaN or Inf; its training went wrong"
                )
        outside = rows_outside(b, selection.rows[i])
        if outside:
            raise ValueError(
                f"layer {i}: the adapter changes row {outside[0]}, which the rows file does not"
                " select; use the loki_rows.json that stands beside the adapter"
            )
