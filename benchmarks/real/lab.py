"""What arms may know of a base and a task; what is costly is made once and kept in a folder.

It has the names of `benchmarks.forgetting.building.Context`, whose builders work with it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.forgetting import choosing
from benchmarks.forgetting.base import padded
from benchmarks.real import bases, probes, tasks
from benchmarks.real.data import Data
from benchmarks.real.scoring import Asked, check_head
from loki_plugin import attribute, select_rows
from loki_plugin.analysing.calibration.prompts import load_prompts, load_texts
from loki_plugin.analysing.calibration.sources import record_of
from loki_plugin.choices import ALL
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.writing import replacing
from loki_plugin.protecting.eigen import leading, soften
from loki_plugin.protecting.finding import Wanted, solve, targeted
from loki_plugin.protecting.moments import Moments, Reader, Site, batched
from loki_plugin.protecting.own_text import write_texts


class Lab:
    """One base, one device, one data folder.

    Attributes:
        seed, draw: of what is drawn once, and of how new weights start, as in `Context`.
        task: the task of the run that is being built.
    """

    def __init__(
        self,
        base: str,
        data: Data,
        amount: str = "brief",
        device: str = "cpu",
        work: Path | None = None,
    ):
        self.name, self.data, self.device = base, data, torch.device(device)
        self.folder = bases.path(base)
        self.amount = probes.AMOUNTS[amount]
        self.work = (work or bases.folder() / "work") / base
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.seed = self.draw = 0
        self.task: tasks.Task | None = None
        self._tasks: dict[tuple[str, int], tasks.Task] = {}
        self._directions: dict[tuple, dict[str, torch.Tensor]] = {}

    @property
    def base(self) -> Lab:
        return self

    def model(self) -> nn.Module:
        """A fresh copy of the base, in float32."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.to(self.device)

    @cached_property
    def known(self) -> nn.Module:
        """A copy that nobody trains."""
        model = self.model().eval().requires_grad_(False)
        check_head(model)
        return model

    @cached_property
    def head(self) -> torch.Tensor:
        return self.known.get_output_embeddings().weight.detach()

    @cached_property
    def probes(self) -> probes.Probes:
        return probes.load(self.known, self.tokenizer, self.data, self.amount, self.work)

    def teach(self, task: str, seed: int, draw: int) -> tasks.Task:
        """Set the task, the seed and the start of new weights of the next run."""
        key = (task, seed)
        if key not in self._tasks:
            self._tasks[key] = tasks.make(task, self.data, self.tokenizer, seed, self.amount.tested)
        self.task, self.seed, self.draw = self._tasks[key], seed, draw
        return self.task

    # What arms may use of the base.

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Calibration prompts, some of those that the package ships."""
        found = load_prompts(self.tokenizer).prompts[:: self.amount.every]
        return [list(p.ids) for p in found]

    @cached_property
    def written(self) -> list[list[int]]:
        """Dialogues and plain text that the base writes by itself (`protect.text: self`)."""

        count, tokens = self.amount.written, self.amount.tokens

        def write():
            said = write_texts(
                self.known, self.tokenizer, count=count, tokens=tokens, batch_size=32
            )
            records = [record_of(row, f"text {i}") for i, row in enumerate(said)]
            return [list(ids) for ids in load_texts(self.tokenizer, records)]

        return self._kept(f"written-{count}-{tokens}", write)

    @property
    def text(self) -> list[list[int]]:
        """Plain text for arms that want some besides the prompts: what the base writes."""
        return self.written

    @property
    def own(self) -> list[Asked]:
        """The same for replay (SA-SFT): all of it is learned again."""
        return [Asked(ids, 1) for ids in self.written if len(ids) > 1]

    @cached_property
    def real(self) -> list[Asked]:
        """Real data for replay: people's text and dialogues, none of it measured.

        Of every kind of text the second piece in each eighth of it, and dialogues that are not
        among the probes. A user has such data seldom; it is the rival that they would have.
        """
        measured = {tuple(a.ids[:16]) for a in sum(self.probes.texts.values(), [])}
        measured |= {tuple(a.ids[: a.first]) for a in (*self.probes.own, *self.probes.people)}
        found = []
        for kind in self.data.kinds:
            lines = [x for x in self.data.text(kind).splitlines() if x.strip()]
            for k in range(8):
                start = (8 * k + 6) * len(lines) // 64
                ids = self.tokenizer("\n".join(lines[start : start + 40])[:2000])["input_ids"][:96]
                found.append(Asked(ids, 1))
        for row in self.data.records("chat_userinstr_252"):
            first, second = (m["content"] for m in row["messages"][:2])
            asked = tasks.dialogue(self.tokenizer, [("user", first)], second)
            if len(asked.ids) <= 192:
                found.append(asked)
        return [a for a in found if not measured & {tuple(a.ids[:16]), tuple(a.ids[: a.first])}]

    def texts(self, of: str, own: int | None = None) -> list[list[int]]:
        """`prompts`, what is `written`, or `both`; of what is written all, or `own` of each kind
        alike."""
        if of == "prompts":
            return self.prompts
        if of == "talks":  # some people's dialogues too, as a user would give them
            return [*self.texts("both", own), *map(list, self.talks)]
        written = self.written
        if own is not None:
            written = written[:: max(1, len(written) // own)][:own]
        return self.prompts + written if of == "both" else written

    @cached_property
    def talks(self) -> dict[tuple[int, ...], int]:
        """Dialogues of people that are not measured, in the form of the task's; by their token ids
        the place of the last one before the answer."""
        every = [a for a in self.real if a.first > 1 and len(a.ids) <= 160]
        return {tuple(a.ids): a.first - 1 for a in every}

    @cached_property
    def _turn(self) -> list[int]:
        """What the chat template puts before an answer."""
        if not self.tokenizer.chat_template:
            return []
        asked = [{"role": "user", "content": "Apples"}]
        whole, before = (
            self.tokenizer.apply_chat_template(asked, add_generation_prompt=b, return_dict=False)
            for b in (True, False)
        )
        return whole[len(before) :]

    def mark(self) -> list[int]:
        """The tokens that stand before every answer of the task."""
        assert self.task is not None
        before = [a.ids[: a.first] for a in self.task.learned]
        found: list[int] = []
        for size in range(1, min(map(len, before)) + 1):
            if len({tuple(ids[-size:]) for ids in before}) > 1:
                break
            found = before[0][-size:]
        return found

    def starts(self, ids: list[int], mark: list[int] | None = None) -> list[int]:
        """Behind which tokens of a text an answer begins: behind `mark`, or a turn of the chat
        template; of a base without turns, where a calibration prompt ends."""
        turn = self._turn if mark is None else mark
        if not turn and tuple(ids) in self.talks:
            return [self.talks[tuple(ids)]]
        size = len(turn)
        if not turn:
            return [len(ids) - 1] if ids in self.prompts else []
        return [i + size - 1 for i in range(len(ids) - size + 1) if ids[i : i + size] == turn]

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
            for site, moments in self._moments(of, own):
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

    def _moments(self, of: str, own: int | None = None) -> list[tuple[Site, Moments]]:
        """The product's own moments of `prompts`, of what is `written`, or of `both`."""
        if of == "both":
            pairs = zip(self._moments("prompts"), self._moments("written", own), strict=True)
            return [(site, _added(a, b)) for (site, a), (_, b) in pairs]

        def find():
            modules = targeted(self.known, ALL)
            reader = Reader(self.known, find_anatomy(self.known), modules)
            texts = self.texts(of, own)
            every = batched(texts)
            sites = reader.sites(batched(self.prompts)[0])  # the lengths of sinks are theirs
            moments: dict[int, Moments] = {}
            with torch.no_grad(), tqdm(total=len(every), desc=f"moments of {of}") as bar:
                reader.add(moments, dict(enumerate(sites)), every, bar)
            return [(vars(site), vars(moments[i])) for i, site in enumerate(sites)]

        kept = self._kept(f"inputs-{of}" + (f"-{own}" if own else ""), find)
        return [(Site(**site), Moments(**found)) for site, found in kept]

    def _kept(self, name: str, make: Callable):
        """What `make` gives, from the work folder where it is there already."""
        a = self.amount
        state = json.dumps(
            [a.every, a.written, a.tokens, (self.folder / "config.json").read_text()]
        )
        file = self.work / f"{name}-{hashlib.sha256(state.encode()).hexdigest()[:8]}.pt"
        if file.is_file():
            return torch.load(file, weights_only=True)
        print(f"made once, kept in '{file}'", flush=True)
        made = make()
        with replacing(file) as temporary:
            torch.save(made, temporary)
        return made

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
