"""What fits which card: a prediction, no GPU needed.

    python -m benchmarks.memory                           # seconds
    python -m benchmarks.memory --dry-run Llama-3.1-8B    # minutes

The formulas of `loki estimate`, which the tests hold to dry runs on fake CUDA tensors. Models that
are named behind `--dry-run` run in full under the meter (`tests/helpers/fake_cuda`, needs g++):
one prompt of the analysis, and one training step of each form.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.writer import command, table, write
from loki_plugin.args import LokiConfig
from loki_plugin.choices import PROTECT_GB, STEPS
from loki_plugin.estimating.base import Stored
from loki_plugin.estimating.estimate import CONTEXT, Estimator
from loki_plugin.estimating.planned import Planned
from loki_plugin.estimating.work import Work
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.selecting.select import quota_to_count

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.fake_cuda import build, dry_run  # noqa: E402
from helpers.fake_cuda.models import llama  # noqa: E402

# Layers, hidden, intermediate, key heads, head size, vocabulary; heads; whether the head is tied.
MODELS: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "Llama-3.1-8B": ((32, 4096, 14336, 8, 128, 128256), 32, False),
    "Qwen2.5-7B": ((28, 3584, 18944, 4, 128, 152064), 28, False),
    "Mistral-7B": ((32, 4096, 14336, 8, 128, 32768), 32, False),
    "Qwen3-4B": ((36, 2560, 9728, 8, 128, 151936), 32, True),
    "Qwen2.5-0.5B": ((24, 896, 4864, 2, 64, 151936), 14, True),
}
CARDS = (8, 12, 16, 24, 48)
PROMPT, SEQUENCE = 200, 2048
QUOTA, RANK, OPTIMIZER = 10, 32, "adamw_bnb_8bit"
# Of `protect: auto`: what trains, the mean of the shipped prompts' tokens, and the card.
FORMS: dict[str, dict[str, Any]] = {
    "10 % of the rows, dense": {"quota": 10},
    "LoRA r16 on all linears": {"quota": 100, "rank": 16, "targets": "all"},
    "the same, A trains (`freeze_a: false`)": {
        "quota": 100, "rank": 16, "targets": "all", "protect": {"auto": True, "freeze_a": False},
    },
}  # fmt: skip
ANCHORED, CARD, PROTECTED = 120, 24, "Llama-3.1-8B"
ACCUMULATED = 8  # micro batches of a step, of which one has the anchor
_LAYERS = 8  # of the model whose kernels are counted


def estimator(name: str, rank: int | None) -> Estimator:
    shape, heads, tied = MODELS[name]
    with torch.device("meta"):
        model = llama(*shape, heads=heads, tied=tied)
    config = LokiConfig(quota=QUOTA, rank=rank, protect="off")
    counts = [quota_to_count(QUOTA, shape[1])] * shape[0]
    return Estimator(model, find_anatomy(model), config, counts, [PROMPT] * 256, analysed=True)


def row(name: str, nf4: bool) -> dict[str, Any]:
    """A line of the table."""
    run = Planned(
        Stored(torch.bfloat16, 4 if nf4 else 0), 1, SEQUENCE, 1, True, OPTIMIZER,
        torch.bfloat16,
    )  # fmt: skip
    dense, low = estimator(name, None), estimator(name, RANK)
    analyses = {card: dense.analysis(run, card) for card in CARDS}
    least = analyses[CARDS[0]]["least_bytes"]
    batches = [
        f"{card}: {found['batch_size']}"
        for card, found in analyses.items()
        if least + CONTEXT <= 1e9 * card
    ]
    found: dict[str, Any] = {
        "model": name,
        "base": "NF4" if nf4 else "bf16",
        "weights_GB": gigabytes(analyses[CARDS[0]]["weights_bytes"]),
        "analysis_GB": gigabytes(least),
        "prompts_at_once (GB: n)": ", ".join(batches) or "none",
    }
    for form, each in (("dense", dense), (f"rank_{RANK}", low)):
        needed = each.training(run)["bytes"]
        cards = [card for card in CARDS if needed + CONTEXT <= 1e9 * card]
        found[f"training_{form}_GB"] = gigabytes(needed)
        found[f"{form}_from_GB"] = cards[0] if cards else "none"
    return found


def protection(name: str) -> list[dict[str, Any]]:
    """What `protect: auto` adds to a training step on an NF4 base, beside the same one without."""
    shape, heads, tied = MODELS[name]
    with torch.device("meta"):
        model = llama(*shape, heads=heads, tied=tied)
    anatomy = find_anatomy(model)
    run = Planned(
        Stored(torch.bfloat16, 4), 1, SEQUENCE, 1, True, OPTIMIZER, torch.bfloat16
    )  # fmt: skip
    found = []
    for form, settings in FORMS.items():
        counts = [quota_to_count(settings["quota"], shape[1])] * shape[0]
        auto = {"protect": "auto"} | settings
        plain, auto = (
            Estimator(model, anatomy, LokiConfig(**of), counts, [ANCHORED] * 256, analysed=False)
            for of in (auto | {"protect": "off"}, auto)
        )
        trained, _ = plain.parameters()
        work = Work.of(model, anatomy)
        flops = work.training(run.tokens, run.length, trained, True)
        before, after = (e.training(run, CARD) for e in (plain, auto))
        directions, anchor = auto.protection_flops(run, CARD), work.anchor(auto.anchor_tokens())
        step = (ACCUMULATED - 1) * auto.protection_flops(run, CARD, anchored=False)
        step += directions + anchor
        found.append(
            {
                "form": form,
                "without_GB": gigabytes(before["bytes"]),
                "directions_GB": gigabytes(after["directions_bytes"]),
                "auto_adds_GB": f"{(after['bytes'] - before['bytes']) / 1e9:.2f}",
                "directions_add": f"{directions / flops:.1%}",
                "anchor_adds": f"{anchor / flops:.1%}",
                "at_first": f"{work.anchor(auto.anchor_tokens(), new=True) / flops:.1%}",
                f"both_of_{ACCUMULATED}": f"{step / ACCUMULATED / flops:.1%}",
            }
        )
    return found


def dry_runs(names: list[str]) -> str:
    """What the named models hold in full runs under the meter, beside the formula."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        for name in names:
            shape, heads, tied = MODELS[name]
            for nf4 in (False, True):
                model = {"shape": shape, "heads": heads, "tied": tied, "nf4": nf4}
                analysis, *trainings = dry_run(
                    library,
                    "any",
                    model | {"what": "llama", "batch": 1, "length": PROMPT},
                    *(
                        model | {"what": "training", "length": SEQUENCE, "rank": rank}
                        for rank in (None, RANK)
                    ),
                )
                peaks = [trainings[0]["base_bytes"] + analysis["peak_bytes"]]
                peaks += [
                    sum(t[k] for k in ("base_bytes", "adapter_bytes", "state_bytes", "peak_bytes"))
                    for t in trainings
                ]
                told = ", ".join(map(gigabytes, peaks))
                lines.append(
                    f"{name} {'NF4' if nf4 else 'bf16'}: analysis, dense, rank {RANK}: {told} GB"
                )
                print(lines[-1], flush=True)
        told = "Dry runs of whole models: " + "; ".join(lines) + "." if lines else ""
        return told + ("\n\n" + launches(library) if PROTECTED in names else "")


