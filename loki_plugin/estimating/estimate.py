"""The estimate of a run: its parts put together, as figures and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..analysing.attribution.batches import auto_batch
from ..analysing.attribution.memory import Memory
from ..choices import SELF, TASK_TOKENS
from ..model.anatomy import linear_sizes
from ..protecting.eigen import BUDGET, EXACT_COPIES
from .base import quantised_linears, weight_bytes
from .disk import adapter_bytes, score_log_bytes
from .finding import OWN_TOKENS, finding
from .planned import Planned, changes
from .protection import Protection
from .reading import direction_counts, reads
from .training import Shapes, state_bytes, trainable
from .work import CARDS, Work

# What CUDA, its libraries and the driver take of a card before the first tensor.
CONTEXT = 500_000_000


@dataclass(frozen=True)
class Estimator(Protection):
    """A model and a `loki:` block; the run's other settings may change.

    Attributes:
        analysed: whether the run analyses at all (no rows file).
    """

    analysed: bool

    def parameters(self) -> tuple[int, int]:
        """Those that train, and all of the base."""
        trained = trainable(self.anatomy.input_sizes, self.counts, self.config.rank, self._whole)
        each, _ = self._by_layer(trained)
        return sum(each), sum(p.numel() for p in self.model.parameters())

    def disk(self, run: Planned, card: int) -> dict[str, int]:
        """Bytes of the files; of directions the most that there can be."""
        anatomy = self.anatomy
        return {
            "adapter_bytes": adapter_bytes(
                anatomy.names,
                anatomy.input_sizes,
                anatomy.hidden_size,
                self.counts,
                self.config.rank,
                run.adapter_dtype,
                {name: (*size, self.linear_rank) for name, size in self.linears().items()},
            ),
            "score_log_bytes": score_log_bytes(
                len(self.lengths) if self.analysed else 0, anatomy.num_layers, anatomy.hidden_size
            ),
            "directions_bytes": self.directions_bytes(card),
        }

    def analysis(self, run: Planned, card: int) -> dict[str, Any]:
        """Memory of the analysis on a card of so many gigabytes, its batch, and its time."""
        weights = weight_bytes(self.model, run.stored)
        memory = Memory.of(self.model, self.anatomy, run.stored.dtype, bool(run.stored.bits))
        settings, longest = self.config.attribution, max(self.lengths)
        batch = settings.batch_size
        if not isinstance(batch, int):
            free = {place: 10**9 * card - weights - CONTEXT for place in memory.places}
            batch = auto_batch(memory, free, longest, settings.steps, len(self.lengths))
        found = {
            "prompts": len(self.lengths) if self.analysed else 0,
            "longest_prompt_tokens": longest,
            "weights_bytes": weights,
            "batch_size": batch,
            "least_bytes": weights + memory.peak(1, longest, settings.steps),
            "bytes": weights + memory.peak(batch, longest, settings.steps),
        }
        work = Work.of(self.model, self.anatomy)
        if self.config.protect.reads:
            found |= self._finding(run, card, weights, work)
        flops = sum(work.analysis(n, settings.steps) for n in self.lengths)
        passes = 3 * -(-len(self.lengths) // batch)  # prefix, stack, backward
        times = self._times(run, flops if self.analysed else 0, passes if self.analysed else 0)
        return found | {"seconds": times}

    def _finding(self, run: Planned, card: int, weights: int, work: Work) -> dict[str, Any]:
        """Memory and time of finding directions; the time of the model's writing is not in it."""
        found, _ = self._directions(card)
        free, still = 10**9 * card - weights - CONTEXT, self.reads(held=False)
        tokens = sum(self.lengths) + (OWN_TOKENS if self.config.protect.text == SELF else 0)
        parts = []
        if found:
            sizes, counts = [each.size for each, _ in found], [count for _, count in found]
            parts.append((tokens, finding(sizes, counts, tokens, free)))
        if still:
            sizes = [each.size for each in still]
            counts, _ = direction_counts(self.config.protect, sizes, 4 * sum(s * s for s in sizes))
            both = tokens + TASK_TOKENS
            parts.append((both, finding(sizes, counts, both, free, decompositions=1)))
        flops = sum(2 * count * sum(work.layer) * part.passes for count, part in parts)
        batches, wide = (sum(getattr(p, k) for _, p in parts) for k in ("batches", "wide"))
        # Where A is set from them the task's moments are there too.
        work_on = [EXACT_COPIES * 4 * each.size**2 for each, _ in found]
        work_on += [(EXACT_COPIES + 1) * 4 * each.size**2 for each in still]
        return {
            "finding_directions_bytes": weights + max(BUDGET, *work_on),
            "finding_directions_seconds": self._times(run, flops, batches, wide),
        }

    def training(self, run: Planned, card: int = 24) -> dict[str, Any]:
        """Memory of the training step by its parts, and the time of an optimizer step."""
        rank, sizes = self.config.rank, self.anatomy.input_sizes
        of_rows = trainable(sizes, self.counts, rank, self._whole)
        tensors = [n for n in of_rows if n]
        if rank is not None:
            pairs = zip(sizes, self.counts, strict=True)
            both = [(size * (count != self._whole), count) for size, count in pairs]
            tensors = [rank * n for pair in both for n in pair if n and pair[1]]
        size = run.adapter_dtype.itemsize
        of_linears = [n for pair in self.linears().values() for n in pair]
        tensors += [self.linear_rank * n for n in (of_linears[1::2] if self.still else of_linears)]
        cast = size > run.stored.dtype.itemsize
        each, ranks = self._by_layer(of_rows)
        whole = sum(trainable(sizes, self.counts, rank)) + self.linear_rank * sum(of_linears)
        beside = self._kept_beside(cast, run.stored.dtype.itemsize, run.checkpointing)
        gradients = [size * n for n in each]
        shapes = Shapes.of(self.model, self.anatomy, run.stored)
        anchor = self.anchor_tokens()
        moments = shapes.activations(
            run.tokens,
            ranks,
            gradients,
            run.checkpointing,
            beside=beside,
            cast=cast,
            logits=run.logits,
            anchor=anchor,
            waiting=run.micro_batches > 1,
            directions=self._directions_at_once(card),
            folded=self._folded(run, card),
        )
        states = state_bytes(run.optimizer, tensors, run.adapter_dtype)
        resident = {
            "weights_bytes": weight_bytes(self.model, run.stored),
            "adapter_bytes": size * whole,
            "optimizer_bytes": 8 * sum(tensors) if states is None else states,
            "directions_bytes": self.directions_bytes(card),
        }
        work = Work.of(self.model, self.anatomy)
        fixed = whole - sum(each)
        flops = work.training(run.tokens, run.length, sum(each), run.checkpointing, fixed)
        # The first micro batch of one step in `anchor_every` has the anchor.
        steps = self.config.protect.anchor_every
        flops = run.micro_batches * flops + work.anchor(anchor) / steps
        passes = (3 if run.checkpointing else 2) * run.micro_batches + 2 * bool(anchor) / steps
        plain = self.protection_flops(run, card, anchored=False)
        wide = run.micro_batches * plain + (self.protection_flops(run, card) - plain) / steps
        return {
            **resident,
            "activations_bytes": moments,
            "bytes": sum(resident.values()) + max(moments.values()),
            "optimizer_known": states is not None,
            "step_seconds": self._times(run, flops, passes, wide),
        }

    def _by_layer(self, of_rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Per decoder layer: parameters that train, `of_rows` those of each down-projection, and
        the width of its A."""
        places = self._places()
        each, ranks = [0] * len(self.anatomy.layers), [0] * len(self.anatomy.layers)
        for i, count, own in zip(self.anatomy.places, self.counts, of_rows, strict=True):
            each[i] += own
            ranks[i] = (self.config.rank or count) if count else 0
        for name, sizes in self.linears().items():
            trained = sizes[1] if self.still else sum(sizes)
            each[places[id(self.model.get_submodule(name))]] += self.linear_rank * trained
        return each, ranks

    def _kept_beside(self, cast: bool, size: int, checkpointing: bool) -> list[int]:
        """Per decoder layer, bytes that one token keeps for the LoRA of further linears: what A
        makes of what they read, and, where A trains, this too, once for all that read it, or for
        each where it is cast. Less than nothing where a low-rank A of rows stands still: of what
        the down-projection reads nothing is kept then, though a checkpoint makes it again."""
        found, places = [0] * len(self.anatomy.layers), self._places()
        inputs = self.anatomy.input_sizes
        for i, count, own in zip(self.anatomy.places, self.counts, inputs, strict=True):
            if count and count == self._whole and not checkpointing:
                found[i] -= size * own
        for each in reads(self.model, self.anatomy, self.config.targets):
            names = [n for n, _ in each.linears if n not in self.anatomy.names]
            if names:
                kept = self.linear_rank * len(names)
                if not self.still:
                    kept += each.size * (len(names) if cast else 1)
                found[places[id(self.model.get_submodule(names[0]))]] += size * kept
        return found

    def _places(self) -> dict[int, int]:
        """Of every module inside a decoder layer, by its id, the layer."""
        return {id(m): i for i, layer in enumerate(self.anatomy.layers) for m in layer.modules()}

    def _times(
        self, run: Planned, flops: float, passes: float, wide: float = 0.0
    ) -> dict[str, float]:
        """Seconds on the named cards; each pass makes every 4-bit weight whole once; `wide`:
        operations in float32."""
        whole = 0.0
        if run.stored.bits:
            sizes = map(linear_sizes, quantised_linears(self.model))
            whole = passes * sum(s[0] * s[1] for s in sizes if s)
        return {card.name: round(card.seconds(flops, whole, wide), 6) for card in CARDS}

    def facts(self, run: Planned, card: int) -> dict[str, Any]:
        """All figures, for `--json`."""
        trained, base = self.parameters()
        analysis, training = self.analysis(run, card), self.training(run, card)
        return {
            "trainable_parameters": trained,
            "base_parameters": base,
            "rows_per_layer": list(self.counts),
            "disk": self.disk(run, card),
            "analysis": analysis,
            "training": training,
            "card": self.fits(run, card),
        }

    def fits(self, run: Planned, card: int) -> dict[str, Any]:
        """Whether both stages fit a card, and if not, the YAML's lines that make them fit."""
        analysis, training = self._room(run, card)
        lines, then = self._lines(run, card) if min(analysis, training) < 0 else ([], True)
        return {
            "gigabytes": card,
            "analysis": analysis >= 0,
            "training": training >= 0,
            "change": lines,
            "then_fits": then,
        }

    def _room(self, run: Planned, card: int) -> tuple[int, int]:
        """Bytes of a card that analysis and training leave; below zero they do not fit."""
        room = 10**9 * card - CONTEXT
        analysis, training = self.analysis(run, card), self.training(run, card)
        finding = analysis.get("finding_directions_bytes", 0)
        needed = max(analysis["least_bytes"], finding) if self.analysed else finding
        return room - needed, room - training["bytes"]

    def _lines(self, run: Planned, card: int) -> tuple[list[str], bool]:
        """One change that suffices, or else so many of them; and whether they do."""
        known = changes(run)
        for line, fields in known:
            if min(self._room(replace(run, **fields), card)) >= 0:
                return [line], True
        lines: list[str] = []
        for line, fields in known:
            run = replace(run, **fields)
            if line.startswith("sequence_len"):  # the shorter one takes the other's place
                lines = [each for each in lines if not each.startswith("sequence_len")]
            lines.append(line)
            if min(self._room(run, card)) >= 0:
                return lines, True
        return lines, False
