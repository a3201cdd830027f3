"""The LoRA configuration that carries a selection: which modules, of which rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from ..choices import LINEAR_RANK
from ..model.anatomy import Anatomy
from ..model.linears import kind_of
from ..rows import RowSelection
from .naming import by_parameter, keep_modules, misnamed


def check_rank(rank: int | None, fullest: int) -> None:
    """Check a rank against the rows of the fullest layer.

    Raises:
        ValueError: rank < 1 or rank >= the rows.
    """
    if rank is not None and not 1 <= rank < fullest:
        raise ValueError(
            f"rank = {rank}, but {fullest} rows train per layer; a low-rank update needs"
            f" 1 <= rank < {fullest}. Take a smaller rank (`loki.rank`, or `lora_r`) or a larger"
            " quota, or leave it out for the dense form (`adapter: loki`)"
        )


def lora_settings(
    anatomy: Anatomy,
    model: nn.Module,
    selection: RowSelection,
    rank: int | None,
    linear_rank: int = LINEAR_RANK,
) -> dict:
    """The `LoraConfig` fields that carry a selection.

    Scaling is 1 in every layer (alpha = r). Layers without rows are not targeted.

    Raises:
        ValueError: as `check_rank`, or a linear of the selection that the model does not have.
    """
    counts = selection.counts
    if any(counts):
        check_rank(rank, max(counts))
    ranks = {n: rank or c for n, c in zip(anatomy.names, counts, strict=True) if c}
    ranks |= dict.fromkeys(selection.linears, linear_rank)
    known = {name for name, _ in model.named_modules()}
    missing = [name for name in ranks if name not in known]
    if missing:
        raise ValueError(
            f"the rows file names the linear module {missing[0]}, which this model does not have;"
            " use the file of this model"
        )
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: r for name, r in ranks.items() if r != common}
    wrong = misnamed(model, list(ranks))
    if wrong:
        keep_modules()
        pattern |= {p: pattern[n] for n in wrong if n in pattern for p in by_parameter([n])}
    right = [name for name in ranks if name not in wrong]
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": shortest_targets(model, right),
        "target_parameters": by_parameter(wrong) or None,
        "fan_in_fan_out": 1 in anatomy.row_dims,
        "lora_dropout": 0.0,
    }


def shortest_targets(model: nn.Module, used: list[str]) -> list[str]:
    """Suffixes such as `down_proj` where they name exactly these modules, else full names."""
    everything = [name for name, _ in model.named_modules()]
    kinds: dict[str, list[str]] = {}
    for name in used:
        kinds.setdefault(kind_of(name), []).append(name)
    found: list[str] = []
    for names in kinds.values():
        parts = names[0].split(".")
        suffixes = [".".join(parts[-depth:]) for depth in range(1, len(parts))]
        ends = {s: [n for n in everything if n == s or n.endswith(f".{s}")] for s in suffixes}
        exact = [s for s in suffixes if sorted(ends[s]) == sorted(names)]
        found += exact[:1] or names
    return found


def check_adaptable(anatomy: Anatomy, model: nn.Module, linears: Sequence[str] = ()) -> None:
    """Check that PEFT puts adapters where their names say: down-projections, and further linears.

    Raises:
        ValueError: a family of which PEFT takes these modules for its routed experts' weights, and
            whose weights lie the other way round, so that naming them by parameter is no way out.
    """
    names = [*anatomy.names, *linears]
    wrong = misnamed(model, names)
    if wrong and 1 in anatomy.row_dims:
        raise ValueError(
            f"model family '{model.config.model_type}': PEFT takes an adapter for {wrong[-1]} for"
            " one of the routed experts, so no standard adapter can hold rows of it. `attribute`"
            " and `select_rows` work; training them does not. Use another model"
        )
