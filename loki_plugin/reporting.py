"""What a run leaves behind for its reader: `loki_report.json`, and a mark where it failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .args import LokiConfig
from .implanting.saved import FAILED_NAME, REPORT_NAME
from .model.writing import json_text, write_text
from .rows import FILE_NAME, RowSelection


@dataclass
class Verdict:
    """What was compared after training, and what came of it.

    Attributes:
        what: per thing (`adapter`, `base`, `saved`) what was compared, or why it was not.
        left_out: the things that were not compared.
        faults: one sentence for each fault that was found.
    """

    what: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        """Everything was compared, and no fault was found."""
        return bool(self.what) and not self.faults and not self.left_out


def write_report(
    folder: Path,
    config: LokiConfig,
    selection: RowSelection,
    facts: dict[str, Any],
    verdict: Verdict,
) -> Path:
    """Write the settings, the selection in numbers, the facts and the verdict; returns the path."""
    share = facts["trainable_parameters"] / facts["base_parameters"]
    report = {
        "versions": {p: version(p) for p in ("loki_plugin", "axolotl", "peft", "transformers")},
        "settings": config.model_dump(mode="json"),
        "rows_file": FILE_NAME,
        "num_layers": selection.num_layers,
        "hidden_size": selection.hidden_size,
        "rows_per_layer": selection.counts,
        "linears": list(selection.linears),
        "trainable_percent": round(100 * share, 4),
        "verified": verdict.verified,
        "verified_what": verdict.what,
        "faults": verdict.faults,
        **facts,
        "selection": selection.made,
    }
    path = folder / REPORT_NAME
    write_text(path, json_text(report) + "\n")
    return path


def mark(folder: Path, verdict: Verdict) -> None:
    """Put a mark beside an adapter that must not be used, or take away that of an earlier run."""
    path = folder / FAILED_NAME
    if not verdict.faults:
        path.unlink(missing_ok=True)
        return
    lines = ["The adapter in this folder failed loki's check; do not use it.", *verdict.faults]
    write_text(path, "\n".join(lines) + "\n")
