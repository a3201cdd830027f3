"""What protection takes of a run: directions and the products with them, the anchor's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..args import LokiConfig
from ..choices import LINEAR_RANK, PROTECT_GB, SELF, TEXT_COUNT
from ..model.anatomy import Anatomy, linear_sizes
from ..model.linears import chosen
from ..protecting.packed import BYTES, PART
from .finding import OWN_TOKENS
from .planned import Planned
from .reading import Reads, direction_counts, reads


@dataclass(frozen=True)
class Protection:
    """What the protection of a run takes, from a model and a `loki:` block.

    Attributes:
        counts: rows that train in each layer.
        lengths: tokens of each calibration prompt.
    """

    model: nn.Module
    anatomy: Anatomy
    config: LokiConfig
    counts: Sequence[int]
    lengths: Sequence[int]

    @property
    def still(self) -> bool:
        """Whether low-rank updates of whole linears train their B alone."""
        return self.config.protect.freeze_a

    @property
    def _whole(self) -> int:
        """So many rows of a down-projection train B alone at a rank; 0: none do."""
        return self.anatomy.hidden_size if self.still and self.config.rank is not None else 0

    @property
    def linear_rank(self) -> int:
        return self.config.linear_rank or self.config.rank or LINEAR_RANK

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the further linears that carry a LoRA."""
        names = chosen(self.model, self.anatomy, self.config.targets)
        sizes = {name: linear_sizes(self.model.get_submodule(name)) for name in names}
        return {name: size for name, size in sizes.items() if size}

    def reads(self, held: bool = True) -> list[Reads]:
        """What the targeted linears read; nothing where no input is protected. With `held`, of
        those whose directions are held in training; else of those whose A stands still."""
        if not self.config.protect.reads:
            return []
        pairs = zip(self.anatomy.names, self.counts, strict=True)
        rows = {name for name, count in pairs if count != self._whole}
        found = reads(self.model, self.anatomy, self.config.targets)
        return [r for r in found if (not self.still or r.linears[0][0] in rows) == held]

    def directions_bytes(self, card: int) -> int:
        """Of V, on the device and on disk, at most."""
        found, itemsize = self._directions(card)
        return int(itemsize * sum(each.size * count for each, count in found))

    def _directions_at_once(self, card: int) -> int:
        """Bytes of the directions that are made float32 at once, to read through them."""
        found, itemsize = self._directions(card)
        if itemsize == 4:  # they are float32
            return 0
        several = PART if itemsize == BYTES else None  # columns; None: all
        return max((4 * r.size * (min(n, several) if several else n) for r, n in found), default=0)

    def _directions(self, card: int) -> tuple[list[tuple[Reads, int]], float]:
        """Each input and how many directions of it there are at most; bytes of one number."""
        found = self.reads()
        sizes, room = [each.size for each in found], self.direction_room(card)
        counts, itemsize = direction_counts(self.config.protect, sizes, room)
        return list(zip(found, counts, strict=True)), itemsize

    def direction_room(self, card: int) -> int:
        """Bytes that the directions of a share may take on a card of so many gigabytes."""
        return int(10**9 * (self.config.protect.memory or min(card / 10, PROTECT_GB)))

    def _folded(self, run: Planned, card: int) -> int:
        """Bytes of every A P, in the dtype that is computed in; few tokens make none."""
        tokens = max(run.tokens, self.anchor_tokens())
        size = min(run.adapter_dtype.itemsize, run.stored.dtype.itemsize)
        sizes = [(width, inputs) for width, inputs, count in self._reading(card) if count]
        return sum(size * width * inputs for width, inputs in sizes if width <= tokens)

    def protection_flops(self, run: Planned, card: int, anchored: bool = True) -> float:
        """Of one micro batch: A goes through its P once, and its gradient for each pass, that of
        an anchor too where it is `anchored`: 4 r I u each. Few tokens go through P instead,
        forwards and backwards."""
        few, anchor = 3 if run.checkpointing else 2, anchored * self.anchor_tokens()

        def through(width: int) -> int:
            made = run.tokens >= width  # A P
            found = 2 * width if made else few * run.tokens
            return found + (2 * anchor if anchor < width else width if made else 2 * width)

        read = self._reading(card)
        return float(sum(4 * through(width) * inputs * count for width, inputs, count in read))

    def _reading(self, card: int) -> list[tuple[int, int, int]]:
        """Of each protected linear r, I and u."""
        found, _ = self._directions(card)
        rows = dict(zip(self.anatomy.names, self.counts, strict=True))
        return [
            (self._width(name, rows), each.size, count)
            for each, count in found
            for name, _ in each.linears
        ]

    def _width(self, name: str, rows: Mapping[str, int]) -> int:
        if name not in rows:
            return self.linear_rank
        return (self.config.rank or rows[name]) if rows[name] else 0

    def anchor_tokens(self) -> int:
        """Of the anchor texts of one step, on average; of the model's own at most."""
        settings = self.config.protect
        mean = sum(self.lengths) / len(self.lengths)
        if settings.text == SELF:
            mean = OWN_TOKENS / TEXT_COUNT
        return round(settings.anchor_batch * mean) if settings.anchor else 0
