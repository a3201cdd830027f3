"""A saved adapter as a LoRA of a smaller rank: for servers, which do not take any rank.

The dense form has the rank k of its rows, some hundreds or thousands. Of each ΔW the largest R
singular values are kept: of all updates of that rank this one is nearest to ΔW (Eckart, Young).
What it reads lies in the span of what ΔW reads, so that protected directions stay unread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ..model.linears import PREFIX
from ..model.writing import write_text
from ..protecting.directions import FILE_NAME as DIRECTIONS_NAME
from ..rows import FILE_NAME, Made, RowSelection
from .adapters import CONFIG, Adapter, Opened, opened
from .checkpoint import copy_files, open_tensors
from .output import check_output, writing_to
from .saved import WEIGHTS
from .tokenizer_files import FILES as TOKENIZER_FILES


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what of the update is lost in it.

    Attributes:
        output: where the adapter is.
        rank: of every module of it.
        of_rank: the largest rank of the adapter that it was made from.
        lost: per module that trains ‖ΔW - ΔW_R‖²/‖ΔW‖², as saved; 0 where nothing was trained.
        lost_share: the same over all modules: Σ‖ΔW - ΔW_R‖²/Σ‖ΔW‖².
        measured: what `measure` said of it.
    """

    output: Path
    rank: int
    of_rank: int
    lost: dict[str, float]
    lost_share: float
    measured: dict[str, Any]

    def text(self) -> str:
        worst = max(self.lost, key=self.lost.__getitem__)
        return (
            f"rank {self.of_rank} -> {self.rank}: {_percent(self.lost_share)} of ‖ΔW‖² is lost,"
            f" {_percent(min(self.lost.values()))} to {_percent(self.lost[worst])} in single"
            f" modules ({worst} loses most)\nadapter in {self.output}"
        )


def export(
    adapter: str | Path,
    output: str | Path,
    rank: int,
    progress: bool = True,
    measure: Callable[[Path], dict[str, Any]] | None = None,
) -> ExportReport:
    """Write the adapter of rank `rank` that is nearest to a saved one, on the same rows.

    ΔW = U S Vᵀ in float64; B[rows] = U_R √S_R, A = √S_R V_Rᵀ, rounded to the adapter's dtype. Rows
    of B outside the selection are zero. Every module gets the same rank, with zeros behind those
    that need less, and alpha = r, so that no server has to know of patterns. The base is not
    needed.

    Args:
        adapter: the folder of a LoKI adapter: dense or low-rank, protected or not.
        output: a folder that is not there yet, or empty. Rows file, directions, tokenizer and the
            embeddings of new tokens go with it.
        measure: asked about the finished adapter before it stands at `output`; what it returns
            goes into the rows file beside what was lost.

    Raises:
        ValueError: a folder without a sound LoKI adapter, `rank` < 1 or above the adapter's, or an
            output folder that is not empty.
    """
    folder, output = Path(adapter), Path(output)
    check_output(output)
    if not (folder / FILE_NAME).is_file():
        raise ValueError(
            f"'{folder}' is no LoKI adapter: it has no {FILE_NAME}; give the output_dir of a run"
        )
    source = Adapter.load(folder)
    selection = source.selection
    names = _down_names(folder, selection)
    with opened([source], names) as (part,), writing_to(output) as partial:
        modules = {part.layers[i]: selection.rows[i] for i in sorted(part.layers)}
        modules |= {module: _all_rows(part, module) for module in part.linears}
        of_rank = max(_shape(part, module, "A")[0] for module in modules)
        if not 1 <= rank <= of_rank:
            raise ValueError(
                f"rank {rank}: the adapter in '{folder}' has rank {of_rank}; give 1 to {of_rank}"
            )
        state = {k: part.lora.get_tensor(k) for k in part.lora.keys() if ".lora_" not in k}
        updates, errors = {}, {}
        for module, rows in tqdm(modules.items(), desc="loki: truncating", disable=not progress):
            b, a, update, error = _truncated(part, module, rows, rank)
            state |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            name = module.removeprefix(PREFIX)
            updates[name], errors[name] = update, error
        save_file(state, partial / WEIGHTS, {"format": "pt"})
        _write_config(folder, partial, rank)
        copy_files(folder, partial, (DIRECTIONS_NAME, *TOKENIZER_FILES))
        lost = {name: errors[name] / u if u else 0.0 for name, u in updates.items()}
        whole = sum(updates.values())
        lost_share = sum(errors.values()) / whole if whole else 0.0
        facts = {"rank": rank, "of_rank": of_rank, "lost_share": lost_share, "lost": lost}
        _save_rows(selection, partial, facts)
        measured = measure(partial) if measure else {}
        _save_rows(selection, partial, facts | measured)
    return ExportReport(output, rank, of_rank, lost, lost_share, measured)


