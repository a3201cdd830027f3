"""What arms may know of a base and a task; what is costly is made once and kept in a folder.

It has the names of `benchmarks.forgetting.building.Context`, whose builders work with it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.forgetting import choosing
from benchmarks.forgetting.base import padded
from benchmarks.real import bases, probes, tasks
from benchmarks.real.data import Data
from benchmarks.real.scoring import Asked, batches, check_head
from loki_plugin import attribute, input_directions, select_rows
from loki_plugin.analysing.calibration.prompts import load_prompts, load_texts
from loki_plugin.analysing.calibration.sources import record_of
from loki_plugin.analysing.eigen import leading, soften
from loki_plugin.analysing.own_text import write_texts
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.hooks import removing
from loki_plugin.model.writing import replacing

# Which linear layers read the same input.
_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


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
        self._directions: dict[str, dict[str, torch.Tensor]] = {}

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

    def texts(self, of: str) -> list[list[int]]:
        """`prompts`, what is `written`, or `both`."""
        return self.prompts + self.written if of == "both" else getattr(self, of)

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
        """What `input_directions` finds for the down-projections."""

        def find():
            ids, mask = padded(self.texts(of))
            return input_directions(
                self.known, ids.to(self.device), mask.to(self.device), energy=energy, soft=soft
            )

        return self._kept(f"directions-{energy:g}-{of}-{'soft' if soft else 'hard'}", find)

    def normalised(
        self,
        energy: float | None = 0.99,
        count: int | None = None,
        of: str = "both",
        soft: bool = True,
    ) -> dict[str, torch.Tensor]:
        """V [I, u] of every linear layer of the decoder by name, from moments C = Σ x xᵀ/‖x‖².

        `both`: half of the weight on the calibration prompts, half on what the base writes.
        `count` gives the number of directions instead of a share of the energy.
        """  # fmt: skip
        key = f"normalised-{energy if count is None else count}-{of}-{'soft' if soft else 'hard'}"

        def find():
            parts = [self._moments(k) for k in (("prompts", "written") if of == "both" else (of,))]
            found: dict[str, torch.Tensor] = {}
            for name in parts[0]:
                moment = sum(part[name] / part[name].trace() for part in parts)
                room = None if count is None else min(count, moment.shape[0] - 1)
                vectors = leading(moment, energy, room)[0]
                found[name] = (soften(moment, vectors) if soft else vectors).float().cpu()
            return found

        if key not in self._directions:
            self._directions = {key: self._kept(key, find)}
        found = dict(self._directions[key])
        for name, _ in self.known.named_modules():
            head, _, last = name.rpartition(".")
            if last in _SHARED and f"{head}.{_SHARED[last]}" in found:
                found[name] = found[f"{head}.{_SHARED[last]}"]
        return found

    def _moments(self, of: str) -> dict[str, torch.Tensor]:
        """C [I, I] of every input that a linear layer reads, by the layer's name."""

        def find():
            layers = {
                name: module
                for name, module in self.known.named_modules()
                if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))
            }
            moments: dict[str, torch.Tensor] = {}

            real: list[torch.Tensor] = []  # of the batch that runs: which of its tokens are real

            def watch(name):
                def hook(module, inputs):
                    x = inputs[0].detach().flatten(0, -2)[real[-1]].float()
                    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
                    if name in moments:
                        moments[name].addmm_(x.T, x)
                    else:
                        moments[name] = x.T @ x

                return hook

            texts = [Asked(ids, 1) for ids in self.texts(of)]  # first: writing must not be watched
            with ExitStack() as hooks, torch.no_grad():
                for name, module in layers.items():
                    hooks.enter_context(removing(module.register_forward_pre_hook(watch(name))))
                for batch in batches(texts):
                    ids, mask = padded([texts[i].ids for i in batch])
                    real.append(mask.flatten().bool().to(self.device))
                    self.known.get_decoder()(input_ids=ids.to(self.device), use_cache=False)
            return {name: moment.cpu() for name, moment in moments.items()}

        return self._kept(f"moments-{of}", find)

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
