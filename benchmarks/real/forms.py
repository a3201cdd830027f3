"""Forms of what an update reads, by their bytes: what does a smaller one lose?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.real import matching
from benchmarks.real.lab import Lab
from benchmarks.writer import RESULTS, command, table, write
from loki_plugin.protecting.packed import BYTES

# Bytes of the form for one input: of V [I, u] in float32, or of P - I in so many bits.
_FORMS: dict[str, tuple[str, Callable[[torch.Tensor], float]]] = {
    "lora_soft": ("V, 99 % of the energy, float32", lambda v: 4 * v.numel()),
    "form_bf16": ("the same in bfloat16", lambda v: 2 * v.numel()),
    "form_v8": ("the same in 8 bits, as on a card", lambda v: BYTES * v.numel()),
    "form_half": ("V of the I/2 leading directions, float32", lambda v: 4 * _leading(v, 2)),
    "form_quarter": ("V of the I/4 leading directions, float32", lambda v: 4 * _leading(v, 4)),
    "form_v8_quarter": ("the same in 8 bits, as on a card", lambda v: BYTES * _leading(v, 4)),
    "form_sixth": ("V of the I/6 leading directions, float32", lambda v: 4 * _leading(v, 6)),
    "form_eighth": ("V of the I/8 leading directions, float32", lambda v: 4 * _leading(v, 8)),
    "form_8bit": ("P - I in 8 bits, a scale for 64", lambda v: len(v) ** 2 * (1 + 4 / 64)),
    "form_4bit": ("P - I in 4 bits, a scale for 64", lambda v: len(v) ** 2 * (1 / 2 + 4 / 64)),
    "form_blocks": ("V Vᵀ in 8 blocks on the diagonal, float32", lambda v: 4 * len(v) ** 2 / 8),
}


def _leading(v: torch.Tensor, part: int) -> int:
    return len(v) * (len(v) // part)


# The same beside an anchor, as `protect: auto` had it up to 0.12.0; its bytes are those in 8 bits.
_ANCHORED: dict[str, tuple[str, Callable[[torch.Tensor], float]]] = {
    "lora_soft_anchor": ("99 % of the energy", lambda v: BYTES * v.numel()),
    "lora_soft_anchor_quarter": ("I/4", lambda v: BYTES * _leading(v, 4)),
    "lora_soft_anchor_eighth": ("I/8", lambda v: BYTES * _leading(v, 8)),
    "lora_soft_anchor_sixteenth": ("I/16", lambda v: BYTES * _leading(v, 16)),
    "lora_soft_anchor_thirtysecond": ("I/32", lambda v: BYTES * _leading(v, 32)),
    "lora_anchor": ("none", lambda v: 0),
}


def compare(lab: Lab, task: str, forms=_FORMS, name: str = "form") -> list[dict]:
    """A line per form that ran on `task`, at the task loss where arms are compared."""
    rows = matching.read(RESULTS, lab.amount_name)
    lines = {
        x["arm"]: x
        for x in matching.matched(rows, "task_loss")
        if (x["base"], x["task"]) == (lab.name, task)
    }
    # Layers that read one input share its directions.
    shared = {id(v): v for v in lab.protected().values()}.values()
    found = []
    for arm, (about, size) in forms.items():
        if arm not in lines or lines[arm]["kl_dialogues"] is None:
            continue
        line = lines[arm]
        found.append(
            {
                name: about,
                "MB": round(sum(map(size, shared)) / 1e6),
                "KL, its own answers": round(line["kl_dialogues"], 3),
                "of LoRA's": round(line["of_lora"], 3),
                "KL, text": round(line["kl_text"], 4),
                "facts kept": round(line["facts_kept"], 3),
                "steps": round(line["step"], 1),
            }
        )
    return found


def report(lab: Lab) -> None:
    """Write `results/real_forms.md`."""
    goal = matching.goals("snips", "task_loss")
    anchored = table(compare(lab, "snips", _ANCHORED, "directions of an input"))
    write(
        "real_forms",
        f"{lab.name}, snips: LoRA r16 on all linears that reads through P, without an anchor, at a"
        f" held-out loss of {goal}; seed 0. MB: all inputs of the model together.",
        command("real", DATA=str(lab.data.folder)),
        compare(lab, "snips"),
        more="With an anchor, as `protect: auto` had it up to 0.12.0, and fewer and fewer"
        f" directions; MB in 8 bits. Seed 0, of the first line three.\n\n{anchored}",
    )
