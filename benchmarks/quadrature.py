"""Which rule and how many steps give the selection of 100 steps? On a trained model.

    python -m demo --toy                             # trains the model
    python -m benchmarks.quadrature .demo-toy/base

Overlap: the share of selected rows that 100 steps of the same rule select too (the truth column:
that 100 Gauss-Legendre steps select, which are exact to rounding).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.writer import command, write
from demo import base, corpus
from loki_plugin import select_rows
from loki_plugin.analysing.analysis import analyse, convergence
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.choices import QUOTA, RULES
from loki_plugin.model.anatomy import find_anatomy

STEPS = (1, 2, 3, 4, 5, 7, 10, 20, 50)


def overlap(some, others) -> float:
    pairs = list(zip(some, others, strict=True))
    same = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in pairs)
    return 100 * same / sum(len(a) for a, _ in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--quota", default=QUOTA)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    anatomy = find_anatomy(model)
    asked = corpus.questions()[:: max(1, len(corpus.questions()) // options.prompts)]
    prompts = [Prompt(tuple(tokenizer(base.prompt(q))["input_ids"])) for q, _ in asked]
    prompts.sort(key=lambda p: len(p.ids))

    def by(name, steps):
        rule = quadrature(name, steps)
        rows = select_rows(analyse(model, anatomy, prompts, rule), options.quota)
        return rows, convergence(model, anatomy, prompts[::20], rule)

    truth, _ = by("gauss-legendre", 100)
    found = []
    for rule in RULES:
        full, missed = by(rule, 100)
        rows = [(100, full, missed)]
        # The trapezoid needs both its ends.
        rows = [(s, *by(rule, s)) for s in STEPS if s > 1 or rule != "trapezoid"] + rows
        for steps, some, missed in rows:
            found.append(
                {
                    "rule": rule,
                    "steps": steps,
                    "overlap with 100 steps of the rule, %": f"{overlap(some, full):.2f}",
                    "with the truth, %": f"{overlap(some, truth):.2f}",
                    "completeness error, %": f"{100 * missed:.3f}",
                }
            )
            print(found[-1], flush=True)
    size = f"L = {anatomy.num_layers}, H = {anatomy.hidden_size}"
    about = (
        f"The demo's trained model ({size}), {len(prompts)} of its questions, quota"
        f" {options.quota} %; every rule and number of steps against 100 steps."
    )
    write("quadrature", about, command("quadrature"), found)


if __name__ == "__main__":
    main()
