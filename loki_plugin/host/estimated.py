"""The estimate as a reader wants it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .telling import Line, block, duration

_PARTS = {
    "weights_bytes": "base",
    "adapter_bytes": "adapter",
    "optimizer_bytes": "optimizer",
    "directions_bytes": "protected directions",
}


def text(base: str, facts: Mapping[str, Any]) -> str:
    """The figures of `Estimator.facts`, a line per subject."""
    card, analysis, training = facts["card"], facts["analysis"], facts["training"]
    disk, counts = facts["disk"], facts["rows_per_layer"]
    trained, whole = facts["trainable_parameters"], facts["base_parameters"]
    each = "none"
    if any(counts):
        each = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        each += f" in each of {len(counts)} layers"
    lines = [
        ("base", f"{base}, {whole:,} parameters"),
        ("rows", each),
        ("trainable", f"{trained:,} parameters, {100 * trained / whole:.3f} %"),
        *_of_analysis(analysis),
        *_of_training(training),
        ("disk", f"adapter {size(disk['adapter_bytes'])}, scores {size(disk['score_log_bytes'])}"
         + _directions(disk["directions_bytes"])),
        (f"{card['gigabytes']} GB card", _verdict(card)),
        *(("assumed", line) for line in facts["assumed"]),
    ]  # fmt: skip
    return block("estimate, a prediction: nothing was run", lines)


def _of_analysis(analysis: Mapping[str, Any]) -> list[Line]:
    finding = ""
    if "finding_directions_bytes" in analysis:
        held = size(analysis["finding_directions_bytes"])
        finding = f"finding directions {held}: {_times(analysis['finding_directions_seconds'])}"
    if not analysis["prompts"]:
        none = ("analysis", "none: no rows are chosen by scores")
        return [none, ("", finding)] if finding else [none]
    found = f"{size(analysis['bytes'])} with {analysis['batch_size']} prompts at once"
    if analysis["batch_size"] > 1:
        found += f", {size(analysis['least_bytes'])} with one"
    prompts = f"{analysis['prompts']} prompts of up to {analysis['longest_prompt_tokens']} tokens"
    lines = [("analysis", found), ("", f"{prompts}: {_times(analysis['seconds'])}")]
    return [*lines, ("", finding)] if finding else lines


def _of_training(training: Mapping[str, Any]) -> list[Line]:
    parts = [f"{name} {size(training[key])}" for key, name in _PARTS.items() if training[key]]
    moments = training["activations_bytes"]
    moment = max(moments, key=moments.__getitem__)
    parts.append(f"activations {size(moments[moment])} (most at the {moment})")
    lines = [
        ("training", f"{size(training['bytes'])}: {', '.join(parts)}"),
        ("", f"one step: {_times(training['step_seconds'])}"),
    ]
    if not training["optimizer_known"]:
        lines.append(("", "the optimizer is not known here: two float32 states are counted"))
    return lines


def _directions(count: int) -> str:
    return f", directions up to {size(count)}" if count else ""


def _verdict(card: Mapping[str, Any]) -> str:
    names = [name for name in ("analysis", "training") if not card[name]]
    if not names:
        return "analysis and training fit"
    lines = ", ".join(f"`{line}`" for line in card["change"])
    what = " and ".join(names)
    if card["then_fits"]:
        return f"{what}: too large; with {lines} both fit"
    tried = f" with {lines}" if lines else ""
    return f"{what}: too large, also{tried}; take a smaller model or a larger card"


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{card} {duration(value)}" for card, value in seconds.items())


def size(count: float) -> str:
    """Bytes as a reader says them, in powers of ten, as cards are sold."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
