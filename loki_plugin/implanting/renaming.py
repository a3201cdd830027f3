"""A saved adapter under the names of the other class that its base is loaded as.

A checkpoint for images and text is loaded whole by some (Axolotl, vLLM) and as its text model by
others, and the two call the same modules differently (`model.language_model.layers.0.` and
`model.layers.0.`). An adapter with the names of the one changes nothing in the other, in some
servers without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..choices import CLASSES, TEXT_MODEL, WRAPPER
from ..model.anatomy import find_anatomy
from ..model.building import Kind, empty_as, kinds
from ..model.linears import PREFIX
from ..model.writing import write_text
from ..rows import FILE_NAME, Made
from .adapters import CONFIG, Adapter, tail
from .carrier import shortest_targets
from .checkpoint import Base, copy_files, open_tensors
from .fitting import changed_modules
from .naming import by_parameter, misnamed
from .output import check_output, writing_to
from .saved import WEIGHTS
from .tokenizer_files import FILES as TOKENIZER_FILES


@dataclass(frozen=True)
class RenameReport:
    """What was written.

    Attributes:
        output: where the adapter is.
        fits: the class whose names it has now.
        fitted: the class whose names it had.
        modules: how many were renamed.
    """

    output: Path
    fits: str
    fitted: str
    modules: int

    def text(self) -> str:
        return (
            f"{self.modules} modules are named as in {self.fits} now (before: {self.fitted});"
            f" their numbers are the same\nadapter in {self.output}"
        )


def rename(adapter: str | Path, output: str | Path, to: str, base: Base) -> RenameReport:
    """Write a saved adapter with the names of the text model alone, or of the whole wrapper.

    Only names change, in the weights and in PEFT's configuration. The rows file keeps those of the
    class that was trained, which `loki merge` and `loki verify` go by; so both take either adapter.
    Directions stay with the adapter that goes on training.

    Args:
        to: `text` or `wrapper`.
        base: its configuration is read; nothing of it is loaded.

    Raises:
        ValueError: an adapter without a rows file; one that has these names already, or other
            modules than either class; one with the embeddings of new tokens; a base with one class
            only; an output folder that is not empty.
    """
    folder, output = Path(adapter), Path(output)
    check_output(output, base)
    source = Adapter.load(folder)
    name, trust = str(base.name), base.trust_remote_code
    models = {kind: empty_as(kind, name, base.revision, trust) for kind in CLASSES}
    other = models[WRAPPER if to == TEXT_MODEL else TEXT_MODEL]
    new, old = (_head(model) for model in (models[to], other))
    with open_tensors(folder / WEIGHTS) as stored:
        state = {key: stored.get_tensor(key) for key in stored.keys()}
    foreign = [key for key in state if ".lora_" not in key]
    if foreign:
        raise ValueError(
            f"the adapter in '{folder}' holds {foreign[0]}, of new tokens; merge it instead"
        )
    modules = [key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in state]
    fits = type(models[to]).__name__
    if new == old or all(m in _names(models[to]) for m in modules):
        raise ValueError(f"the adapter in '{folder}' has the names of {fits} already")
    renamed = {m: new + tail(m) for m in modules if m == old + tail(m)}
    missing = [m for m in modules if renamed.get(m) not in _names(models[to])]
    if missing:
        raise ValueError(
            f"the adapter in '{folder}' changes {missing[0]}, of which {fits} has no counterpart;"
            " it is the adapter of another base (--base)"
        )
    with writing_to(output) as partial:
        copy_files(folder, partial, TOKENIZER_FILES)
        state = {PREFIX + new + key.removeprefix(PREFIX + old): t for key, t in state.items()}
        save_file(state, partial / WEIGHTS, {"format": "pt"})
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config |= _named(config, models[to], [*dict.fromkeys(renamed.values())], old, new)
        write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")
        facts = {**source.selection.made.get("export", {}), "names": fits}
        made = Made(**{**source.selection.made, "export": facts})
        replace(source.selection, made=made).save(partial / FILE_NAME)
    return RenameReport(output, fits, type(other).__name__, len(renamed))


@contextmanager
def as_text_model(adapter: Path, base: Base) -> Iterator[Path]:
    """A saved adapter as tools can put it onto a base that they load as its text model alone, as
    lm-eval does; one of the whole model is renamed for that, in a folder that goes.

    Raises:
        ValueError: it cannot be renamed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        base.name, revision=base.revision, trust_remote_code=base.trust_remote_code
    )
    if len(kinds(config, None, base.trust_remote_code)) == 1:
        yield adapter
        return
    loaded = Kind("", AutoModelForCausalLM).empty(config, base.trust_remote_code)
    if changed_modules(adapter) <= _names(loaded):
        yield adapter
        return
    with TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        try:
            rename(adapter, out, TEXT_MODEL, base)
        except ValueError as error:
            raise ValueError(
                f"'{base.name}' is loaded as {type(loaded).__name__}, whose modules have other"
                f" names than the adapter's, and it cannot be renamed: {error}. Merge it, and give"
                " the merged model"
            ) from error
        yield out


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def _head(model: nn.Module) -> str:
    """What stands before the list of decoder layers in the names of its modules."""
    layers = find_anatomy(model).layers
    names = {id(module): name for name, module in model.named_modules()}
    name = names[id(layers[0])]
    return name.removesuffix(tail(f"{name}.x").removesuffix(".x"))


def _named(
    config: dict[str, Any], model: nn.Module, names: list[str], old: str, new: str
) -> dict[str, Any]:
    """The fields of PEFT's configuration that name modules."""
    wrong = misnamed(model, names)
    right = [name for name in names if name not in wrong]
    patterns = {
        field: {
            new + key.removeprefix(old) if key.startswith(old) else key: value
            for key, value in (config.get(field) or {}).items()
        }
        for field in ("rank_pattern", "alpha_pattern")
    }
    return patterns | {
        "target_modules": shortest_targets(model, right),
        "target_parameters": by_parameter(wrong) or None,
    }
