"""What evaluations measured while a run trained, measured once more on what was saved."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

from ..implanting.checkpoint import Base
from ..implanting.fitting import check_made_on
from ..implanting.saved import WEIGHTS
from ..picturing.page import read_report
from .forgetting import ForgettingReport, load_model
from .held_back import kept_texts
from .quick import Forgetting
from .watching import measure


def measure_again(
    base: str,
    run: Path,
    adapter: Path,
    device: str | None = None,
    dtype: str = "auto",
    cache_dir: str | None = None,
    **of_base: Any,
) -> tuple[ForgettingReport, str]:
    """`eval_loki_kl` and `eval_loki_kept` of a saved adapter, on the texts that its run held back;
    and the same in words.

    Args:
        run: the run's folder, whose report names the texts, which the cache keeps.
        adapter: it, or a checkpoint in it.
        of_base: how the base is loaded, as the run's YAML has it.

    Raises:
        ValueError: a run whose evaluations measured nothing, no adapter, or texts that the cache
            no longer has.
    """
    key = (read_report(run).get("forgetting_while_training") or {}).get("texts")
    if not key:
        raise ValueError(
            f"--held-back: the report in '{run}' names no texts that were held back: no evaluation"
            " measured what was forgotten (`val_set_size` and `eval_steps` make some), the cache"
            " could not be written, or an earlier version trained it"
        )
    if not (adapter / WEIGHTS).is_file():
        raise ValueError(
            f"--held-back: '{adapter}' has no {WEIGHTS}; the adapter is measured, by switching it"
            " off, not a merged model"
        )
    prompts, own = kept_texts(key, cache_dir)
    revision, trust = of_base.get("revision"), bool(of_base.get("trust_remote_code"))
    check_made_on(Base(base, revision, trust, dict(of_base.get("overrides") or {})), run)
    model = load_model(base, str(adapter), device, dtype, **of_base)
    found = measure(model, prompts, own)
    told = f"eval_loki_kl {found.kl:.4g} nats"
    if found.kept is not None:
        told += f", eval_loki_kept {100 * found.kept:.4g} %"
    told += f" on {len(prompts)} prompts and {len(own)} texts of the model, held back in the run"
    kept = nan if found.kept is None else found.kept
    return ForgettingReport(Forgetting(len(prompts), found.kl, kept)), told
