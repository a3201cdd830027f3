"""`loki forgetting`: a base and what became of it, on prompts and on lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..analysing.calibration.prompts import Prompt, load_prompts
from ..analysing.calibration.sources import Record, load_records
from ..blocks import CalibrationArgs
from ..implanting.checkpoint import Base
from ..implanting.fitting import base_named_by, changed_modules, check_fits, check_made_on
from ..implanting.renaming import as_text_model
from ..implanting.saved import WEIGHTS, open_tensors
from ..model.building import load
from ..protecting.anchor import adapter_off
from ..rows import FILE_NAME, RowSelection
from .change import TaskChange, mean_relative_drop
from .harness import changes, check_tasks, evaluate_tasks
from .quick import Forgetting, compare, log_probabilities

ADAPTER = "adapter_config.json"
# Enough for a figure, few enough for a minute on an 8B model.
QUICK_PROMPTS = 128


@dataclass(frozen=True)
class ForgettingReport:
    """What a tuned model lost.

    Attributes:
        prompts: next-token predictions on the calibration prompts.
        tasks: lm-eval's tasks, before and after.
        noise: the base against itself, evaluated twice; the size of a difference that means
            nothing. Empty where it was not asked for.
    """

    prompts: Forgetting
    tasks: list[TaskChange] = field(default_factory=list)
    noise: list[TaskChange] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts.to_json(),
            "tasks": [c.to_json() for c in self.tasks],
            "mean_relative_drop": mean_relative_drop(self.tasks),
            "mean_relative_drop_gains_clipped": mean_relative_drop(self.tasks, clip_gains=True),
            "noise_floor": [c.to_json() for c in self.noise],
        }

    def text(self) -> str:
        lines = [self.prompts.text()]
        for c in self.tasks:
            drop = c.relative_drop
            fell = "" if drop is None else f", drop {100 * drop:.2f} %"
            items = (
                f"; of {c.items} items {c.flips_down} lost, {c.flips_up} gained (p ="
                f" {c.p_value:.3f})"
                if c.items
                else ""
            )
            lines.append(f"{c.task} ({c.metric}): {c.before:.4f} -> {c.after:.4f}{fell}{items}")
        mean = mean_relative_drop(self.tasks)
        if mean is not None:
            clipped = mean_relative_drop(self.tasks, clip_gains=True) or 0.0
            lines.append(
                f"mean relative drop {100 * mean:.2f} % (gains counted as 0: {100 * clipped:.2f} %)"
            )
        for c in self.noise:
            lines.append(
                f"noise floor of {c.task}: {c.before:.4f} and {c.after:.4f}, {c.flips_down} +"
                f" {c.flips_up} flips between two evaluations of the base"
            )
        return "\n".join(lines)


def measure(
    base: str,
    tuned: str | Path,
    tasks: Sequence[str] = (),
    prompts: str = "builtin",
    *,
    noise_floor: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str = "auto",
    **options: Any,
) -> ForgettingReport:
    """Compare `tuned` (a model or a saved adapter of `base`) with `base`.

    Args:
        tasks: lm-eval tasks; none: the prompts only.
        prompts: a calibration source; where its records have answers, those are asked for.
        noise_floor: evaluate the base a second time.
        revision, trust_remote_code: of the base, as the run's YAML has them; without a revision,
            the one that the adapter names beside this base.
        overrides: of its configuration, under which it was trained.
        options: see `evaluate_tasks`.

    Raises:
        ValueError: an unknown task, or models that do not belong together.
    """
    tuned = str(tuned)
    adapter = tuned if (Path(tuned) / ADAPTER).is_file() else None
    if adapter and revision is None and base_named_by(Path(adapter))[0] == base:
        revision = base_named_by(Path(adapter))[1]
    of_base: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    of_tuned = of_base if adapter else {"trust_remote_code": trust_remote_code}
    device = device or _usual_device()  # lm-eval's own default is a GPU, where there is none too
    settings: dict[str, Any] = {"device": device, "dtype": dtype, **options}
    idle = [k for k in ("include", "limit") if options.get(k)] + ["noise_floor"] * noise_floor
    if idle and not tasks:
        raise ValueError(f"{', '.join(idle)} need lm-eval tasks; name some with --tasks")
    if tasks and overrides:
        raise ValueError(
            "lm-eval loads models without `overrides_of_model_config`, so that tasks would tell of"
            " a model that was not trained; leave --tasks out, or give a --base and a --tuned whose"
            " config.json has them"
        )
    if tasks:
        unsafe = bool(options.get("confirm_run_unsafe_code"))
        check_tasks(tasks, options.get("include"), unsafe)  # before anything is loaded
    known = Base(base, revision, trust_remote_code, dict(overrides or {}))
    if adapter:
        check_made_on(known, Path(adapter))
    on_prompts = _on_prompts(
        base, tuned, prompts, device, dtype, of_base, of_tuned, overrides or {}
    )
    if not tasks:
        return ForgettingReport(on_prompts)
    model = base if adapter else tuned
    if adapter and saved_embedding_rows(Path(adapter)):
        of_tuned = {**of_tuned, "tokenizer": adapter}  # lm-eval grows the embeddings to its length
    with as_text_model(Path(adapter), known) if adapter else nullcontext() as named:
        before = evaluate_tasks(base, tasks, loading=of_base, **settings)
        fitting = str(named) if named else None
        after = evaluate_tasks(model, tasks, adapter=fitting, loading=of_tuned, **settings)
    again = evaluate_tasks(base, tasks, loading=of_base, **settings) if noise_floor else None
    return ForgettingReport(
        on_prompts, changes(before, after), changes(before, again) if again else []
    )


def of_a_run(config: dict[str, Any]) -> str:
    """What a run's YAML has made: its merged model, else its adapter.

    Raises:
        ValueError: neither a merged model nor an adapter in its output_dir, or a merged model that
            is older than the adapter.
    """
    folder = Path(config.get("output_dir") or "./model-out")  # Axolotl's own default
    merged, adapter = folder / "merged", folder / ADAPTER
    if (merged / "config.json").is_file():
        written = (merged / "config.json").stat().st_mtime  # not the folder's: others add files
        if adapter.is_file() and adapter.stat().st_mtime > written:
            raise ValueError(
                f"'{merged}' is older than the adapter in '{folder}': remove it and merge again, or"
                f" say which one is meant, --tuned {merged} or --tuned {folder}"
            )
        return str(merged)
    if adapter.is_file():
        return str(folder)
    raise ValueError(
        f"'{folder}' holds neither an adapter nor a merged model; train first, or give --tuned"
    )


def plot(report: ForgettingReport, path: str | Path) -> Path:
    """Draw every task before and after, and the prompts' accuracy where they have answers."""
    from ..picturing.drawing.change import change_figure
    from ..picturing.drawing.style import save

    bars = [(c.task, c.before, c.after) for c in report.tasks]
    if report.prompts.accuracy_before is not None and report.prompts.accuracy_after is not None:
        bars.append(("calibration", report.prompts.accuracy_before, report.prompts.accuracy_after))
    bars = bars or [("same answer", 1.0, report.prompts.same_answer)]
    names, before, after = zip(*bars, strict=True)
    title = f"KL to the base {report.prompts.kl:.4f} nats"
    return save(change_figure(names, before, after, title), path)


