"""From a loaded model to its rows: calibration, score log, attribution, selection."""

from __future__ import annotations

import logging

from torch import nn

from .anatomy import find_anatomy
from .args import LokiConfig
from .fingerprint import fingerprint
from .rows import RowSelection

LOG = logging.getLogger("loki_plugin")


def choose_rows(model: nn.Module, tokenizer, config: LokiConfig) -> RowSelection:
    raise NotImplementedError
