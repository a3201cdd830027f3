"""What a run leaves behind for its reader: `loki_report.json`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .args import LokiConfig
from .rows import FILE_NAME, RowSelection

REPORT_NAME = "loki_report.json"


def write_report(
    folder: Path, config: LokiConfig, selection: RowSelection, facts: dict[str, Any]
) -> Path:
    """Write the settings, the selection in numbers and the facts of the run; returns the path."""
    share = facts["trainable_parameters"] / facts["base_parameters"]
    report = {
        "versions": {p: version(p) for p in ("loki_plugin", "axolotl", "peft", "transformers")},
        "settings": config.model_dump(mode="json"),
        "rows_file": FILE_NAME,
        "num_layers": selection.num_layers,
        "hidden_size": selection.hidden_size,
        "rows_per_layer": selection.counts,
        "trainable_percent": round(100 * share, 4),
        "verified": True,  # a violation raises before the report is written
        **facts,
        "selection": selection.made,
    }
    path = folder / REPORT_NAME
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path