def launches(library: Path) -> str:
    """How many kernels a step is under `protect: auto`: what a quick card waits for."""
    shape, heads, tied = MODELS[PROTECTED]
    lora = {
        "what": "training", "shape": (_LAYERS, *shape[1:]), "heads": heads, "tied": tied,
        "length": SEQUENCE, "rank": RANK, "targets": "all", "quota": 100,
    }  # fmt: skip
    memory = PROTECT_GB * _LAYERS / shape[0]
    directions = lora | {"protect": {"inputs": 0.99, "soft": True, "memory": memory}}
    anchor = {"anchor": ANCHORED, "known": True}
    still = lora | {"protect": directions["protect"] | {"freeze_a": True}}
    steps = lora, still, still | anchor, directions, directions | anchor
    counted = [sum(found["kernels"].values()) for found in dry_run(library, "any", *steps)]
    return (
        f"Kernels of a training step on {_LAYERS} layers of {PROTECTED} in bf16, LoRA on all"
        " linears: {:,}; with an A that stands still: {:,}; with the anchor too, which is `protect:"
        " auto`: {:,}; with `freeze_a: false`, directions alone: {:,}; with the anchor too:"
        " {:,}.".format(*counted)
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", nargs="*", default=[], choices=list(MODELS))
    rows = [row(name, nf4) for name in MODELS for nf4 in (False, True)]
    more = [
        f"What `protect: auto` adds on {PROTECTED}, NF4, on a card of {CARD} GB: directions in as"
        f" much memory as `protect.memory` gives them there, an anchor of two texts of {ANCHORED}"
        " tokens; the last four columns are FLOPs of a step beside those without protection: at"
        " first, when the base has not been asked about a text yet, an anchor costs a pass more; of"
        f" {ACCUMULATED} micro batches one has the anchor.",
        table(protection(PROTECTED)),
        dry_runs(parser.parse_args().dry_run),
    ]
    about = (
        "A prediction: formulas that dry runs on fake CUDA tensors confirm, for Llamas in these"
        " shapes; what was measured on a GPU is in gpu.md. Weights are in all figures. Analysis:"
        f" one prompt of {PROMPT} tokens, S = {STEPS}; beside it how many run at once with"
        " `batch_size: auto` on a card of so many GB. Training: quota"
        f" {QUOTA}, sequences of {SEQUENCE:,} tokens, micro batch 1, gradient checkpoints, bf16"
        f" adapter, {OPTIMIZER}, logits made (no fused loss); dense, and rank {RANK}; beside it"
        f" the smallest of the cards {CARDS} that holds it with {CONTEXT / 1e9:g} GB for CUDA."
        " Long runs need some room for gaps between tensors. GB are 10⁹ bytes."
    )
    write("memory", about, command("memory"), rows, more="\n\n".join(x for x in more if x))


if __name__ == "__main__":
    main()
