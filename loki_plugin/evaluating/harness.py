"""The lm-evaluation-harness before and after: per task, per item."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from .change import TaskChange, flips

LOG = logging.getLogger("loki_plugin")
# What a task is judged by, the first that it has.
_METRICS = ("acc", "exact_match", "prompt_level_strict_acc", "pass@1", "acc_norm", "f1")


def check_tasks(tasks: Sequence[str], include: str | None = None, unsafe: bool = False) -> Any:
    """lm-eval's task manager, if it knows all `tasks` and may run them.

    Args:
        unsafe: whether tasks may run the code that a model writes.

    Raises:
        ValueError: a task that lm-eval does not know, or one that runs the model's code although
            `unsafe` is off. lm-eval itself would say so only after it has loaded the model.
        ImportError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ImportError(
            f"--tasks {','.join(tasks)} needs lm-eval, which is not installed here:"
            " pip install 'lm_eval[hf]'"
        )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; see `lm_eval ls tasks`, or give the"
            " folder of your own task files with --include"
        )
    running = [task for task in tasks if _runs_code(manager.task_index.get(task))]
    if running and not unsafe:
        raise ValueError(
            f"{', '.join(running)}: runs code that the model writes. Where that is safe, give"
            " --confirm-run-unsafe-code and set HF_ALLOW_CODE_EVAL=1; else leave it out"
        )
    return manager


def _runs_code(entry: Any) -> bool:
    """Of what lm-eval knows of a task: a dictionary, or from 0.4.12 on an object."""
    path = entry.get("yaml_path") if isinstance(entry, dict) else getattr(entry, "yaml_path", None)
    if not isinstance(path, str | Path):  # a task that is a Python class, or a tag of several
        return False
    return _unsafe(Path(path))


def _unsafe(path: Path) -> bool:
    """`unsafe_code` of a task's file, or of the files that it includes."""
    settings = _Plain(path.read_bytes()).get_single_data() or {}
    if "unsafe_code" in settings:
        return bool(settings["unsafe_code"])
    more = settings.get("include") or []
    more = more if isinstance(more, list) else [more]
    return any(_unsafe(path.parent / each) for each in more)


class _Plain(yaml.SafeLoader):
    """YAML of lm-eval's tasks, without the functions that it names (`!function`)."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: None)


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    adapter: str | None = None,
    loading: dict[str, Any] | None = None,
    include: str | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Results and samples of `tasks` from lm-eval's own `simple_evaluate`.

    Args:
        adapter: a saved PEFT adapter of `model`, or None.
        loading: how `model` is loaded: `revision`, `trust_remote_code`.
        include: a folder with task files of your own.
        limit: items per task; None for all.
        confirm_run_unsafe_code: whether tasks may run the code that the model writes.

    Raises:
        ValueError: see `check_tasks`.
    """
    from lm_eval import simple_evaluate

    manager = check_tasks(tasks, include, confirm_run_unsafe_code)
    given = {k: v for k, v in (loading or {}).items() if v}
    arguments = {"pretrained": str(model), "dtype": dtype, **given}
    return simple_evaluate(
        model="hf",
        model_args=arguments | ({"peft": adapter} if adapter else {}),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        device=device,
        apply_chat_template=chat_template,
        log_samples=True,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        bootstrap_iters=0,
    )


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[TaskChange]:
    """What became of every task and group that both results hold, and that has a score.

    Raises:
        ValueError: nothing has one.
    """
    held = [task for task in before["results"] if task in after["results"]]
    scored = [task for task in held if _numbers(before["results"][task])]
    if not scored:
        raise ValueError(f"lm-eval's results have no score, only {before['results']}")
    subtasks = before.get("group_subtasks", {})
    inside = set().union(*(_members(task, subtasks) for task in scored))
    return [_change(task, before, after, task not in inside) for task in scored]


def _members(group: str, subtasks: dict[str, list[str]]) -> set[str]:
    """All tasks and groups inside a group, however deep."""
    direct = set(subtasks.get(group, ())) - {group}
    return direct.union(*(_members(task, subtasks) for task in direct))


def _numbers(scores: dict[str, Any]) -> list[str]:
    return [k for k, v in scores.items() if isinstance(v, float) and "stderr" not in k]


def _change(task: str, before: dict[str, Any], after: dict[str, Any], counts: bool) -> TaskChange:
    scores = before["results"][task]
    numbers = _numbers(scores)
    chosen = next((n for m in _METRICS for n in numbers if n.split(",")[0] == m), numbers[0])
    down, up, items = _item_flips(task, chosen, before, after)
    better = before.get("higher_is_better", {}).get(task, {}).get(chosen.split(",")[0])
    return TaskChange(
        task,
        chosen,
        scores[chosen],
        after["results"][task][chosen],
        items,
        down,
        up,
        higher_is_better=better is not False,
        counts=counts,
    )


def _item_flips(
    task: str, metric: str, before: dict[str, Any], after: dict[str, Any]
) -> tuple[int, int, int]:
    """Flips of the items that both have, where the metric says right or wrong of each."""
    name, _, chosen_filter = metric.partition(",")
    kept = [
        {
            s["doc_id"]: s[name]
            for s in results.get("samples", {}).get(task, [])
            if s.get("filter", "none") == chosen_filter and s.get(name) in (0, 1)
        }
        for results in (before, after)
    ]
    both = sorted(kept[0].keys() & kept[1].keys())
    down, up = flips(*([bool(k[i]) for i in both] for k in kept))
    return down, up, len(both)
