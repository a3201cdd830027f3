"""What a model knows and what it has learned: exact answers and perplexity."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from . import corpus
from .base import prompt


def evaluate(folder: Path, adapter: Path | None = None) -> dict[str, float]:
    """Knowledge, general text and task of the model in `folder`, with a PEFT adapter if given."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    task, task_loss = answers(model, tokenizer, corpus.task("test"))
    return {
        "knowledge": 100 * answers(model, tokenizer, corpus.questions())[0],
        "reworded": 100 * answers(model, tokenizer, corpus.questions(held_out=True))[0],
        "perplexity": perplexity(model, tokenizer, corpus.paragraphs()),
        "task": 100 * task,
        "task_loss": task_loss,
    }


@torch.no_grad()
def answers(model, tokenizer, exchanges: list[corpus.Exchange]) -> tuple[float, float]:
    """(share answered exactly, mean loss of an answer token).

    Greedy decoding gives an answer exactly if and only if every token of it, and the end, is the
    arg-max behind the ones before; so one forward replaces the decoding.
    """
    right, loss, count = 0, 0.0, 0
    for start in range(0, len(exchanges), 64):
        part = exchanges[start : start + 64]
        given = [tokenizer(prompt(q))["input_ids"] for q, _ in part]
        wanted = [tokenizer(f"{a}<|im_end|>")["input_ids"] for _, a in part]
        width = max(len(g) + len(w) for g, w in zip(given, wanted, strict=True))
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        labels = torch.full((len(part), width), -100)
        for row, (g, w) in enumerate(zip(given, wanted, strict=True)):
            ids[row, : len(g) + len(w)] = torch.tensor(g + w)
            labels[row, len(g) : len(g) + len(w)] = torch.tensor(w)
        logits, labels = model(input_ids=ids[:, :-1]).logits, labels[:, 1:]
        loss += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
        right += int(((logits.argmax(-1) == labels) | (labels == -100)).all(1).sum())
    return right / len(exchanges), loss / count


@torch.no_grad()
def perplexity(model, tokenizer, texts: list[str]) -> float:
    """exp of the mean loss per token."""
    loss = count = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text + "<|im_end|>")["input_ids"]])
        logits = model(input_ids=ids[:, :-1]).logits[0]
        loss += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(loss / count)
