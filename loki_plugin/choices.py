"""What can be chosen, and what is chosen where nobody says: each stands here once.

The `loki:` block, the functions and the command take their names and defaults from here. Light to
import: the command shows its help without loading torch.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal, get_args

RuleName = Literal["left", "right", "midpoint", "trapezoid", "gauss-legendre"]
PathName = Literal["token", "sequence"]
StrategyName = Literal[
    "layer_balanced", "layer_highest", "global_lowest", "global_highest", "random"
]
TargetName = Literal["predicted", "gold"]
RULES: tuple[RuleName, ...] = get_args(RuleName)
PATHS: tuple[PathName, ...] = get_args(PathName)
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)

RULE: RuleName = "left"
STEPS = 7
PATH: PathName = "token"
STRATEGY: StrategyName = "layer_balanced"
QUOTA = 10  # percent of the rows of every layer
SOURCE = "builtin"  # of calibration prompts: those that ship with the package
SELF = "self"  # text for protection that the model writes by itself
TextKind = Literal["both", "dialogues", "text"]
TEXT_KINDS: tuple[TextKind, ...] = get_args(TextKind)
PROTECT_GB = 1.25  # gigabytes of a card that directions take at most, and a tenth of it at most
# What `protect: auto` stands for.
AUTO = {"inputs": 0.99, "soft": True, "anchor": 1.0, "text": SELF, "freeze_a": True}
TEXT_COUNT, TEXT_TOKENS = 160, 80
TEXT_BATCH = 80  # of one kind, all at once
TASK_TOKENS = 32_768  # of the task, at most, that tell what low-rank updates shall read
TARGET: TargetName = "predicted"
FEW_SHOT = 0
DOWN, ALL = "down", "all"  # targets: rows of the down-projections only; every other linear too
TEXT_MODEL, WRAPPER = CLASSES = ("text", "wrapper")  # whose names of modules an adapter has
LINEAR_RANK = 16  # of the LoRA on linears besides the down-projections
SEED = 0
BATCH_SIZE = "auto"
# What an evaluation measures of forgetting; `metric_for_best_model` may leave `eval_` out.
WATCH_KL, WATCH_KEPT = "eval_loki_kl", "eval_loki_kept"


def plain_number(value: Decimal | str) -> int | float:
    """A decimal as JSON holds it: 10 and not 10.0 or "10"."""
    value = Decimal(value)
    return int(value) if value == int(value) else float(value)
