"""Tokens that the YAML adds: the base that is analysed does not know them yet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..choices import SELF
from .earlier import check_tokens
from .files import Files
from .sharding import is_fsdp2

LOG = logging.getLogger("loki_plugin")
_ADDING = ("tokens", "special_tokens", "added_tokens_overrides", "chat_template")
_DEFAULT = "tokenizer_default"


@dataclass(frozen=True)
class Calibrating:
    """What calibration prompts, and what the base writes, are made with.

    Attributes:
        tokenizer: it.
        unknown: the ids in it that the base does not know.
        turns: whether the base knows how its chat template begins a user's turn.
    """

    tokenizer: Any
    unknown: frozenset[int]
    turns: bool


def calibration_tokenizer(cfg, model, files: Files) -> Calibrating:
    """The tokenizer of the calibration prompts, and what the base knows of it.

    It is the run's, unless a prompt would hold a new token (by its chat template, say): then it is
    the base's own, with its own template, for that is how the base shows what it knows. A token is
    new where the base's own vocabulary has no such token at that id; the embeddings may have a row
    for it all the same, padded or reserved, that was never trained.

    Raises:
        ValueError: prompts hold tokens that the base does not know, new embeddings under FSDP2, or
            an adapter that goes on with other tokens.
    """
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.dict import DictDefault

    cfg = _as_data_is_told(cfg)
    tokenizer = load_tokenizer(cfg)
    rows = model.get_input_embeddings().num_embeddings
    check_tokens(cfg, len(tokenizer), rows)
    path, before = _own_tokenizer(cfg)
    base = (before or tokenizer).get_vocab()
    unknown = _unknown(tokenizer, base, rows)
    writes = files.config.protect.text == SELF
    if not unknown:
        return Calibrating(tokenizer, unknown, _knows_turns(tokenizer, before, writes))
    names = sorted(t for t, i in tokenizer.get_vocab().items() if i in unknown)
    grown = sum(i >= rows for i in unknown)
    if grown and is_fsdp2(cfg):
        raise ValueError(
            f"{grown} tokens are new to the base ({', '.join(names[:8])}), and new"
            " embeddings were not proved under FSDP2. Save a base that has them, or train under DDP"
        )
    _tell(cfg, names, grown)
    if unknown.isdisjoint(_read(tokenizer, files)):
        return Calibrating(tokenizer, unknown, _knows_turns(tokenizer, before, writes))
    LOG.info(
        "loki: calibration prompts would hold new tokens; they are made with the base's own"
        " tokenizer and chat template"
    )
    own = load_tokenizer(DictDefault({**cfg, **dict.fromkeys(_ADDING), "tokenizer_config": path}))
    unknown = _unknown(own, base, rows)
    if not unknown.isdisjoint(_read(own, files)):
        raise ValueError(
            f"the tokenizer of '{path}' has tokens without embeddings, and calibration"
            " prompts hold some of them: give the tokenizer that belongs to the base, or"
            " calibration prompts without them"
        )
    return Calibrating(own, unknown, True)


def _as_data_is_told(cfg):
    """The YAML with the chat template of its data sets, where they name one: they are told in it,
    whatever stands outside of them. Of several there is none that all are told in."""
    from axolotl.utils.dict import DictDefault

    told = [d for d in cfg.datasets or () if "chat_template" in str(d.type)]
    names = [getattr(d.chat_template, "value", d.chat_template) for d in told]
    named = {
        (name, d.chat_template_jinja if name == "jinja" else None)
        for name, d in zip(names, told, strict=True)
        if name not in (None, _DEFAULT)
    }
    if not named:
        return cfg
    if len(named) == 1 and _DEFAULT not in names and None not in names:
        ((name, jinja),) = named
        return DictDefault({**cfg, "chat_template": name, "chat_template_jinja": jinja})
    LOG.warning(
        "loki: the data sets are told in several chat templates (%s); the calibration and what the"
        " base writes, if it does, are told in %s, and that form alone is held",
        ", ".join(dict.fromkeys(str(name or _DEFAULT) for name in names)),
        f"`chat_template: {cfg.chat_template}`" if cfg.chat_template else "the tokenizer's own",
    )
    return cfg


def _knows_turns(tokenizer, own, writes: bool) -> bool:
    """Whether the base's own chat template begins a user's turn as the run's does.

    A base that was never taught a template writes anything behind its marks. If it `writes` what
    protects it, that is told.

    Args:
        own: the base's own tokenizer; None: there is none besides the run's.
    """
    if own is None or own.chat_template == tokenizer.chat_template:
        return True
    mine, theirs = _before_words(tokenizer), _before_words(own)
    if mine is None:
        return True  # nothing is begun for it
    # One of them may tell the model what it is before the user speaks.
    if theirs and (mine.endswith(theirs) or theirs.endswith(mine)):
        return True
    if writes:
        LOG.info(
            "loki: the base's own tokenizer has %s: to write dialogues the base goes on with a list"
            " of what people ask, and answers in the template of the run",
            "another chat template than the run"
            if theirs
            else "no chat template that begins a turn",
        )
    return False


def _before_words(tokenizer) -> str | None:
    """What the chat template puts before a user's words; None where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = [{"role": "user", "content": "Apples"}]
    try:
        text = tokenizer.apply_chat_template(asked, tokenize=False)
    except Exception as error:  # a template is a program of somebody else; `user_turn` tells
        LOG.debug("loki: the chat template refuses a user's turn: %s", error)
        return None
    before, begins = str(text).partition("Apples")[0], tokenizer.bos_token
    return before.replace(begins, "") if begins else before


