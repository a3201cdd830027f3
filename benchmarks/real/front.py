"""What README and docs say of real models: marked blocks, filled from the results alone.

A page has `<!-- real:table -->` and `<!-- /real:table -->` where the table stands, and the same
with `picture`, and with `demo` for what `python -m demo --results` printed last. `python -m
benchmarks.real report` fills them; a test fails while a page has another text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.real import matching, names, tables
from benchmarks.real.bases import NAMES
from benchmarks.real.matching import CHOSEN_BY, RIVAL, Row
from benchmarks.real.picture import SHOWN, draw
from benchmarks.real.tasks import TASKS
from benchmarks.writer import RESULTS, table
from demo.real import MODELS
from demo.showing import in_short as shown

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/choosing.md", "docs/evidence.md", "docs/how.md")
DEMO = RESULTS / "demo.json"
PICTURE = "docs/pictures/real_tradeoff.png"
# A front page has no room for more.
LINES, COLUMNS, PANELS = 6, 3, 2
_OTHERS = "the best of all other ways, without old data"
# Arms of this package, the most wanted first; the paper's own and those with old data stand apart.
_OURS = (
    "auto_gain_frozen",
    "auto_q10",
    "auto_all",
    "lora_anchor",
    "lora_soft",
    "loki_soft_q90",
)
_PAPERS, _OLD_DATA = "loki_q30", "lora_replay5"


def kept(folder: Path = RESULTS) -> list[Row]:
    """The runs of real bases in `folder`, of each base and task those of one amount."""
    return matching.kept([r for r in matching.read(folder) if r["amount"] != "ci"])


def fill(rows: list[Row], root: Path = ROOT) -> list[Path]:
    """Draw the picture and write the blocks of every page under `root`; returns these files."""
    written = []
    if panels(rows):
        titles = {key: names.title(*key) for key in panels(rows)}
        # Steps on the way to `auto`, and its variants, are in `benchmarks/results/` alone.
        some = [r for r in rows if r["arm"] in SHOWN or names.is_others(r["arm"])]
        draw(some, root / PICTURE, "task_loss", titles, "all other ways")
        written.append(root / PICTURE)
    for page in PAGES:
        path = root / page
        path.write_text(filled(path.read_text("utf-8"), page, rows), encoding="utf-8")
        written.append(path)
    return written


def filled(text: str, page: str, rows: list[Row]) -> str:
    """`text` of a page with its blocks as the runs have them."""
    for name in ("picture", "table", "tasks", "others", "parts", "demo", "finals"):
        pattern = rf"(<!-- real:{name} -->\n).*?(<!-- /real:{name} -->)"
        new = block(name, page, rows)
        text = re.sub(pattern, lambda m, new=new: f"{m[1]}{new}\n{m[2]}", text, flags=re.S)
    return text


def block(name: str, page: str, rows: list[Row]) -> str:
    """What stands between the marks of a page, in Markdown."""
    if name == "demo":
        if not DEMO.is_file():
            return "*`python -m demo --results` has not run yet.*"
        return f"```text\n{shown(json.loads(DEMO.read_text('utf-8')), MODELS)}\n```"
    if name == "finals":
        return tables.finals(matching.read(RESULTS, "full"))
    made = {
        "tasks": tables.side_by_side,
        "others": tables.others,
        "parts": tables.parts_of_auto,
    }
    if name in made:
        return made[name](rows)
    return picture(page, rows) if name == "picture" else in_short(rows)


def marked(name: str, page: str, rows: list[Row]) -> str:
    """The same with its marks."""
    return f"<!-- real:{name} -->\n{block(name, page, rows)}\n<!-- /real:{name} -->"


def panels(rows: list[Row]) -> list[tuple[str, str]]:
    """The bases and tasks of the picture. Against the loss: in a few steps on two dozen held-out
    answers a small model gets few of them exactly right."""
    return _wanted(rows)[:PANELS]


def picture(page: str, rows: list[Row]) -> str:
    """The picture and what it shows; nothing without runs: the table's place says so."""
    if not panels(rows):
        return ""
    path = PICTURE if page == "README.md" else PICTURE.removeprefix("docs/")
    return (
        f"![Forgetting against what was learned]({path})\n\n"
        "Each line is a way to train, measured along one run: to the right it has learned"
        " more of the task, further down the model still says what it said before."
    )


