"""Tokens that the YAML adds: the base that is analysed does not know them yet."""

from __future__ import annotations

import logging

from .files import Files
from .sharding import is_fsdp2

LOG = logging.getLogger("loki_plugin")


def calibration_tokenizer(cfg, model, files: Files):
    """The tokenizer of the calibration prompts, before Axolotl makes embeddings for new tokens.

    It is the run's, unless a prompt would hold a new token (by its chat template, say): then it is
    the base's own, with its own template, for that is how the base shows what it knows.

    Raises:
        ValueError: prompts hold tokens that the base does not know, or new tokens under FSDP2.
    """
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.dict import DictDefault

    tokenizer = load_tokenizer(cfg)
    known = model.get_input_embeddings().num_embeddings
    new = [token for token, i in tokenizer.get_vocab().items() if i >= known]
    if not new:
        return tokenizer
    if is_fsdp2(cfg):
        raise ValueError(
            f"{len(new)} tokens are new to the base ({', '.join(sorted(new)[:8])}), and new"
            " embeddings were not proved under FSDP2. Save a base that has them, or train under DDP"
        )
    LOG.warning(
        "loki: %d tokens are new to the base (%s%s): their embeddings are made now, saved with the"
        " adapter, and do not train%s",
        len(new),
        ", ".join(sorted(new)[:8]),
        ", ..." if len(new) > 8 else "",
        ""
        if cfg.mean_resizing_embeddings
        else "; they are random, unless you set `mean_resizing_embeddings: true`",
    )
    if _largest_id(tokenizer, files) < known:
        return tokenizer
    LOG.info(
        "loki: calibration prompts would hold new tokens; they are made with the base's own"
        " tokenizer and chat template"
    )
    added = dict.fromkeys(("tokens", "special_tokens", "added_tokens_overrides", "chat_template"))
    own = load_tokenizer(DictDefault({**cfg, **added}))
    if _largest_id(own, files) >= known:
        raise ValueError(
            f"the tokenizer of '{cfg.base_model}' has tokens without embeddings, and calibration"
            " prompts hold some of them: give the tokenizer that belongs to the base, or"
            " calibration prompts without them"
        )
    return own


def _largest_id(tokenizer, files: Files) -> int:
    """Of all ids that analysing and protecting read."""
    from ..analysing.calibration.prompts import load_prompts
    from ..protecting.preparing import protecting_prompts

    if not files.inputs.records:
        return -1  # nothing is read
    settings = files.config.calibration.model_dump()
    prompts = load_prompts(tokenizer, **settings, records=files.inputs.records).prompts
    targets = [p.target for p in prompts if p.target is not None]
    read = protecting_prompts(tokenizer, files.config, files.inputs)
    return max(max(map(max, read)), *targets, 0)
