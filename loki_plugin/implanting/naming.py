"""How an adapter names its modules where PEFT takes their names for routed experts.

For some mixtures of experts PEFT turns every target that is called `down_proj` (or `gate_proj`,
`up_proj`, `w2`, ...) into the routed experts' weights, whatever module the rest of the name says.
Such an adapter names the *parameter* instead, `model.layers.0.mlp.down_proj.weight`: PEFT finds it
where it is, loads A and B under the same keys, and merges them. In memory it is an ordinary LoRA
layer, which works on quantised weights too and never makes the whole of ΔW.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import transformers_weight_conversion as peft_conversion
from torch import nn

from ..model.anatomy import linear_sizes
from ..model.linears import PREFIX, kind_of

_WEIGHT = ".weight"


def misnamed(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of some linear modules that PEFT would take for routed experts."""
    convert = _original()
    taken: dict[str, bool] = {}
    for name in names:
        kind = kind_of(name)
        if kind not in taken:
            config = LoraConfig(task_type="CAUSAL_LM", target_modules=[name])
            try:
                convert(config, model, None)
                taken[kind] = set(config.target_modules or ()) != {name}
            except ValueError:  # a gate without its up: "cannot convert"
                taken[kind] = True
    return [name for name in names if taken[kind_of(name)]]


def by_parameter(names: Sequence[str]) -> list[str]:
    """As `target_parameters` of an adapter's configuration."""
    return [f"{name}{_WEIGHT}" for name in names]


def keep_modules() -> None:
    """From now on PEFT makes ordinary LoRA layers of linear modules that are named by parameter.

    In this process only; what is loaded elsewhere gives the same answers, by PEFT's own wrapper.
    """
    original = peft_conversion.convert_peft_config_for_transformers
    if getattr(original, "keeps_modules", None):
        return

    @functools.wraps(original)
    def convert(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        names = _linears_by_parameter(peft_config, model)
        if not names:
            return original(peft_config, model, conversions)
        peft_config.target_modules = {*(peft_config.target_modules or ()), *names}
        peft_config.target_parameters = None

    convert.keeps_modules = original  # type: ignore[attr-defined]
    peft_conversion.convert_peft_config_for_transformers = convert


def name_by_parameter(model: PeftModel) -> None:
    """Write into the adapter's configuration what any PEFT understands; undoes `keep_modules`."""
    config: Any = model.peft_config[model.active_adapter]
    targets = config.target_modules
    if not targets or isinstance(targets, str):
        return
    wrong = misnamed(model.get_base_model(), sorted(targets))  # PEFT may have shortened them
    adapted = [n.removeprefix(PREFIX) for n, m in model.named_modules() if hasattr(m, "lora_A")]
    names = [n for n in adapted if any(n == t or n.endswith(f".{t}") for t in wrong)]
    if names:
        config.target_modules = set(targets).difference(wrong)
        config.target_parameters = sorted(by_parameter(names))


def _linears_by_parameter(config: Any, model: nn.Module) -> list[str]:
    """The linear modules that a configuration names by their weights; none if it names others."""
    named = list(getattr(config, "target_parameters", None) or ())
    if not named or not all(n.endswith(_WEIGHT) for n in named):
        return []
    modules = dict(model.named_modules())
    names = [n.removesuffix(_WEIGHT) for n in named]
    linears = all(n in modules and linear_sizes(modules[n]) is not None for n in names)
    return names if linears else []


def _original() -> Any:
    convert = peft_conversion.convert_peft_config_for_transformers
    return getattr(convert, "keeps_modules", convert)
