"""The finals: six ways to train, all tasks, three seeds, each at one rate.

Where a way has not run on a task yet, that is a guess. Lower rates forget less, in more steps than
a run has here.

    python -m benchmarks.real run --finals --stage final --amount full

takes all of them; several processes share them with `--part 1/4` to `--part 4/4`, also on one GPU
(`--device cuda`). A row of `real_final.csv` says on which device it was measured.
"""

from __future__ import annotations

from benchmarks.real.sweep import Key
from benchmarks.real.tasks import TASKS

SEEDS = (0, 1, 2)
# arm -> its rate, and tasks that have another.
RATES: dict[str, tuple[float, dict[str, float]]] = {
    "auto_q10": (1e-3, {"counterfact": 2e-3, "wikidyk": 2e-3}),
    "auto_gain_frozen": (1e-3, {}),
    "lora_all_r16": (1e-4, {"bfcl": 5e-5, "wikidyk": 3e-4}),
    "lora_null_frozen": (1e-3, {}),
    "full": (2e-5, {"counterfact": 5e-5, "banking77": 5e-5, "wikidyk": 5e-5}),
    "loki_q30": (5e-4, {"wikidyk": 1e-3}),
}


def keys(base: str, amount: str) -> list[Key]:
    """Task by task, of each all ways with the first seed, then with the next one."""
    return [
        Key(base, task, arm, seed, others.get(task, rate), amount)
        for task in TASKS
        for seed in SEEDS
        for arm, (rate, others) in RATES.items()
    ]


def part(keys: list[Key], told: str) -> list[Key]:
    """Every n-th of them, `told` being `i/n`.

    Raises:
        ValueError: not `i/n` with 1 <= i <= n.
    """
    first, _, count = told.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise ValueError(f"--part {told}: expected i/n with 1 <= i <= n, such as 1/4")
    return keys[int(first) - 1 :: int(count)]
