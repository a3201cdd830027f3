"""The files that choosing rows and protecting inputs need, read before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from .analysing.calibration.prompts import read_texts
from .analysing.calibration.sources import Record, load_records
from .args import LokiConfig
from .choices import SELF, SOURCE
from .rows import RowSelection


@dataclass(frozen=True)
class Inputs:
    """What was read.

    Attributes:
        records: of the calibration source.
        excluded: the rows that must not train again.
        texts: of the file of `protect.text`.
        turns: whether the model knows the chat template that its texts are made with.
    """

    records: list[Record] = field(default_factory=list)
    excluded: list[RowSelection] = field(default_factory=list)
    texts: list[Record] = field(default_factory=list)
    turns: bool = True

    @classmethod
    def read(cls, config: LokiConfig, analysed: bool = True, watched: bool = False) -> Inputs:
        """Read what a run of `config` needs; `analysed` is False where its rows are given.

        Args:
            watched: whether the run goes by what its evaluations find forgotten.

        The shipped questions are always there, for the report says how much a run forgot.

        Raises:
            ValueError: a file that cannot be read, or a faulty record or row in it.
        """
        source, text = config.calibration, config.protect.text
        needed = (
            (analysed and config.needs_scores)
            or config.protect.on
            or watched
            or (config.report and source.source == SOURCE)
        )
        return cls(
            load_records(source.source, **source.reading) if needed else [],
            [RowSelection.load(path) for path in config.exclude],
            read_texts(text) if text and text != SELF else [],
        )
