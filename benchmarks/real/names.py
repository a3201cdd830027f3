"""What bases, tasks and ways to train are called on pages that people read."""

from __future__ import annotations

from benchmarks.real import matching
from benchmarks.real.matching import RIVAL
from benchmarks.real.picture import SHOWN
from benchmarks.real.report import is_ours

# Ways of others, and what each does, in a few words.
OTHERS = {
    "lora_all_r16_wd0.1": ("LoRA, weight decay 0.1", "AdamW shrinks A and B"),
    "lora_mlp_r10": ("LoRA r10, MLP alone", ""),
    "lora_attn": ("LoRA, attention alone", ""),
    "lora_gateup": ("LoRA, gate and up alone", ""),
    "dora": ("DoRA", "a LoRA and a length for each output"),
    "osf": ("OSF", "all weights, outside their leading singular vectors"),
    "corda": ("CorDA", "starts where general text uses the weights least (knowledge-preserved)"),
    "oplora": ("OPLoRA", "no update in the leading eighth of the weight's singular triples"),
    "fora": ("FORA", "reads nothing of 0.9 of an input's energy, writes nothing to the leading"
                     " eighth of the outputs"),
    "lora_null": ("LoRA-Null", "starts in what an input uses least; A trains too"),
    "lora_null_frozen": ("LoRA-Null, A frozen", "reads what an input uses least; only B trains"),
    "freeze_bottom": ("lower half frozen", "all weights of the upper half"),
    "lora_eaft": ("LoRA, EAFT's loss", "a token counts by how unsure the model is"),
    "full": ("full fine-tuning", ""),
    "lora_selfreplay": ("LoRA + 5 % own text", "one sequence in 20 is the base's own"),
    "lora_selfreplay50": ("LoRA + 50 % own text", "every second sequence is the base's own"),
    "lora_replay1": ("LoRA + 1 % real data", "text and dialogues of people"),
    "lora_replay5": ("LoRA + 5 % real data", "text and dialogues of people"),
    "loki_q10": ("LoKI as in the paper, 10 % of the rows", ""),
    "loki_q90": ("LoKI as in the paper, 90 % of the rows", ""),
    "random_q10": ("10 % of the rows, drawn at random", ""),
    "random_q30": ("30 % of the rows, drawn at random", ""),
    "random_q90": ("90 % of the rows, drawn at random", ""),
}  # fmt: skip
# Parts of `protect: auto`, and what else was tried of it.
PARTS = {
    "lora_soft": "soft inputs alone",
    "lora_anchor": "the anchor alone (of the model's own text and calibration questions)",
    "lora_soft_anchor": "both",
    "lora_soft_anchor_dialogues": "both, the anchor of the model's own dialogues alone",
    "auto_all": "both, the anchor of the model's own text alone (`freeze_a: false`)",
    "auto_frozen": "and A stands still as it was drawn",
    "auto_gain": "and A is set from the task's data, and trains",
    "auto_gain_frozen": "and A is set from the task's data, and stands still (`protect: auto`)",
    "auto_gain_frozen_eighth": "`protect: auto`, A set beside an eighth of all directions",
    "auto_null_frozen": "the anchor, and LoRA-Null's A, which stands still",
    "auto_w3": "`freeze_a: false`, three times the anchor's weight",
    "auto_one": "`freeze_a: false`, one text in a step instead of two",
    "auto_b16": "`freeze_a: false`, 16 sequences in a step instead of 4",
    "auto_b16_8": "`freeze_a: false`, 16 sequences and 8 texts in a step",
    "auto_b32": "`freeze_a: false`, 32 sequences in a step",
    "lora_soft_anchor_every2": "both, an anchor in every second step",
    "lora_soft_anchor_every4": "both, an anchor in every fourth step",
    "lora_soft_anchor_own20": "both, 20 texts of the model's own instead of 160",
    "lora_soft_anchor_quarter": "both, directions as many as a quarter of the inputs",
    "lora_soft_anchor_eighth": "both, an eighth",
    "lora_soft_anchor_sixteenth": "both, a sixteenth",
    "lora_soft_anchor_thirtysecond": "both, a thirty-second",
    "auto_q10": "10 % of the rows, dense, with both (`quota: 10, protect: auto`)",
    "loki_soft_q30": "30 % of the rows, dense, soft inputs alone",
    "loki_soft_q90": "90 % of the rows, dense, soft inputs alone",
    "loki_soft_q90_0.6": "90 % of the rows, inputs as 0.6.0 found them",
    "all_soft_q30": "30 % of the rows and rank 16 on all other linears, soft inputs alone",
    "all_soft_q90": "90 % of the rows and rank 16 on all other linears, soft inputs alone",
}  # fmt: skip
_BASES = {
    "smollm2-135m-instruct": "SmolLM2-135M",
    "gemma-3-270m": "Gemma-3-270M",
    "gemma-3-270m-turns": "Gemma-3-270M with a chat template",
}
_TASKS = {
    "bfcl": "function calls", "snips": "commands to JSON", "wikidyk": "new facts",
    "counterfact": "changed facts", "banking77": "intents", "gsm8k": "maths",
}  # fmt: skip
_ALSO = {
    "lora_anchor": "LoRA + our anchor alone",
    "lora_soft": "all linears, soft inputs alone",
    "auto_all": "all linears, `auto` with `freeze_a: false`",
}


def title(base: str, task: str) -> str:
    """Of a column or a line: a base and a task."""
    return f"{_BASES.get(base, base)}, {_TASKS.get(task, task)}"


def name(arm: str) -> str:
    """Of a way to train."""
    if arm in SHOWN:
        return SHOWN[arm][0]
    return _ALSO.get(arm) or OTHERS.get(arm, (arm,))[0]


def is_others(arm: str) -> bool:
    """Whether an arm is neither LoRA itself nor a form of LoKI, protected or not, and sees no old
    data."""
    if arm == RIVAL or arm in matching.AGAIN.values() or is_ours(arm):
        return False
    return not arm.startswith(("loki", "random", "all_", "form_", "lora_hard", "lora_replay"))