def _own_tokenizer(cfg) -> tuple[str, Any]:
    """Where the base's own tokenizer lies, and it, before Axolotl adds to it; None: there is none.

    It lies beside the base, or where `tokenizer_config` says if there is none.
    """
    import transformers

    if cfg.tokenizer_use_mistral_common:  # which cannot be added to
        return cfg.tokenizer_config, None
    kind = getattr(transformers, cfg.tokenizer_type or "AutoTokenizer")
    given: dict[str, Any] = {"trust_remote_code": bool(cfg.trust_remote_code)}
    if cfg.revision_of_model:
        given["revision"] = cfg.revision_of_model
    if cfg.tokenizer_use_fast is not None:
        given["use_fast"] = cfg.tokenizer_use_fast
    for path in dict.fromkeys((cfg.base_model, cfg.tokenizer_config or cfg.base_model)):
        try:
            own = kind.from_pretrained(path, **given)
            # Of a folder without its files transformers makes one that knows no word.
            if own("A", add_special_tokens=False)["input_ids"]:
                break
        except (OSError, ValueError) as error:
            LOG.debug("loki: '%s' has no tokenizer: %s", path, error)
    else:
        return cfg.tokenizer_config, None
    return path, own


def _unknown(tokenizer, base: Mapping[str, int], rows: int) -> frozenset[int]:
    vocabulary = tokenizer.get_vocab().items()
    return frozenset(i for token, i in vocabulary if i >= rows or base.get(token) != i)


def _tell(cfg, names: list[str], grown: int) -> None:
    places = []
    if grown:
        made = "" if cfg.mean_resizing_embeddings else ", random (see `mean_resizing_embeddings`)"
        places.append(f"{grown} get embeddings that are made now{made} and saved with the adapter")
    if len(names) > grown:
        places.append(
            f"{len(names) - grown} take rows that the base's embeddings have for no token of that"
            " name, padded or reserved, and likely never trained"
        )
    LOG.warning(
        "loki: %d tokens are new to the base (%s%s): %s. Their embeddings do not train, though"
        " Axolotl wants that (`lora_modules_to_save`): the model learns what stands around them",
        len(names),
        ", ".join(names[:8]),
        ", ..." if len(names) > 8 else "",
        "; ".join(places),
    )


def _read(tokenizer, files: Files) -> set[int]:
    """All ids that analysing and protecting read."""
    from ..analysing.calibration.prompts import load_prompts
    from ..analysing.calibration.rendering import chat
    from ..protecting.texts import protecting_prompts

    found: set[int] = set()
    if files.config.protect.text == SELF:  # what the model writes begins with these
        found |= {i for i in (tokenizer.bos_token_id,) if i is not None}
        if getattr(tokenizer, "chat_template", None):
            found.update(chat(tokenizer, [("user", "Apples")], "a user's turn"))
    if files.inputs.records:
        settings = files.config.calibration.model_dump()
        prompts = load_prompts(tokenizer, **settings, records=files.inputs.records).prompts
        found.update(p.target for p in prompts if p.target is not None)
        texts = protecting_prompts(tokenizer, files.config, files.inputs)
        found.update(*(text.ids for text in texts))
    return found
