"""A small Llama with a tokenizer of its own, trained from nothing on the demo's texts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import corpus

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
STEPS, ROWS, WIDTH, RATE = 600, 5, 192, 3e-3


def prompt(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def make(folder: Path) -> None:
    """Train tokenizer and model on the general texts and questions; done once per folder."""
    if (folder / "model.safetensors").exists():
        print(f"base model found in {folder}")
        return
    torch.manual_seed(0)
    plain = corpus.paragraphs() + corpus.statements()
    asked = corpus.questions()
    new = [word for exchange in corpus.task("train") for word in exchange]
    tokenizer = make_tokenizer([*plain, *(prompt(q) + a for q, a in asked), *new])
    # (ids, index of the first one that is learned): whole texts, but only answers of questions.
    texts = [(tokenizer(t + "<|im_end|>")["input_ids"], 1) for t in plain]
    for question, answer in asked:
        given = tokenizer(prompt(question))["input_ids"]
        texts.append((given + tokenizer(answer + "<|im_end|>\n")["input_ids"], len(given)))
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _train(model, texts)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _train(model, texts: list[tuple[list[int], int]]) -> None:
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=STEPS, pct_start=0.1
    )
    stream = _batches(texts, random.Random(0))
    with tqdm(range(STEPS), desc="training the base model", unit="step") as bar:
        for step in bar:
            ids, labels, positions = next(stream)
            # Without a cache and a mask, transformers keeps texts apart where positions restart.
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            # Smoothing keeps the base from growing so certain that nothing new can be learned.
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _batches(texts, draw: random.Random) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless batches of ROWS x WIDTH: ids, the ids to predict (or -100), and positions."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    while True:
        for ids, first in draw.sample(texts, len(texts)):
            if not rows or len(rows[-1][0]) + len(ids) > WIDTH:
                if len(rows) == ROWS:
                    parts = zip(zip(*rows, strict=True), (0, -100, 0), strict=True)
                    yield tuple(_padded(part, fill) for part, fill in parts)
                    rows = []
                rows.append(([], [], []))
            for part, new in zip(
                rows[-1],
                (ids, [-100] * (first - 1) + ids[first:] + [-100], range(len(ids))),
                strict=True,
            ):
                part.extend(new)


def _padded(rows, fill: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (WIDTH - len(row))] for row in rows])
