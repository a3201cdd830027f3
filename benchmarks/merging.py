"""What merging a 4-bit run costs: onto the original base, and onto the one that the run saw.

    python -m benchmarks.merging --work DIR

A small Llama is pretrained on the forgetting benchmark's world and stored in bfloat16; rows train
on its NF4 form (double quantisation) until they know new facts; then both merges are made by the
commands' own code, proven, and asked. All products are made in float32.
"""

from __future__ import annotations

import argparse
import shutil
from itertools import repeat
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.forgetting import base as bases
from benchmarks.forgetting.measures import ask
from benchmarks.forgetting.tasks import facts
from benchmarks.writer import command, write
from loki_plugin import RowSelection, implant
from loki_plugin.implanting.proven import ONTO, merge_run
from loki_plugin.model.fingerprint import fingerprint
from loki_plugin.model.quantised import evaluating
from loki_plugin.selecting.select import quota_to_count

# The dimensions of NF4's blocks, which the forgetting benchmark's own sizes do not have.
SIZE = bases.Size(
    people=60, hidden=128, intermediate=384, layers=4, heads=4, vocabulary=700, steps=600, rows=8
)
QUOTA, STEPS, RATE, PEOPLE = 30, 100, 5e-3, 20


def quantised(folder: Path):
    """As Axolotl loads it with `load_in_4bit: true`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )


def plain(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Asked:
    """A model as `ask` wants it, whose modes it leaves alone."""

    def __init__(self, model):
        self.model = model

    def eval(self):
        return self  # on a CPU, NF4 in evaluation would compute otherwise than in training

    def __call__(self, **inputs):
        return self.model(**inputs)


def losses(name: str, model, known: bases.Base, task) -> dict[str, str]:
    """Loss on what was learned, and the mean over the kinds of general knowledge."""
    with evaluating(model):
        learned = ask(Asked(model), known.tokenizer, task)
        measured = known.world.measured().values()
        kinds = [ask(Asked(model), known.tokenizer, items).loss for items in measured]
    return {
        "model": name,
        "loss on the new facts": f"{learned.loss:.4f}",
        "new facts known (%)": f"{100 * learned.accuracy:.0f}",
        "loss on general knowledge": f"{sum(kinds) / len(kinds):.4f}",
    }


def train(model, rows: list[torch.Tensor], known: bases.Base, task):
    """Dense rows on the quantised base, until the facts are known."""
    selection = RowSelection(rows, SIZE.hidden, fingerprint(model))
    model = implant(model, selection)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE)
    pad = known.tokenizer.pad_token_id
    stream = bases.packed(
        repeat([bases.encode(known.tokenizer, i) for i in task]), SIZE.rows, SIZE.width, pad, 0
    )
    bases.fit(model, optimizer, stream, STEPS)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    work = parser.parse_args().work
    bases.SIZES["merging"] = SIZE
    known = bases.load(work, "merging")
    folder, output = work / "merging-bf16", work / "merging-adapter"
    for stale in (folder, output):
        shutil.rmtree(stale, ignore_errors=True)
    known.model().to(torch.bfloat16).save_pretrained(folder)
    task = facts(known.world, 0, PEOPLE)[0]
    draw = torch.Generator().manual_seed(0)
    k = quota_to_count(QUOTA, SIZE.hidden)
    rows = [torch.randperm(SIZE.hidden, generator=draw)[:k].sort().values] * SIZE.layers
    found = [
        losses("base, bfloat16", plain(folder), known, task),
        losses("base, NF4", quantised(folder), known, task),
    ]
    model = train(quantised(folder), rows, known, task)
    model.save_pretrained(output)
    found.append(losses("adapter on the NF4 base", model, known, task))
    for onto in ONTO:
        merge_run({"base_model": str(folder)}, [output], output / onto, onto=onto)
        found.append(losses(f"merged, --onto {onto}", plain(output / onto), known, task))
    about = (
        f"Llama of {SIZE.layers} layers, H = {SIZE.hidden}, I = {SIZE.intermediate}, stored in"
        f" bfloat16; {k} rows per layer (random) train densely on its NF4 form, {STEPS} steps of"
        f" AdamW at {RATE}; mean cross-entropy per answer token."
    )
    print(write("merging", about, command("merging", DIR=str(work)), found).read_text())


if __name__ == "__main__":
    main()
