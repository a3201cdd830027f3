"""Every class of transformers that writes text: is it analysed, does it train, does it merge?

    python -m benchmarks.architectures [TYPE ...] [--results]

For each model type that the automatic classes for text, for images and text, and for sound and text
know, the class that Axolotl would load is built small and goes through its life (`trial.live`).
`--results` writes the table in `docs/architectures.md`, and `results/architectures.csv`.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers

from benchmarks.standins import published, shrink
from benchmarks.trial import live, save_standin
from loki_plugin.commands.shared import stdout_is_free

ROOT = Path(__file__).parents[1]
PAGE, TABLE = ROOT / "docs" / "architectures.md", ROOT / "benchmarks/results/architectures.csv"
_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
YES = "yes"
_SLOW = ("glm5_next",)  # its own loops take minutes on a CPU; not analysed here


@dataclass(frozen=True)
class Line:
    """One class. `why`: the first thing that stands in the way of training, or of analysing."""

    type: str
    kind: str
    rows: str
    analysed: str
    trains: str
    merges: str
    why: str

    @property
    def has_rows(self) -> bool:
        return bool(self.rows) and not self.rows.startswith("0 ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--results", action="store_true", help="write the page and the table")
    options = parser.parse_args()
    with stdout_is_free():
        found = list(lines(options.types or types()))
    for line in found:
        print(*asdict(line).values(), sep="\t")
    print(summary(found))
    if options.results:  # of some types alone: the others stay as they are
        others = {line.type: line for line in read()} if options.types else {}
        write([*(others | {line.type: line for line in found}).values()])


def types() -> list[str]:
    """All model types, each once."""
    known: dict[str, None] = {}
    for name in _AUTO:
        known |= dict.fromkeys(getattr(transformers, name)._model_mapping._model_mapping)
    return sorted(known)


def lines(wanted: Sequence[str]) -> Iterator[Line]:
    """A line per type, in order."""
    place = Path(tempfile.mkdtemp(prefix="loki-architectures-"))
    try:
        for name in wanted:
            yield _line(name, place)
            shutil.rmtree(place, ignore_errors=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _line(name: str, place: Path) -> Line:
    kind = ""
    try:
        config = shrink(published(name))
        kind = save_standin(config, place / "base").name
    except Exception as error:  # a stand-in: sizes that a family wants, packages that are missing
        said = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
        return Line(name, kind, "", "-", "-", "-", f"no stand-in: {said}"[:160])
    life = live(place / "base", place / "life", analyse=name not in _SLOW)
    said = [life.trains, life.merges, life.analysed]
    why = next((s for s in said if s not in (YES, "")), "")
    why = why or ("not analysed here: its own loops are slow" if name in _SLOW else "")
    short = ["yes" if s == YES else "no" if s else "-" for s in (life.analysed, *said[:2])]
    return Line(name, life.kind, life.rows, *short, short_reason(why))


_REASONS = {
    "routed experts only": "routed experts only",
    "has an encoder and a decoder": "an encoder and a decoder",
    "no down-projection": "no down-projection: nothing but mixers",
    "candidates for its down-projection": "several candidates for its down-projection",
    "layers have a down-projection, and": "some layers have no down-projection",
    "no integer `hidden_size`": "its configuration has no `hidden_size`",
    "does not attend through": "layers that do not attend, or not through transformers' interface",
    "gets no gradient": "a layer that text alone does not reach",
    "pixel_values": "it does not run on text alone",
    "input_features": "it does not run on text alone",
    "cannot be analysed": "its own answers are not reproduced",
    "does not run on": "it does not run on text alone",
    "does not appear to have a file": "it wants files beside its weights",
    "takes hidden states of shape": "several streams of hidden states",
}


def short_reason(why: str) -> str:
    """The class of a reason, or its beginning."""
    return next((said for part, said in _REASONS.items() if part in why), why[:120])


def summary(found: Sequence[Line]) -> str:
    """The figures. Classes without rows of any kind do not count in the share."""
    built = [line for line in found if line.trains != "-" or line.rows]
    rows = [line for line in built if line.has_rows]
    trains = sum(line.trains == line.merges == YES for line in rows)
    routed = [line for line in built if line.rows and not line.has_rows]
    others = sum(line.trains == line.merges == YES for line in routed)
    analysed = sum(line.analysed == YES for line in rows)
    share = 100 * trains / max(len(rows), 1)
    return (
        f"{len(found)} model types; {len(built)} can be made small here; {len(rows)} of these have"
        f" down-projections. Of those {trains} ({share:.0f} %) train, are loaded by stock PEFT,"
        f" merge and verify; {analysed} are analysed. {len(routed)} more have routed experts only:"
        f" of {others} of them all else trains, merges and verifies (`targets: all`)."
    )


def write(found: Sequence[Line]) -> None:
    """The page and the table behind it."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(found[0])))
        writer.writeheader()
        writer.writerows(asdict(line) for line in found)
    PAGE.write_text(page(found), encoding="utf-8")


def read() -> list[Line]:
    """The table as it was written."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [Line(**row) for row in csv.DictReader(file)]


def page(found: Sequence[Line], with_it: str | None = None) -> str:
    """`docs/architectures.md`; `with_it`: another version of transformers than the one here."""
    head = ["model type", "class", "layers with rows", "analysed", "trains", "merges", "why not"]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in found:
        cells = [f"`{line.type}`", line.kind and f"`{line.kind}`", *list(asdict(line).values())[2:]]
        table.append("| " + " | ".join(c.replace("|", "/") for c in cells) + " |")
    made = {"version": transformers.__version__ if with_it is None else with_it}
    return _PAGE.format(**made, summary=summary(found), table="\n".join(table))


def made_with() -> str:
    """The version of transformers that the page names."""
    found = re.search(r"every class of transformers (\S+)", PAGE.read_text(encoding="utf-8"))
    return found.group(1) if found else ""


_PAGE = """<!-- Written by benchmarks/architectures.py; do not edit. -->

# Architectures

What becomes of every class of transformers {version} that writes text, from its own code: the class
that Axolotl loads for a model type is built with small sizes, analysed, trained for a step, saved,
loaded by stock PEFT, merged and verified.

{summary}

*Layers with rows*: layers that have a down-projection, of all; where there is none, all linears
but the experts were trained. *Analysed*: scores are exact, by the
model's own answers; where it says no, rows train without an analysis (`strategy: random`,
`quota: 100`, or a file of rows). *Trains*: every layer's rows get a gradient, and stock PEFT loads
what was saved. *Merges*: byte by byte, and the merged model answers as the adapter did. A dash: not
tried. A type whose class cannot be made small here may train all the same; `loki doctor CONFIG`
looks at a real one.

{table}
"""


if __name__ == "__main__":
    main()
