"""What a model knows and what it can do: exact answers and perplexity."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy


@torch.no_grad()
def answers(model, tokenizer, exchanges, size=64):
    """(share answered exactly, mean loss of an answer token). Greedy decoding gives an answer exactly iff every token of it is the arg-max after the ones before."""
    right = total = 0
    loss = 0.0
    n = 0
    for s in range(0, len(exchanges), size):
        part = exchanges[s : s + size]
        prompts = [
            tokenizer(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            for q, a in part
        ]
        ends = [tokenizer(f"{a}<|im_end|>")["input_ids"] for q, a in part]
        T = max(len(p) + len(e) for p, e in zip(prompts, ends))
        x = torch.full((len(part), T), tokenizer.pad_token_id)
        y = torch.full((len(part), T), -100)
        for i, (p, e) in enumerate(zip(prompts, ends)):
            x[i, : len(p) + len(e)] = torch.tensor(p + e)
            y[i, len(p) : len(p) + len(e)] = torch.tensor(e)
        logits = model(input_ids=x[:, :-1]).logits
        y = y[:, 1:]
        loss += cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        n += (y != -100).sum().item()
        right += ((logits.argmax(-1) == y) | (y == -100)).all(1).sum().item()
        total += len(part)
    return right / total, loss / n


@torch.no_grad()
def perplexity(model, tokenizer, texts):
    loss = n = 0
    for t in texts:
        x = torch.tensor([tokenizer(t + "<|im_end|>")["input_ids"]])
        logits = model(input_ids=x[:, :-1]).logits
        loss += cross_entropy(logits[0], x[0, 1:], reduction="sum").item()
        n += x.shape[1] - 1
    return math.exp(loss / n)
