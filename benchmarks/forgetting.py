"""Knowledge kept against task learned, on the demo's model: LoKI, its controls, and LoRA.

    make demo                                   # trains the model
    python -m benchmarks.forgetting .demo/base

Every method learns the demo's skill with a range of learning rates, three seeds each, in a plain
training loop. Compare methods where they learned the task equally well.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe
from demo import base, corpus
from demo.evaluate import answers, perplexity
from loki_plugin import attribute, implant, select_rows

MLP = ["gate_proj", "up_proj", "down_proj"]
# name, how the model is wrapped (from scores), learning rates
METHODS = {
    "LoRA r8, all linears": (lambda m, s: lora(m, "all-linear"), (2e-4, 5e-4, 1e-3)),
    "LoRA r8, MLP only": (lambda m, s: lora(m, MLP), (2e-4, 5e-4, 1e-3)),
    "LoKI q10": (lambda m, s: implant(m, select_rows(s, 10)), (2e-3, 5e-3, 1e-2)),
    "LoKI q20": (lambda m, s: implant(m, select_rows(s, 20)), (2e-3, 5e-3, 1e-2)),
    "LoKI q30": (lambda m, s: implant(m, select_rows(s, 30)), (1e-3, 2e-3, 5e-3)),
    "random rows, q20": (lambda m, s: implant(m, select_rows(s, 20, "random")), (2e-3, 5e-3)),
    "highest rows, q20": (
        lambda m, s: implant(m, select_rows(s, 20, "layer_highest")),
        (2e-3, 5e-3),
    ),
}


def lora(model, targets):
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def teach(model, tokenizer, rate: float, epochs: int, batch: int, seed: int) -> None:
    model.train()
    draw = random.Random(seed)
    texts = [
        (tokenizer(base.prompt(q))["input_ids"], tokenizer(f"{a}<|im_end|>")["input_ids"])
        for q, a in corpus.task("train")
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * (len(texts) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 10) * (1 - s / steps)
    )
    for step in range(steps):
        if step % (len(texts) // batch) == 0:
            order = draw.sample(texts, len(texts))
        part, order = order[:batch], order[batch:]
        width = max(len(q) + len(a) for q, a in part)
        ids = torch.full((batch, width), tokenizer.pad_token_id)
        labels = torch.full((batch, width), -100)
        for row, (q, a) in enumerate(part):
            ids[row, : len(q) + len(a)] = torch.tensor(q + a)
            labels[row, len(q) : len(q) + len(a)] = torch.tensor(a)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def load():
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    def measure(model) -> list[float]:
        known, _ = answers(model, tokenizer, corpus.questions())
        task, _ = answers(model, tokenizer, corpus.task("test"))
        return [100 * task, 100 * known, perplexity(model, tokenizer, corpus.paragraphs())]

    model = load()
    # All phrasings, one prompt at a time: lengths differ, and this model is small.
    scores = [
        attribute(model, torch.tensor([tokenizer(base.prompt(q))["input_ids"]]))
        for q, _ in corpus.questions()
    ]
    scores = torch.cat(scores)
    lines = [
        "| method | learning rate | task learned, % | knowledge kept, % | perplexity |",
        "|---|---|---|---|---|",
        "| base | | " + " | ".join(f"{x:.1f}" for x in measure(model)) + " |",
    ]
    for name, (wrap, rates) in METHODS.items():
        for rate in rates:
            found = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                model = wrap(load(), scores)
                teach(model, tokenizer, rate, options.epochs, options.batch, seed)
                found.append(measure(model))
            cells = [f"{mean(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in zip(*found, strict=True)]
            lines.append(f"| {name} | {rate:g} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    about = [
        "# Knowledge kept against task learned",
        f"{describe(torch.device('cpu'))}. The demo's model and skill, {options.epochs} epochs in"
        f" batches of {options.batch}; mean and range of {options.seeds} seeds;"
        f" {time.perf_counter() - started:.0f} s in all.",
        f"Command: `{' '.join(['python -m benchmarks.forgetting', *sys.argv[1:]])}`",
    ]
    path = Path(__file__).parent / "results" / "forgetting.md"
    path.write_text("\n\n".join(about) + "\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
