"""What a run says: one block per stage, the same in the log and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysing.pace import duration
from ..picturing.telling import has_all_rows
from ..rows import RowSelection

Line = tuple[str, str]  # what it is about, and what is said
_WIDTH = 12


def block(title: str, lines: Sequence[Line]) -> str:
    """A stage's block: its title, and under it a line per subject."""
    told = [f"  {subject:<{_WIDTH}}{text}" for subject, text in lines]
    return "\n".join([f"loki: {title}", *told])


def about_rows(selection: RowSelection, source: str) -> list[Line]:
    """Where the rows come from and how they were chosen.

    Args:
        source: "analysis", "no analysis", or the file or adapter that the rows were read from.
    """
    made = selection.made
    lines = [("from", _analysis(made) if source == "analysis" else source)]
    if has_all_rows(selection.counts, selection.hidden_size):
        lines.append(("chosen", "every row of the down-projections"))
    elif "strategy" in made and any(selection.counts):
        how = [f"quota {made.get('quota')} %", str(made["strategy"])]
        how += ["by |score|"] if made.get("magnitude") else []
        excluded = made.get("exclude")
        how += [f"without the rows of {', '.join(excluded)}"] if excluded else []
        lines.append(("chosen", ", ".join(how)))
    lines.append(("rows", _counts(selection)))
    error, settings = made.get("convergence_error"), made.get("attribution") or {}
    if error is not None:
        steps, rule = settings.get("steps"), settings.get("rule")
        share = f"{100 * error:.1f} % of the change of p that they divide up"
        lines.append(("scores", f"they miss {share} ({steps} steps, {rule} rule)"))
    return lines


def _analysis(made: Mapping[str, Any]) -> str:
    calibration = made.get("calibration") or {}
    count, new = calibration.get("prompts", 0), made.get("prompts_analysed", 0)
    dropped = calibration.get("dropped")
    source = f"{calibration.get('source')}" + (f", {dropped} too long" if dropped else "")
    if not new:
        how = "taken from the cache"
    else:
        seconds = made.get("analysis_seconds") or 0.0
        how = f"made now in {duration(seconds)}, {new / max(seconds, 1e-3):.1f} prompts/s"
        how += f", the other {count - new} from the cache" if new < count else ""
    return f"analysis {made.get('analysis')} of {count} prompts ({source}), {how}"


def _counts(selection: RowSelection) -> str:
    counts, hidden = selection.counts, selection.hidden_size
    if not any(counts):
        why = "`targets` names no down-projection" if counts else "no layer has a down-projection"
        return f"none: {why}"
    same = len(set(counts)) == 1
    each = f"{counts[0]}" if same else f"{min(counts)} to {max(counts)}"
    return f"{each} of {hidden} in each of {selection.num_layers} layers"


def about_training(
    selection: RowSelection, rank: int | None, trainable: int, base: int
) -> list[Line]:
    """What will train, and how much of the model that is."""
    form = "dense: every selected row trains freely"
    if rank is not None:
        form = f"low-rank: the selected rows train together, rank {rank}"
    kinds = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in selection.linears))
    linears = [("linears", f"{len(selection.linears)} with a LoRA: {kinds}")] if kinds else []
    rows = [("form", form), ("rows", f"{sum(selection.counts):,} in all")]
    return [
        *(rows if any(selection.counts) else []),
        *linears,
        ("trainable", f"{trainable:,} parameters, {100 * trainable / base:.3f} % of {base:,}"),
        ("frozen", "all the rest; it is compared again after training"),
    ]


# What may lie in output_dir after a run, and what it is.
FILES = {
    "adapter_model.safetensors": "the adapter, an ordinary LoRA",
    "loki_rows.json": "its rows",
    "loki_directions.safetensors": "what it does not read",
    "loki_report.json": "settings, figures, verdict",
    "loki_report.html": "the same to look at; it opens offline",
    "LOKI_FAILED.txt": "why it must not be used",
}


def about_files(folder: Path) -> list[Line]:
    """The files that are there, each with what it is."""
    found = {name: what for name, what in FILES.items() if (folder / name).is_file()}
    if not found:
        return []
    longest = max(map(len, found))
    lines = [("files", f"in {folder}")]
    return [*lines, *(("", f"{name:<{longest}}  {what}") for name, what in found.items())]


def about_end(
    what: Mapping[str, str], forgotten: str, folder: Path, config: str, stopped: str = ""
) -> list[Line]:
    """What was compared, how much was forgotten, where the files are, and what to type next.

    Args:
        what: per thing, what was compared of it; see `Verdict.what`.
        config: the run's YAML, as the user named it.
        stopped: why the training ended early, where it did for what was forgotten.
    """
    return [
        *what.items(),
        *([("stopped", stopped)] if stopped else []),
        ("forgotten", forgotten),
        *about_files(folder),
        ("next", f"loki merge {config}       the plain merged model, and the proof of its rows"),
        ("", f"loki forgetting {config}  what it lost, on lm-eval's tasks with --tasks"),
    ]
