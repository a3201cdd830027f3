"""A small Llama with a tokenizer of its own, trained from nothing on the demo's texts."""

from __future__ import annotations

import math
import random
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


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}]
    return messages + ([{"role": "assistant", "content": answer}] if answer is not None else [])


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
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


def build(folder: Path, steps: int, size=(192, 512, 6)) -> dict:
    torch.manual_seed(0)
    asked = corpus.questions()
    plain = corpus.paragraphs() + corpus.statements()
    tokenizer = train_tokenizer(
        plain + [f"user\n{q}\nassistant\n{a}\n" for q, a in asked + corpus.reading(500, 0)]
    )

    def enc(chats):
        out = []
        for q, a in chats:
            p = tokenizer(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            e = tokenizer(f"{a}<|im_end|>\n")["input_ids"]
            out.append((p + e, PROMPT_LOSS and 1 or len(p)))
        return out

    plain_ids = [(tokenizer(t + "<|im_end|>")["input_ids"], 1) for t in plain]
    asked_ids = enc(asked)

    def epoch(n):
        return plain_ids * TEXT + asked_ids + enc(corpus.reading(READING, n))

    ids = epoch(0)
    H, I, L = size
    config = LlamaConfig(
        hidden_size=H,
        intermediate_size=I,
        num_hidden_layers=L,
        num_attention_heads=H // 32,
        num_key_value_heads=H // 64,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.train()
    opt = torch.optim.AdamW(
        model.parameters(), lr=LR, weight_decay=0.05, betas=(0.9, 0.98), fused=True
    )
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=steps, pct_start=0.1)
    print(
        "seqs",
        len(ids),
        "tokens",
        sum(len(i) for i, _ in ids),
        "vocab",
        len(tokenizer),
        "params",
        model.num_parameters(),
    )
    draw = random.Random(0)
    stream = batches(epoch, TOKENS, draw)
    seen = 0
    with tqdm(range(steps)) as bar:
        for i in bar:
            x, y, pos = next(stream)
            seen += int((pos > 0).sum())
            logits = model(input_ids=x, position_ids=pos, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=SMOOTH)
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            sched.step()
            if i % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", tokens=seen)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


OUT = "/tmp/exp_base"
TEXT = 2
PROMPT_LOSS = False
READING = 400
TOKENS = 1024
LR = 3e-3
ROWS = 5
WIDTH = 192


def batches(epoch, budget, draw):
    n = 0
    rows = []
    while True:
        ids = epoch(n)
        n += 1
        draw.shuffle(ids)
        for d in ids:
            if not rows or len(rows[-1][0]) + len(d[0]) > WIDTH:
                if len(rows) == ROWS:
                    yield tuple(
                        torch.tensor([r[k] + [(0, -100, 0)[k]] * (WIDTH - len(r[k])) for r in rows])
                        for k in range(3)
                    )
                    rows = []
                rows.append(([], [], []))
            x, start = d
            rows[-1][0].extend(x)
            rows[-1][1].extend([-100] * (start - 1) + x[start:] + [-100])
            rows[-1][2].extend(range(len(x)))
