"""What arms may know of a base and a task: texts, scores, moments; and what they learn from.

It has the names of `benchmarks.forgetting.building.Context`, whose builders work with it.
"""

from __future__ import annotations

import random
from functools import cached_property

import torch
from tqdm import tqdm

from benchmarks.forgetting import choosing
from benchmarks.forgetting.base import padded
from benchmarks.real.base import Base
from benchmarks.real.scoring import Asked
from loki_plugin import attribute, select_rows
from loki_plugin.choices import ALL
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting.eigen import leading, soften
from loki_plugin.protecting.finding import targeted
from loki_plugin.protecting.moments import Moments, Reader, Site, batched
from loki_plugin.protecting.solving import Wanted, solve


class Lab(Base):
    """`Base` with what arms ask for."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self._directions: dict[tuple, dict[str, torch.Tensor]] = {}

    @property
    def base(self) -> Lab:
        return self

    @cached_property
    def scores(self) -> torch.Tensor:
        """[N, L, H] attributions of the calibration prompts."""

        def analyse():
            found = []
            for start in range(0, len(self.prompts), 8):
                ids, mask = padded(self.prompts[start : start + 8])
                found.append(attribute(self.known, ids.to(self.device), mask.to(self.device)))
                print(f"attributed {start + len(ids)} of {len(self.prompts)} prompts", flush=True)
            return torch.cat(found)

        return self._kept("scores", analyse)

    def rows(self, quota: float, strategy: str, magnitude: bool = False) -> list[torch.Tensor]:
        if strategy == "smallest_weight":
            return choosing.smallest_weights(self, quota)
        # Random rows need no attribution, only its shape.
        if strategy == "random":
            anatomy = find_anatomy(self.known)
            scores = torch.zeros(1, len(anatomy.down), anatomy.down[0].weight.shape[0])
        else:
            scores = self.scores
        return select_rows(scores, quota, strategy, magnitude=magnitude, seed=self.seed)

    def directions(self, energy: float, of: str = "prompts", soft: bool = False) -> list:
        """Of the down-projections, as `benchmarks.forgetting`'s builders ask for them."""
        known = self.protected(energy, of=of, soft=soft)
        return [known[name] for name in find_anatomy(self.known).names]

    def protected(
        self,
        energy: float | None = 0.99,
        count: float | None = None,
        of: str = "both",
        soft: bool = True,
        own: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """V [I, u] of what every linear layer of the decoder reads, by the layer's name: what
        `find_directions` finds, from moments that are kept.

        `count` gives the number of directions, as a part of I, instead of a share of the energy;
        `own` the number of texts of the base's own, instead of all.
        """
        key = (energy if count is None else None, count, of, soft, own)
        if key not in self._directions:
            found: dict[str, torch.Tensor] = {}
            for site, moments in self.moments(of, own):
                number = None if count is None else int(count * site.size)
                wanted = Wanted(key[0], number, soft)
                basis = solve(site, moments, None, wanted, None, 10**9).basis
                found |= dict.fromkeys(site.names, basis)
            self._directions = {key: found}  # one is much; arms that share it run in turn
        return self._directions[key]

    def blind(self) -> list[torch.Tensor]:
        """Soft directions of 99 % as 0.6.0 found them: of Σ x xᵀ, which one token can fill."""
        return [soften(leading(m, 0.99)) for m in self.raw_moments()]

    def raw_moments(self) -> list[torch.Tensor]:
        """Σ x xᵀ of what the down-projections read on the prompts."""

        def find():
            down = find_anatomy(self.known).down
            moments = [torch.zeros(m.in_features, m.in_features) for m in down]

            def adding(i):
                def hook(module, args):
                    x = args[0].flatten(0, -2)
                    moments[i].addmm_(x.T, x)

                return hook

            handles = [m.register_forward_pre_hook(adding(i)) for i, m in enumerate(down)]
            with torch.no_grad():
                for prompt in self.prompts:
                    self.known.get_decoder()(torch.tensor([prompt], device=self.device))
            for handle in handles:
                handle.remove()
            return moments

        return self._kept("raw", find)

    def moments(self, of: str = "both", own: int | None = None) -> list[tuple[Site, Moments]]:
        """The product's own moments of `prompts`, of what is `written`, `plain` or `begun`, or of
        `both`: the prompts and what is written."""
        if of.startswith("both"):
            written = of.partition("-")[2] or "written"
            pairs = zip(self.moments("prompts"), self.moments(written, own), strict=True)
            return [(site, _added(a, b)) for (site, a), (_, b) in pairs]

        def find():
            alone = of in ("plain", "begun")
            texts = getattr(self, of) if alone else self.texts(of, own)
            return [(vars(site), vars(found)) for site, found in self.read(texts, of)]

        way = self._way if of == "written" else ""
        kept = self._kept(f"inputs-{of}{way}" + (f"-{own}" if own else ""), find)
        return [(Site(**site), Moments(**found)) for site, found in kept]

    def read(self, texts: list[list[int]], told: str) -> list[tuple[Site, Moments]]:
        """The product's own moments of any texts."""
        reader = Reader(self.known, find_anatomy(self.known), targeted(self.known, ALL))
        every = batched(texts)
        sites = reader.sites(batched(self.prompts)[0])  # the lengths of sinks are theirs
        moments: dict[int, Moments] = {}
        with torch.no_grad(), tqdm(total=len(every), desc=f"moments of {told}") as bar:
            reader.add(moments, dict(enumerate(sites)), every, bar)
        return [(site, moments[i]) for i, site in enumerate(sites)]

    def stream(self, arm, count: int):
        """Batches of `count` sequences, shuffled anew each pass; replay as the arm has it."""
        assert self.task is not None
        draw = random.Random(f"{self.task.name}/{self.seed}/{self.draw}")
        left: list[Asked] = []
        while True:
            batch = []
            for _ in range(count):
                if arm.replay and draw.random() < arm.replay[0]:
                    batch.append(draw.choice(getattr(self, arm.replay[1])))
                    continue
                if not left:
                    left = draw.sample(self.task.learned, len(self.task.learned))
                batch.append(left.pop())
            yield batch


def _added(one: Moments, other: Moments) -> Moments:
    """The moments of both texts together."""

    def total(a, b):
        return b if a is None else a if b is None else a + b

    return Moments(
        total(one.ordinary, other.ordinary),
        total(one.sinks, other.sinks),
        one.tokens + other.tokens,
        one.sink_tokens + other.sink_tokens,
        max(one.longest, other.longest),
    )
