"""A saved adapter as merging and verifying read it: a plain LoRA, confined to its rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from ..model.anatomy import TOWER
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
        layers: layer -> the name of its down-projection in the file.
        linears: names in the file of the further linears that it changes.
        scalings: name in the file -> alpha/r.
    """

    folder: Path
    selection: RowSelection
    lora: Any
    layers: dict[int, str]
    linears: list[str]
    scalings: dict[str, float]

    def update(self, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """(alpha/r · B A)[rows] of a down-projection, [k, I], in `dtype`."""
        return self._update(self.layers[layer], dtype, self.selection.rows[layer])

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """alpha/r · B A of a further linear, [out, in], in `dtype`."""
        return self._update(f"{PREFIX}{name}", dtype)

    def _update(
        self, module: str, dtype: torch.dtype, rows: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        a, b = (self.lora.get_tensor(f"{module}.lora_{x}.weight") for x in "AB")
        return self.scalings[module] * (b[rows].to(dtype) @ a.to(dtype))


@contextmanager
def opened(adapters: Sequence[Adapter], names: list[str]) -> Iterator[list[Opened]]:
    """Open adapters and check them.

    Args:
        names: of the L down-projections.

    Raises:
        ValueError: no plain LoRA on the down-projections; a failed check of its training; NaN or
            Inf; non-zero rows of B outside its selection; a configuration of another run.
    """
    with ExitStack() as files:
        found = []
        for adapter in adapters:
            _check_mark(adapter.folder)
            config = _lora_config(adapter.folder)
            lora = files.enter_context(open_tensors(adapter.folder / WEIGHTS))
            lora, config = respelled(lora, config, names)
            layers, linears = adapted_layers(lora.keys(), names, adapter.selection)
            check_rows(lora, layers, adapter.selection)
            _check_finite(lora, linears)
            modules = [*layers.values(), *linears]
            for m in modules:
                _check_config(adapter.folder, config, m.removeprefix(PREFIX), _rank(lora, m))
            scalings = {
                m: _scaling(config, m.removeprefix(PREFIX), _rank(lora, m)) for m in modules
            }
            found.append(Opened(adapter.folder, adapter.selection, lora, layers, linears, scalings))
        yield found


def check_disjoint(adapters: Sequence[Adapter]) -> None:
    """Check that no row, and no further linear, is changed by two adapters.

    Raises:
        ValueError: the first two that share some; layer and rows, or the linear, are named.
    """
    for n, one in enumerate(adapters):
        for other in adapters[n + 1 :]:
            both = [x for x in one.selection.linears if x in other.selection.linears]
            if both:
                raise ValueError(
                    f"adapters '{one.folder}' and '{other.folder}' both change {both[0]}, and"
                    f" {len(both) - 1} more linears; neither was trained with the other's update"
                    " there. Train one of them on the other's merged model, or with"
                    " `targets: down`, or ask for the sum of their updates with --sum-overlaps"
                )
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


def _check_config(folder: Path, config: dict, name: str, r: int) -> None:
    """Axolotl writes a run's configuration before it trains, and its weights at the end: a run that
    died in the folder of another has left its own beside the other's weights, and another scale."""
    pattern = config.get("rank_pattern") or {}
    told = pattern.get(get_pattern_key(pattern.keys(), name), config["r"])
    if told != r:
        raise ValueError(
            f"'{folder / CONFIG}' is of another run than the weights beside it: it gives {name}"
            f" rank {told}, and they have {r}. A run that was stopped, or one that trains now, has"
            " written it there; take the last checkpoint, or train again into a folder of its own"
        )


def _scaling(config: dict, name: str, r: int) -> float:
    pattern = config.get("alpha_pattern") or {}
    return pattern.get(get_pattern_key(pattern.keys(), name), config["lora_alpha"]) / r


def _rank(lora, module: str) -> int:
    return lora.get_slice(f"{module}.lora_A.weight").get_shape()[0]


class _Respelled:
    """An open adapter whose keys begin as the model's do."""

    def __init__(self, lora: Any, theirs: str, ours: str):
        self._lora, self._theirs, self._ours = lora, f"{PREFIX}{theirs}", f"{PREFIX}{ours}"

    def keys(self) -> list[str]:
        return [self._changed(k, self._theirs, self._ours) for k in self._lora.keys()]

    def get_tensor(self, key: str) -> torch.Tensor:
        return self._lora.get_tensor(self._changed(key, self._ours, self._theirs))

    def get_slice(self, key: str) -> Any:
        return self._lora.get_slice(self._changed(key, self._ours, self._theirs))

    @staticmethod
    def _changed(key: str, old: str, new: str) -> str:
        return new + key.removeprefix(old) if key.startswith(old) and ".lora_" in key else key


def respelled(lora: Any, config: dict, names: list[str]) -> tuple[Any, dict]:
    """An adapter as if its modules were called as in `names`.

    The text model of a checkpoint for images and text has other names alone than inside of it
    (`model.layers.0.` and `model.language_model.layers.0.`); an adapter has the one or the other.

    Args:
        names: of the L down-projections.
    """
    modules = {k.rpartition(".lora_")[0].removeprefix(PREFIX) for k in lora.keys() if ".lora_" in k}
    tails = {tail(name) for name in names}
    heads = {m.removesuffix(tail(m)) for m in modules if tail(m) in tails}
    if modules & set(names) or len(heads) != 1 or TOWER.search(min(heads)):
        return lora, config
    theirs, ours = heads.pop(), names[0].removesuffix(tail(names[0]))
    patterns = {
        field: {
            ours + k.removeprefix(theirs) if k.startswith(theirs) else k: value
            for k, value in (config.get(field) or {}).items()
        }
        for field in ("alpha_pattern", "rank_pattern")
    }
    return _Respelled(lora, theirs, ours), config | patterns


def tail(name: str) -> str:
    """From the list of layers on."""
    found = re.search(r"[^.]+\.\d+\..*", name)
    return found.group() if found else name


def adapted_layers(
    keys, down: list[str], selection: RowSelection
) -> tuple[dict[int, str], list[str]]:
    """Of an adapter's keys: the down-projection of each layer, and the further linears.

    Raises:
        ValueError: a module that the rows file does not name, or one that the adapter lacks.
    """
    names = {f"{PREFIX}{name}": i for i, name in enumerate(down)}
    linears = [f"{PREFIX}{name}" for name in selection.linears]
    modules = {key.rpartition(".lora_")[0] for key in keys if ".lora_" in key}
    foreign = sorted(m for m in modules if m not in names and m not in linears)
    if foreign:
        raise ValueError(
            f"the adapter changes {len(foreign)} modules that the rows file does not name, such as"
            f" {foreign[0]}; it is not a LoKI adapter of this model, or not the one of these rows"
        )
    missing = [m for m in linears if m not in modules]
    if missing:
        raise ValueError(f"the rows file names {missing[0]}, which the adapter lacks")
    layers = {i: m for m, i in names.items() if m in modules}
    bare = [i for i, rows in enumerate(selection.rows) if len(rows) and i not in layers]
    if bare:
        raise ValueError(f"the rows file selects rows in layers {bare} that the adapter lacks")
    return layers, linears


def _check_finite(lora, modules: Sequence[str]) -> None:
    for module in modules:
        for x in "AB":
            if not torch.isfinite(lora.get_tensor(f"{module}.lora_{x}.weight")).all():
                raise ValueError(
                    f"{module.removeprefix(PREFIX)}: the adapter's lora_{x} holds NaN or Inf; its"
                    " training went wrong"
                )


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