def truncate(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the product of rank `rank` that is nearest to b a, each with half of it.

    Args:
        b: [k, r] float64.
        a: [r, I] float64.

    Returns:
        [k, m] and [m, I], m = min(rank, k, r, I).
    """
    # b a = Q1 (R1 R2ᵀ) Q2ᵀ, so only the small matrix inside is decomposed.
    (q1, r1), (q2, r2) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (q1 @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ q2.T)


def _truncated(
    part: Opened, module: str, rows: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """(B [H, rank], A [rank, I], ‖ΔW‖², ‖ΔW - B A‖²) of one module."""
    a, b = (part.lora.get_tensor(f"{module}.lora_{x}.weight") for x in "AB")
    wide_a, wide_b = a.double(), part.scalings[module] * b[rows].double()
    if a.shape[0] <= rank and part.scalings[module] == 1:
        small_b, small_a = wide_b, wide_a  # nothing is to be taken away, nor rounded
    else:
        small_b, small_a = truncate(wide_b, wide_a, rank)
    new_a = a.new_zeros(rank, a.shape[1])
    new_b = b.new_zeros(b.shape[0], rank)
    new_a[: len(small_a)] = small_a.to(a.dtype)
    new_b[rows, : len(small_a)] = small_b.to(b.dtype)
    update = wide_b @ wide_a
    error = update - new_b[rows].double() @ new_a.double()
    return new_b, new_a, float(update.square().sum()), float(error.square().sum())


def _down_names(folder: Path, selection: RowSelection) -> list[str]:
    """The names of the L down-projections, as far as the adapter has them; "" without rows.

    Raises:
        ValueError: the adapter changes other modules than the rows file has layers with rows.
    """
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"'{folder}' is no saved LoRA adapter: it has no {WEIGHTS}")
    with open_tensors(folder / WEIGHTS) as stored:
        modules = {k.rpartition(".lora_")[0].removeprefix(PREFIX) for k in stored.keys()}
    found = sorted(modules - {""} - {*selection.linears}, key=_numbers)
    layers = [i for i, rows in enumerate(selection.rows) if len(rows)]
    if len(found) != len(layers):
        raise ValueError(
            f"the adapter in '{folder}' changes {len(found)} modules besides the linears that its"
            f" rows file names, which has rows in {len(layers)} layers; they do not belong together"
        )
    names = [""] * selection.num_layers
    for i, name in zip(layers, found, strict=True):
        names[i] = name
    return names


def _numbers(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name)]


def _shape(part: Opened, module: str, factor: str) -> tuple[int, ...]:
    return tuple(part.lora.get_slice(f"{module}.lora_{factor}.weight").get_shape())


def _all_rows(part: Opened, module: str) -> torch.Tensor:
    return torch.arange(_shape(part, module, "B")[0])


def _write_config(folder: Path, output: Path, rank: int) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    write_text(output / CONFIG, json.dumps(config, indent=2) + "\n")


def _save_rows(selection: RowSelection, output: Path, facts: dict[str, Any]) -> None:
    made = Made(**{**selection.made, "export": facts})
    replace(selection, made=made).save(output / FILE_NAME)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
