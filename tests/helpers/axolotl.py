"""Axolotl's own configuration loading, in this process."""

from __future__ import annotations

import json


def load(config: dict):
    cfg, error = load_after(config)
    if error:
        raise error
    return cfg


def load_after(config: dict):
    """(the validated configuration, None), or (the one that was handed in, the error)."""
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(json.loads(json.dumps(config)))
    try:
        return load_cfg(cfg), None
    except ValueError as error:
        return cfg, error
