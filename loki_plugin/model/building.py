"""A model by its configuration: of which class, and on the meta device.

One configuration may fit several classes. That of a model for images and text is loaded whole by
some (Axolotl, vLLM) and as its text model by others (`AutoModelForCausalLM`); the two differ in
their modules' names, so it matters which one was trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..choices import TEXT_MODEL
from .fingerprint import config_hash

# In Axolotl's order: images and text, text, sound and text.
_AUTO = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM")


@dataclass(frozen=True)
class Kind:
    """A class that a configuration can be built as.

    Attributes:
        name: of the class.
        loader: the class, or the automatic one of transformers that leads to it.
    """

    name: str
    loader: Any

    def empty(self, config: Any, trust_remote_code: bool = False) -> nn.Module:
        """On the meta device."""
        with torch.device("meta"):
            if hasattr(self.loader, "from_config"):
                return self.loader.from_config(config, trust_remote_code=trust_remote_code)
            text = config.get_text_config()
            whole = isinstance(config, self.loader.config_class)
            return self.loader._from_config(config if whole else text)


def kinds(config: Any, named: str | None = None, trust_remote_code: bool = False) -> list[Kind]:
    """The classes that a configuration can be built as, in Axolotl's order.

    That is the class that the YAML names (`model_type`), or else the checkpoint's own code where
    that is trusted, a class for images and text, one for text, one for sound and text.

    Raises:
        ValueError: transformers has no class of that name, or none for this configuration.
    """
    import transformers

    trusted = (trust_remote_code and getattr(config, "auto_map", None)) or {}
    found: dict[str, Kind] = {}
    if named and not named.startswith("Auto") and not trust_remote_code:
        if not hasattr(transformers, named):
            raise ValueError(f"model_type: transformers has no class '{named}'")
        found[named] = Kind(named, getattr(transformers, named))
    for name in sorted(_AUTO, key=lambda n: n not in trusted):
        auto: Any = getattr(transformers, name)
        if name in trusted:
            kind = Kind(trusted[name].rpartition(".")[2], auto)
        elif type(config) in auto._model_mapping:
            kind = Kind(_class_of(config, auto), auto)
        else:
            continue
        found.setdefault(kind.name, kind)
    if not found:
        hint = "" if trust_remote_code else ", and its own code is not trusted (trust_remote_code)"
        raise ValueError(
            f"its configuration (model_type '{config.model_type}') is of no class of transformers"
            f" that writes text{hint}"
        )
    return list(found.values())


def empty_as(
    which: str, name: str, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The model of a configuration that holds that of a text model, on the meta device.

    Args:
        which: `text`, its text model alone; `wrapper`, the whole.
        name: a folder or a hub id.

    Raises:
        ValueError: as `kinds`; or a configuration that is of one class only.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code
    )
    text = config.get_text_config()
    known: Any = AutoModelForCausalLM._model_mapping
    if text is config or type(text) not in known:
        what = f"transformers has no class for its text model ('{text.model_type}') alone"
        if text is config:
            what = "it is no model for images or sound and text"
        raise ValueError(
            f"'{name}' (model_type '{config.model_type}') is loaded as one class only: {what}"
        )
    if which == TEXT_MODEL:
        return Kind(_class_of(text, AutoModelForCausalLM), AutoModelForCausalLM).empty(text)
    return kinds(config, None, trust_remote_code)[0].empty(config, trust_remote_code)


def _class_of(config: Any, auto: Any) -> str:
    known = auto._model_mapping[type(config)]
    names = [k.__name__ for k in (known if isinstance(known, list | tuple) else [known])]
    return next((a for a in getattr(config, "architectures", None) or [] if a in names), names[0])


def build_empty(
    config: Any,
    named: str | None = None,
    trust_remote_code: bool = False,
    made_for: Mapping[str, str] | None = None,
) -> Any:
    """A model without memory for its weights (meta device), of the class that Axolotl loads.

    Args:
        made_for: a fingerprint; where one of the classes has its architecture, that one is built.

    Raises:
        ValueError: as `kinds`, or no class can be built; with the reason.
    """
    return _choose(config, named, trust_remote_code, made_for)[1]


def load(
    name: str,
    made_for: Mapping[str, str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    holds: Collection[str] = (),
    **loading: Any,
) -> Any:
    """`from_pretrained` of the class that `build_empty` builds.

    Args:
        overrides: of its configuration, as `overrides_of_model_config` has them.
        holds: names of modules; where a class has all of them, it is that one.

    Raises:
        ValueError: as `build_empty`.
    """
    from transformers import AutoConfig

    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **where)
    for key, value in (overrides or {}).items():
        setattr(config, key, value)
    loading |= {"config": config} if overrides else {}
    known = kinds(config, None, trust_remote_code)
    kind = known[0]
    if len(known) > 1:
        kind = _choose(config, None, trust_remote_code, made_for, holds)[0]
    return kind.loader.from_pretrained(name, **where, **loading)


def _choose(
    config: Any,
    named: str | None,
    trust: bool,
    made_for: Mapping[str, str] | None,
    holds: Collection[str] = (),
) -> tuple[Kind, Any]:
    if holds:
        for kind, model in _built(config, named, trust):
            if set(holds) <= {name for name, _ in model.named_modules()}:
                return kind, model
    built = _built(config, named, trust)
    first = next(built)
    if made_for is None or made_for.get("config") == config_hash(first[1]):
        return first
    return next((b for b in built if made_for.get("config") == config_hash(b[1])), first)


def _built(config: Any, named: str | None, trust: bool) -> Iterator[tuple[Kind, Any]]:
    """Those that can be built, one by one.

    Raises:
        ValueError: none.
    """
    reason = ""
    none = True
    for kind in kinds(config, named, trust):
        try:
            model = kind.empty(config, trust)
        except Exception as error:  # constructors of others: a package is missing, sizes do not fit
            said = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
            reason = reason or f"{kind.name} cannot be built: {type(error).__name__}: {said}"
            continue
        none = False
        yield kind, model
    if none:
        raise ValueError(reason)
