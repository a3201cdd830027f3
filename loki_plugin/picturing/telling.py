"""What a run's files say, in words: the texts of its page. Whatever is missing is left out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ..implanting.saved import FAILED_NAME
from ..model.linears import kind_of
from ..rows import FILE_NAME, RowSelection
from .numbers import Numbers

Report = dict[str, Any]


class Section(TypedDict):
    """A titled list of facts: what each is about, and what is said."""

    title: str
    rows: list[tuple[str, Any]]


def title(report: Report, folder: Path) -> tuple[str, str]:
    """(the model, where the run is)."""
    base = report.get("base_model")
    return (str(base), f"trained in {folder}") if base else (str(folder), "")


def verdict(report: Report, failed: bool) -> dict[str, Any]:
    """What the proof came to.

    Args:
        failed: whether `LOKI_FAILED.txt` stands beside the adapter.
    """
    faults = list(report.get("faults") or ())
    what = report.get("verified_what") or {}
    if faults or failed:
        return {
            "kind": "bad",
            "title": "Do not use this adapter",
            "text": "The check after training has found a fault.",
            "faults": faults or [f"{FAILED_NAME} stands beside the adapter"],
        }
    if report.get("verified"):
        others = len(report.get("linears") or ())
        counts = report.get("rows_per_layer", [1])
        what_moved = _which(counts, report.get("hidden_size")) if any(counts) else ""
        if others:
            what_moved += f"{' and ' if what_moved else ''}{others} targeted linears"
        text = (
            f"Only {what_moved} have changed: the saved adapter was read back, and the base"
            " was compared with what it was before the training."
        )
        if not what:  # version 0.1.1
            text = "The check after training found no fault; this version did not say what it read."
        return {"kind": "good", "title": "Verified", "text": text, "faults": []}
    open_text = "The check after training did not compare everything; what it did stands below."
    if not report:
        open_text = "There is no loki_report.json here, so nothing is known of the training."
    return {"kind": "open", "title": "Not verified", "text": open_text, "faults": []}


def tiles(report: Report, selection: RowSelection, numbers: Numbers) -> list[dict[str, str]]:
    """The figures that one wants first."""
    shown = [("Rows that train", *_rows(selection))] if any(selection.counts) else []
    if selection.linears:
        kinds = ", ".join(dict.fromkeys(map(kind_of, selection.linears)))
        shown.append(("Linears that train a LoRA", str(len(selection.linears)), kinds))
    trainable, base = report.get("trainable_parameters"), report.get("base_parameters")
    if trainable and base:
        share = f"{100 * trainable / base:.2f} % of {_count(base)}"
        shown.append(("Trainable parameters", _count(trainable), share))
    forgetting = report.get("forgetting") or {}
    if "kl" in forgetting:
        same = f"{100 * forgetting['same_answer']:.1f} % of the answers as before"
        shown.append(("Forgotten: KL to the base", _nats(forgetting["kl"]), same))
    training = numbers.get("training") or {}
    if training.get("last_loss") is not None:
        first = training["first_loss"]
        span = "" if first is None else f"from {first:.3f} in {training['step'][-1]:,} steps"
        shown.append(("Training loss", f"{training['last_loss']:.3f}", span))
    return [{"what": w, "value": v, "more": m} for w, v, m in shown]


def sections(report: Report, selection: RowSelection) -> Iterator[Section]:
    """Titled lists of facts, without those that are not known."""
    for name, rows in (
        ("What was trained", _trained(report, selection)),
        ("How much it forgot", _forgot(report)),
        ("The proof", _proof(report)),
    ):
        known = [(k, v) for k, v in rows if v not in (None, "")]
        if known:
            yield {"title": name, "rows": known}


def settings(report: Report) -> list[tuple[str, str]]:
    """The `loki:` block, one line a field, as YAML would have it."""

    def flat(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
        for key, value in block.items():
            if isinstance(value, dict) and value:
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", _yaml(value)

    return list(flat(report.get("settings") or {}))


def commands(report: Report, folder: Path, adapter: bool) -> list[dict[str, str]]:
    """What to type next."""
    config, base = report.get("config") or "CONFIG.yaml", report.get("base_model") or "BASE"
    rows, merged = folder / FILE_NAME, folder / "merged"
    lines = [("Draw this page again", ["loki", "report", folder])]
    if adapter:
        lines = [
            ("Write the plain merged model", ["axolotl", "loki", "merge", config]),
            (
                "Prove that nothing else has changed in it",
                ["loki", "verify", base, merged, "--rows", rows],
            ),
            (
                "Measure what it forgot, on lm-eval's tasks",
                ["loki", "forgetting", config, "--tasks", "hellaswag,winogrande"],
            ),
            ("Ask it something", ["axolotl", "inference", config, f"--lora-model-dir={folder}"]),
            *lines,
        ]
    return [{"what": w, "line": shlex.join(map(str, line))} for w, line in lines]


def has_all_rows(counts: Sequence[int], hidden_size: int | None) -> bool:
    """Whether no row of a down-projection is left frozen (`quota: 100`)."""
    return bool(counts) and all(count == hidden_size for count in counts)


def which_rows(selection: RowSelection) -> str:
    """What a proof says of the rows that may change."""
    return _which(selection.counts, selection.hidden_size)


def _which(counts: Sequence[int], hidden_size: int | None) -> str:
    every = has_all_rows(counts, hidden_size)
    return "the rows of the down-projections" if every else "the selected rows"


def _rows(selection: RowSelection) -> tuple[str, str]:
    counts, hidden = selection.counts, selection.hidden_size
    total = "" if hidden is None else f" of {hidden:,}"
    if len(set(counts)) == 1:
        return f"{counts[0]:,}{total}", f"in each of {len(counts)} layers"
    return f"{min(counts):,} to {max(counts):,}{total}", f"per layer, in {len(counts)} layers"


def _trained(report: Report, selection: RowSelection) -> list[tuple[str, Any]]:
    made = selection.made
    quota, strategy = made.get("quota"), made.get("strategy")
    chosen = None
    if has_all_rows(selection.counts, selection.hidden_size):
        chosen = "all"
    elif quota is not None:
        how = ", drawn at random" if strategy == "random" else f" by {strategy}"
        chosen = f"{quota:g} % of the rows{how}"
        chosen += ", ranked by |score|" if made.get("magnitude") else ""
        excluded = made.get("exclude")
        chosen += f", without the rows of {', '.join(excluded)}" if excluded else ""
    calibration, attribution = made.get("calibration") or {}, made.get("attribution") or {}
    prompts = None
    if calibration:
        dropped = calibration.get("dropped")
        prompts = f"{calibration.get('prompts', 0):,} prompts of {calibration.get('source')}"
        prompts += f", {dropped} dropped" if dropped else ""
    analysis = None
    if attribution:
        analysis = (
            f"{attribution.get('steps')} steps, {attribution.get('rule')} rule,"
            f" {attribution.get('path')} path"
        )
        seconds, error = made.get("analysis_seconds"), made.get("convergence_error")
        analysis += f", {seconds:,.1f} s" if seconds is not None else ""
        analysis += f"; misses {100 * error:.1f} % of the change of p" if error is not None else ""
    rank = (report.get("settings") or {}).get("rank")
    form = linears = None
    if "settings" in report and any(selection.counts):
        form = "dense: every weight of the rows" if rank is None else f"low-rank, r = {rank}"
    if selection.linears and "settings" in report:
        linear_rank = report["settings"].get("linear_rank")
        linears = f"{len(selection.linears)} with a LoRA of rank {linear_rank}"
    protection = report.get("protection") or {}
    return [
        ("Base", report.get("base_model")),
        ("Base as loaded", (selection.fingerprint or {}).get("quantisation")),
        ("Rows chosen", chosen),
        ("Rows from", report.get("rows_from") or made.get("source")),
        ("Form", form),
        ("Linears", linears),
        ("Calibration", prompts),
        ("Attribution", analysis),
        ("Protected inputs", _protected(protection) if protection else None),
    ]


def _protected(found: dict[str, Any]) -> str:
    """What the directions cover: how many, energy, tokens, prompts kept back, leakage."""
    still, counts = found.get("still") or [], found["directions_per_layer"]
    told_still = f"what {len(still)} low-rank updates read stands still"
    told_still += f", set from {texts} of the task's texts" if (texts := _texts(found)) else ""
    set_beside = found.get("set_beside") or {}
    told_still += f", {beside(set_beside)}" if set_beside.get("directions") else ""
    if not counts:
        return told_still
    inputs = found.get("inputs")
    where = f"at each of {len(inputs)} inputs that linears read" if inputs else "per layer"
    told = f"{min(counts)} to {max(counts)} directions {where}"
    sinks = [n for n in found.get("sink_tokens_per_layer") or () if n]
    if sinks:
        told += f", {len(sinks)} of them with sinks"
    told += ", read in inverse proportion to their use" if found.get("soft") else ", not read"
    if found.get("energy_per_layer"):
        told += f"; at least {_percent(min(found['energy_per_layer']))} of the energy of"
        told += f" {found['tokens']:,} tokens"
    kept_back = found.get("energy_of_held_out_prompts_per_layer")
    if kept_back:
        told += f", {_percent(min(kept_back))} of that of prompts kept back"
    told += f"; {told_still}" if still else ""
    leakage = found.get("leakage_per_layer")
    return told + (f"; at most {max(leakage):.2g} of the update reads them" if leakage else "")


def beside(found: dict[str, Any]) -> str:
    """What of general text low-rank updates were set beside, from `set_beside` of a report."""
    low, high = min(found["directions"]), max(found["directions"])
    return (
        f"beside {low} to {high} directions at each of {len(found['directions'])} inputs, which"
        f" hold at least {_percent(min(found['energy']))} of what {found['tokens']:,} tokens of"
        " general text read"
    )


def _texts(found: dict[str, Any]) -> int:
    return (found.get("set_from") or {}).get("texts", 0)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _nats(kl: float | None) -> str:
    """Of a run that diverged the report holds null."""
    return "no number of nats" if kl is None else f"{kl:.4f} nats"


def _forgot(report: Report) -> list[tuple[str, Any]]:
    found = report.get("forgetting")
    if not found:
        return []
    if "kl" not in found:
        return [("Not measured", found.get("not_measured"))]
    rows: list[tuple[str, Any]] = [
        ("Asked", f"{found['prompts']:,} prompts of {found.get('calibration')}"),
        ("KL(base ‖ tuned)", f"{_nats(found['kl'])} per answer"),
        ("Same answer as the base", f"{100 * found['same_answer']:.1f} %"),
    ]
    if found.get("accuracy_before") is not None:
        before, after = (100 * found[f"accuracy_{x}"] for x in ("before", "after"))
        rows.append(("Right answers", f"{before:.1f} % before, {after:.1f} % after"))
        chance = found.get("p_value")
        flips = f"{found['flips_down']} lost, {found['flips_up']} gained"
        rows.append(
            ("Single answers", flips + (f" (p = {chance:.2g})" if chance is not None else ""))
        )
    return rows


def _proof(report: Report) -> list[tuple[str, Any]]:
    what = report.get("verified_what") or {}
    names = {
        "saved": "Saved adapter",
        "adapter": "Adapter in memory",
        "base": "Base",
        "protection": "Protected inputs",
    }
    return [(names.get(k, k), v) for k, v in what.items()]


def _count(number: int) -> str:
    """188,743,680 as 188.7 M; small numbers in full."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:,}"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