def load_questions(
    tokenizer: Any, settings: CalibrationArgs, records: list[Record] | None = None
) -> list[Prompt]:
    """The prompts of a calibration source, with their gold tokens where every record has one."""
    records = records or load_records(settings.source, **settings.reading)
    asked = settings.model_dump() | {"target": "gold" if answered(records) else "predicted"}
    return load_prompts(tokenizer, **asked, records=records).prompts


def answered(records: Sequence[Record]) -> bool:
    """Whether every record says what is right."""
    return all(r.answer is not None or r.target is not None for r in records)


def of_an_adapter(model: nn.Module, prompts: Sequence[Prompt]) -> Forgetting:
    """What the active adapter of a model in memory has changed; its base is the adapter off.

    At most `QUICK_PROMPTS` of the prompts are asked, evenly chosen.
    """
    some = prompts[:: -(-len(prompts) // QUICK_PROMPTS)]
    ids = [p.ids for p in some]
    with adapter_off(model):
        base = log_probabilities(model, ids)
    return compare(base, log_probabilities(model, ids), [p.target for p in some])


def _on_prompts(
    base: str,
    tuned: str,
    source: str,
    device: str | None,
    dtype: str,
    of_base: dict[str, Any],
    of_tuned: dict[str, Any],
    overrides: Mapping[str, Any],
) -> Forgetting:
    from transformers import AutoTokenizer

    found = load_questions(
        AutoTokenizer.from_pretrained(base, **of_base), CalibrationArgs(source=source)
    )
    ids = [p.ids for p in found]
    # One model at a time in memory; its answers wait on the CPU.
    changed = {"overrides": overrides}  # a merged model has them in its own configuration
    before = log_probabilities(load_model(base, None, device, dtype, **of_base, **changed), ids)
    adapter = (Path(tuned) / ADAPTER).is_file()
    name, saved = (base, tuned) if adapter else (tuned, None)
    model = load_model(name, saved, device, dtype, **of_tuned, **changed)
    return compare(before, log_probabilities(model, ids), [p.target for p in found])


def load_model(
    model: str, adapter: str | None, device: str | None, dtype: str, **loading: Any
) -> Any:
    """A model, with a saved adapter if one is given, on a device (None: the GPU, if any).

    Where a base can be loaded as several classes, it is the one whose modules the adapter names.

    Raises:
        ValueError: a device or a dtype that there is not, before anything is loaded; an adapter
            that does not fit.
    """
    device = check_place(device, dtype)
    chosen = Path(adapter or model) / FILE_NAME
    made_for = RowSelection.load(chosen).fingerprint if chosen.is_file() else None
    holds = changed_modules(Path(adapter)) if adapter else ()
    loaded = load(model, made_for, dtype=dtype, holds=holds, **loading)
    if adapter is not None:
        loaded = with_adapter(loaded, Path(adapter))
    return loaded.to(device)


def with_adapter(model: Any, adapter: Path) -> Any:
    """A base with a saved adapter of it, which may bring embeddings of new tokens.

    Raises:
        ValueError: as `check_fits`.
    """
    from peft import PeftModel

    check_fits(model, adapter)
    rows = saved_embedding_rows(adapter)
    if rows > model.get_input_embeddings().num_embeddings:  # tokens that the run added
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(adapter))


def check_place(device: str | None, dtype: str) -> str:
    """The device (None: the GPU, if any) to load a model on.

    Raises:
        ValueError: a device or a dtype that there is not.
    """
    device = device or _usual_device()
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype '{dtype}' is unknown; give auto, float32, bfloat16 or float16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device '{device}' cannot be used: {reason}") from error
    return device


def saved_embedding_rows(adapter: Path) -> int:
    """How many tokens the embeddings have that a saved adapter brings; 0 where it brings none."""
    if not (adapter / WEIGHTS).is_file():
        return 0
    with open_tensors(adapter / WEIGHTS) as stored:
        brought = [k for k in stored.keys() if ".lora_" not in k]
        return max((stored.get_slice(k).get_shape()[0] for k in brought), default=0)


def _usual_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
