"""One base and its task, and the texts that arms may use of it; what is costly is made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real import bases, probes, tasks
from benchmarks.real.data import Data
from benchmarks.real.scoring import Asked, check_head
from loki_plugin.analysing.calibration.prompts import load_prompts, read_dialogues
from loki_plugin.analysing.calibration.sources import record_of
from loki_plugin.choices import TextKind
from loki_plugin.model.writing import replacing
from loki_plugin.protecting.own_text import write_texts


class Base:
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
        self.amount, self.amount_name = probes.AMOUNTS[amount], amount
        self.work = (work or bases.folder() / "work") / base
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.seed = self.draw = 0
        self.task: tasks.Task | None = None
        self._tasks: dict[tuple[str, int], tasks.Task] = {}

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

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Calibration prompts, some of those that the package ships."""
        found = load_prompts(self.tokenizer).prompts[:: self.amount.every]
        return [list(p.ids) for p in found]

    @cached_property
    def _texts(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Dialogues and plain text that the base writes by itself (`protect.text: self`): the token
        ids of each, and behind which of them an answer begins."""
        return self._let_write("both", self._way)

    @property
    def _way(self) -> str:
        """How it writes dialogues, in names of files: where it knows no chat template, from a list
        of what people ask."""
        return "" if self.tokenizer.chat_template and self.knows_turns else "-asked"

    @property
    def knows_turns(self) -> bool:
        return self.name not in bases.UNTAUGHT

    def _let_write(
        self, kind: TextKind, way: str, turns: bool | None = None
    ) -> dict[tuple[int, ...], tuple[int, ...]]:
        count, tokens = self.amount.written, self.amount.tokens

        def write():
            said = write_texts(
                self.known,
                self.tokenizer,
                count=count,
                tokens=tokens,
                kind=kind,
                batch_size=32,
                turns=self.knows_turns if turns is None else turns,
            )
            records = [record_of(row, f"text {i}") for i, row in enumerate(said)]
            texts = read_dialogues(self.tokenizer, records)
            return [(list(t.ids), list(t.starts)) for t in texts]

        kept = self._kept(f"texts-{count}-{tokens}{way}", write)
        return {tuple(ids): tuple(starts) for ids, starts in kept}

    @property
    def written(self) -> list[list[int]]:
        return list(map(list, self._texts))

    @cached_property
    def plain(self) -> list[list[int]]:
        """Plain text only: all that a base without a chat template wrote up to 0.9.0."""
        return list(map(list, self._let_write("text", "-plain")))

    @cached_property
    def begun(self) -> list[list[int]]:
        """What it writes behind the beginning of a turn, whether it knows turns or not."""
        return list(map(list, self._let_write("both", "-begun", True)))

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
        alike. `dialogues`: of what is written only these. `plain`: the prompts and plain text only;
        `begun`: the prompts and what is `begun`; `talks`: some people's dialogues too, as a user
        would give them."""
        if of == "prompts":
            return self.prompts
        plain = of == "plain" or (of == "talks" and not self.tokenizer.chat_template)
        written = self.plain if plain else self.begun if of == "begun" else self.written
        if own is not None:
            written = written[:: max(1, len(written) // own)][:own]
        if of in ("written", "dialogues"):
            return [ids for ids in written if of == "written" or self.starts(ids)]
        return [*self.prompts, *written, *(map(list, self.talks) if of == "talks" else ())]

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
            return [len(ids) - 1] if ids in self.prompts else list(self._texts.get(tuple(ids), ()))
        return [i + size - 1 for i in range(len(ids) - size + 1) if ids[i : i + size] == turn]

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