def in_short(rows: list[Row]) -> str:
    """At most six ways to train on at most three tasks, one unit, and a sentence above."""
    lines = matching.matched(rows, "task_loss")
    known = {(x["base"], x["task"], x["arm"]): x for x in lines}
    columns = [key for key in _wanted(rows) if _forgets(known.get((*key, RIVAL)))][:COLUMNS]
    if not columns:
        return tables.NOTHING
    ran = {x["arm"] for x in lines if (x["base"], x["task"]) in columns}
    shown = [RIVAL, _OTHERS, _OLD_DATA, _PAPERS, *(arm for arm in _OURS if arm in ran)]
    found = []
    for arm in shown:
        cells = {
            names.title(*key): _best_other(lines, key)
            if arm == _OTHERS
            else tables.share(known.get((*key, arm)))
            for key in columns
        }
        if any(cells.values()):
            found.append({"way to train": names.name(arm), **cells})
    lora = "; ".join(f"{names.title(*k)} {known[*k, RIVAL][CHOSEN_BY]:.2g}" for k in columns)
    theirs = [known[*k, RIVAL]["rates"] for k in columns]
    others = [x["rates"] for x in lines if (x["base"], x["task"]) in columns and x["arm"] != RIVAL]
    return (
        "How much is forgotten when the new task is learned equally well, as a share of what LoRA"
        " forgets (KL to the base on dialogues; smaller is better; `-`: it did not learn the task"
        f" so well; empty: not run).\n\n{table(found[:LINES])}\n\nLoRA's own KL, in nats a token:"
        f" {lora}. Learning rates that were tried, of which the best one counts: {_span(theirs)}"
        f" for LoRA, {_span(others or [1])} for each other way. Seeds: {_seeds(lines, columns)}."
    )


def _seeds(lines: list[Row], columns: list[tuple[str, str]]) -> str:
    """How many seeds each figure of the table is of."""
    others = [x["arm"] for x in lines if names.is_others(x["arm"])]
    whose = {RIVAL: "LoRA"} | dict.fromkeys(_OURS[:2], "`protect: auto`")
    whose |= dict.fromkeys([_OLD_DATA, _PAPERS, *others], "all else")
    found: dict[str, list[int]] = {}
    for x in lines:
        if (x["base"], x["task"]) in columns and x["arm"] in whose and x["seeds"]:
            found.setdefault(whose[x["arm"]], []).append(int(x["seeds"]))
    order = [w for w in dict.fromkeys(whose.values()) if w in found]
    return ", ".join(f"{_span(found[w])} for {w}" for w in order)


def _span(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def _wanted(rows: list[Row]) -> list[tuple[str, str]]:
    """Bases and tasks that ran, the first base's first; then in the order of the tasks."""
    ran = {(r["base"], r["task"]) for r in rows}
    order = [(base, task) for base in NAMES for task in TASKS if (base, task) in ran]
    first = [key for key in order if key[0] == NAMES[0]]
    others = [key for key in order if key not in first]
    # Two tasks of the first base and one of another say more than three of the first.
    return first[: COLUMNS - 1] + others[:1] + first[COLUMNS - 1 :] + others[1:]


def _forgets(line: Row | None) -> bool:
    return line is not None and line[CHOSEN_BY] is not None


def _best_other(lines: list[Row], key: tuple[str, str]) -> str:
    """Of what is neither ours nor the paper's, and sees no old data: its share and its name."""
    others = [
        x
        for x in lines
        if (x["base"], x["task"]) == key and names.is_others(x["arm"]) and x["of_lora"] is not None
    ]
    if not others:
        return ""
    best = min(others, key=lambda x: x["of_lora"])
    alone = ", the only one that was run" if len(others) == 1 else ""
    return f"{best['of_lora']:.2g} ({names.name(best['arm'])}{alone})"
