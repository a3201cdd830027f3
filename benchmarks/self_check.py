"""What error the self-check of the analysis would catch, by family and precision.

    python -m benchmarks.self_check                # every family of the tests
    python -m benchmarks.self_check llama gemma3   # some; the rows of others stay as they are

A fault of known size is put into the fast analysis: what it sees of the prompt in one layer (the
values that it attends to, a recurrence's state) is off by noise of a share x. The least x that the
self-check refuses is searched for, and said as the error that it makes in the scores: the largest
difference over the largest score of the same prompt and layer. Twice: for a formula that is wrong
in every precision, and for a kernel that is wrong in half precision alone, where the check cannot
see below the model's own rounding. The last column is what that rounding itself does to the scores.
Models are tiny, with random weights, of the real classes.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.writer import RESULTS, write
from loki_plugin import attribute
from loki_plugin.analysing.attribution import checking
from loki_plugin.analysing.attribution.quiet import quiet
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.quantised import quantised_modules

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.families import FAMILIES, RECURRENT, tiny  # noqa: E402
from helpers.faults import values_off  # noqa: E402
from helpers.prompts import error, pad, prompts  # noqa: E402
from helpers.quantised import WIDTHS, in_4_bit  # noqa: E402

PRECISIONS = ("float32", "bfloat16", "NF4")
# Between these sizes of the fault, to this factor.
LEAST, MOST, CLOSE = 1e-5, 1.0, 1.3


def build(family: str, precision: str):
    """The stand-in, or None where nothing of it quantises."""
    if precision != "NF4":
        return tiny(family, dtype=getattr(torch, precision), **WIDTHS)
    with tempfile.TemporaryDirectory() as folder:
        model = in_4_bit(family, Path(folder))
    return model if quantised_modules(model) else None


def caught(model, layer: int, size: float, only_half: bool) -> bool:
    """Whether the check refuses a fault of that size."""
    prompt = Prompt(tuple(prompts()[2].tolist()))
    checking._checked.discard(model)
    try:
        with values_off(size, layer, only_half), quiet(model) as own_attention:
            checking.check_reproduces(model, find_anatomy(model), prompt, own_attention)
    except checking.NotReproduced:
        return True
    return False


def least_caught(model, layer: int, only_half: bool) -> float | None:
    """The least size that is caught; None: not even the largest is."""
    if not caught(model, layer, MOST, only_half):
        return None
    low, high = LEAST, MOST
    while high > CLOSE * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if caught(model, layer, middle, only_half) else (middle, high)
    return high


def measured(family: str) -> list[dict[str, str]]:
    exact = tiny(family, **WIDTHS)
    layer = 0 if family in RECURRENT else find_anatomy(exact).num_layers // 2
    batch = pad(prompts(), "left")
    targets = predictions(exact)
    right = attribute(exact, *batch, targets=targets)

    def of_scores(size: float | None) -> str:
        if size is None:
            return "not caught"
        with values_off(size, layer):
            return percent(error(attribute(exact, *batch, targets=targets), right))

    found = []
    for precision in PRECISIONS:
        model = build(family, precision)
        if model is None:
            continue
        half = precision != "float32"
        found.append(
            {
                "family": family,
                "precision": precision,
                "wrong formula, %": of_scores(least_caught(model, layer, False)),
                "wrong in half precision alone, %": of_scores(least_caught(model, layer, True))
                if half
                else "",
                "rounding of the scores, %": rounding(family, batch) if half else "",
            }
        )
        print(found[-1], flush=True)
    return found


def rounding(family: str, batch) -> str:
    """What bfloat16 itself does to the scores, on the weights that it rounded."""
    model = tiny(family, dtype=torch.bfloat16, **WIDTHS)
    exact = tiny(family, dtype=torch.bfloat16, **WIDTHS).float()
    targets = predictions(exact)
    ours, truth = (attribute(m, *batch, targets=targets) for m in (model, exact))
    return percent(error(ours, truth))


def predictions(model) -> list[int]:
    with torch.no_grad():
        return [int(model(input_ids=i[None]).logits[0, -1].argmax()) for i in prompts()]


def kept() -> list[dict[str, str]]:
    """The rows of an earlier run."""
    path = RESULTS / "self_check.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def percent(share: float) -> str:
    return f"{100 * share:.2g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    options = parser.parse_args()
    logging.set_verbosity_error()
    about = (
        "The least fault in what one layer sees of the prompt that the self-check refuses, as the"
        " largest error of a score over the largest score of its prompt and layer. Random weights,"
        f" 3 layers, hidden size {WIDTHS['hidden_size']}; NF4 computes in bfloat16."
    )
    found: dict[str, list[dict[str, str]]] = {}
    for row in kept():
        found.setdefault(row["family"], []).append(row)
    for family in options.families:
        found[family] = measured(family)
        rows = [row for name in FAMILIES for row in found.get(name, [])]
        write("self_check", about, "python -m benchmarks.self_check", rows, as_csv=True)


if __name__ == "__main__":
    main()
