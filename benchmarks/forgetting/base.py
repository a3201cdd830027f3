"""The base model: a small Llama and its tokenizer, pretrained on the world, kept by hash."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.forgetting.world import COVERED, Item, World, make

KEPT = Path(__file__).parent / "bases"
USER, BOT, END = "<|user|>", "<|bot|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}"
    "{{ m['content'] }}{% if m['role'] != 'user' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """How large world and model are, and how long the base is trained.

    `ci` takes minutes, `brief` about an hour for all stages; a run of `reported` takes minutes.
    """

    people: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    steps: int
    rows: int = 16
    width: int = 128
    rate: float = 3e-3


SIZES = {
    "ci": Size(40, 64, 176, 3, 2, 600, 250, rows=8),
    "brief": Size(80, 96, 256, 4, 4, 800, 900, rows=12, width=96),
    "small": Size(500, 160, 448, 4, 5, 1024, 1000),
    "reported": Size(300, 320, 896, 8, 5, 1024, 700, rate=1.5e-3),
}


@dataclass
class Base:
    """The pretrained model with all that belongs to it; `report` has its losses."""

    folder: Path
    world: World
    tokenizer: PreTrainedTokenizerFast
    report: dict

    def model(self) -> LlamaForCausalLM:
        """A fresh copy."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)


def encode(tokenizer, item: Item) -> tuple[list[int], int]:
    """Ids of an item with its answer, and how many belong to the prompt.

    Covered kinds, and tasks, are asked in the chat format; held-out kinds stand as plain text.
    """
    plain = item.kind in ("places", "grammar", "sequences")
    prompt = item.prompt if plain else f"{USER}{item.prompt}{BOT}"
    answer = f" {item.answer}" + (" ." if plain else END)
    given = tokenizer(prompt)["input_ids"]
    return given + tokenizer(answer)["input_ids"], len(given)


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and the mask of what is real."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, real, prompt in zip(ids, mask, prompts, strict=True):
        row[: len(prompt)], real[: len(prompt)] = torch.tensor(prompt), 1
    return ids, mask


def load(work: Path, size_name: str, seed: int = 0) -> Base:
    """The base of that size and seed: one that is kept here, from `work`, or trained now.

    Another processor trains another base, so that small ones are kept: runs go on anywhere.
    """
    size = SIZES[size_name]
    world = make(size.people, seed)
    items = [[i.kind, i.prompt, i.answer] for kind in world.items.values() for i in kind]
    content = json.dumps([asdict(size), seed, world.sentences, items, world.text])
    name = f"base-{size_name}-{seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"
    folder = KEPT / name if (KEPT / name).is_dir() else work / name
    if not (folder / "report.json").is_file():
        _train_base(folder, world, size, seed)
    return Base(
        folder,
        world,
        AutoTokenizer.from_pretrained(folder),
        json.loads((folder / "report.json").read_text()),
    )


def _train_base(folder: Path, world: World, size: Size, seed: int) -> None:
    torch.manual_seed(seed)
    started = time.perf_counter()
    text = world.training_text()
    tokenizer = _tokenizer([*world.sentences, *text], size.vocabulary)
    learned = [item for kind in COVERED for item in world.items[kind]]
    # Sums that the base never sees tell whether it calculates.
    unseen = [i for i in learned if i.kind == "arithmetic"][::10]
    seen = [i for i in learned if i not in unseen]
    sequences = [encode(tokenizer, item) for item in seen]
    sequences += [(tokenizer(s + END)["input_ids"], 1) for s in world.sentences]
    sequences += [(tokenizer(p + END)["input_ids"][: size.width], 1) for p in text]
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), size.rate, (0.9, 0.98), weight_decay=0.05)
    losses = fit(
        model,
        optimizer,
        packed(repeat(sequences), size.rows, size.width, tokenizer.pad_token_id, seed),
        size.steps,
        warmup=size.steps // 20,
        say=lambda step, loss: print(f"base: step {step}, loss {loss:.3f}", flush=True),
    )
    model.eval()
    report = {
        "size": asdict(size),
        "seed": seed,
        "parameters": model.num_parameters(),
        "train_loss": sum(losses[-20:]) / 20,
        "loss_on_unseen_sums": answer_loss(model, tokenizer, unseen),
        "loss_on_seen_items": answer_loss(model, tokenizer, seen[:400]),
        "loss_on_held_out_text": text_loss(model, tokenizer, world.held_out_text()),
        "loss_on_training_text": text_loss(model, tokenizer, text),
        "seconds": round(time.perf_counter() - started, 1),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", USER, BOT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def packed(
    passes: Iterable[Sequence[tuple[list[int], int]]], rows: int, width: int, pad: int, seed: int
) -> Iterator[Batch]:
    """Batches [rows, width]: ids, the ids to predict (or -100), and positions.

    Each pass is a list of sequences, which are shuffled; one is (ids, index of the first that is
    predicted), and positions restart with each.
    """
    draw = random.Random(seed)
    lines: list[tuple[list[int], list[int], list[int]]] = [([], [], [])]
    for sequences in passes:
        for ids, first in draw.sample(list(sequences), len(sequences)):
            ids = ids[:width]
            if len(lines[-1][0]) + len(ids) > width:
                if len(lines) == rows:
                    yield tuple(
                        torch.tensor([line[k] + [fill] * (width - len(line[k])) for line in lines])
                        for k, fill in enumerate((pad, -100, 0))
                    )
                    lines = []
                lines.append(([], [], []))
            wanted = [-100] * (first - 1) + ids[first:] + [-100]
            for part, new in zip(lines[-1], (ids, wanted, range(len(ids))), strict=True):
                part.extend(new)


def fit(
    model, optimizer, stream, steps: int, warmup: int = 10, say=None, extra=None
) -> list[float]:
    """Train for that many steps with a linear warm-up and a linear decay; returns the losses.

    `extra(step)` gives a term to add to the loss of each step.
    """
    model.train()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, max(0.0, (steps - s) / max(1, steps - warmup))),
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for step in range(steps):
        ids, labels, positions = next(stream)
        # Without a cache and a mask, transformers keeps texts apart where positions restart.
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
        (loss if extra is None else loss + extra(step)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if say is not None and step % 100 == 0:
            say(step, losses[-1])
    return losses


@torch.no_grad()
def answer_loss(model, tokenizer, items: Sequence[Item]) -> float:
    """Mean cross-entropy per answer token."""
    from benchmarks.forgetting.measures import ask

    return ask(model, tokenizer, items).loss


@torch.no_grad()
def text_loss(model, tokenizer, texts: Sequence[str]) -> float:
    """Mean cross-entropy per token of plain text."""
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text + END)["input_ids"]])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count
