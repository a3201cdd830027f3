"""What the demo on the pretrained model prints: answers side by side, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from . import orders
from .asking import SHOWN, questions

_WIDTH = 96


def show(report: dict, work: Path, models: Mapping[str, str]) -> None:
    """Print answers, table and files, and put the table on the page of LoKI's run."""
    print("\n".join(["", *side_by_side(report, models), "", *table(report, models)]))
    print(f"\nverify               {report['verify']}")
    print(f"merged model         {work / 'loki' / 'merged'}")
    used = f"{_times(report, 's', 1)}, largest process {report['gigabytes']} GB"
    print(f"all figures          {work / 'demo_report.json'} ({used})")
    print(f"report               {_page(report, work, models)}")


def side_by_side(
    report: dict, models: Mapping[str, str], asked: int | None = None, shown: int = SHOWN
) -> list[str]:
    """The questions (all, or the first `asked`) and a few held-out messages, with what each model
    says."""
    lines = ["What was known (+ right, - wrong or an order; how likely was the base's first word?)"]
    for i, q in enumerate(questions()[:asked]):
        lines += ["", q["question"]]
        for key, name in models.items():
            found = report["results"][key]
            mark = "+" if found["right"][i] else "-"
            chances = (f"{100 * p:.0f} %" for p in report["beginnings"][i])
            sure = f"({', '.join(chances)})" if key == "base" else ""
            lines.append(f"  {name} {mark} {_short(found['answers'][i])} {sure}".rstrip())
    lines += ["", "What was to be learned (held-out messages)"]
    for i, (message, order) in enumerate(orders.held_out()[:shown]):
        lines += ["", message]
        for key, name in models.items():
            found = report["results"][key]
            mark = "+" if found["shown"][i] == order else "-"
            lines.append(f"  {name} {mark} {_short(found['shown'][i])}")
    return lines


def in_short(report: dict, models: Mapping[str, str]) -> str:
    """Two questions, a message and the table: what a page shows of a run."""
    lines = [*side_by_side(report, models, 2, 1), "", *table(report, models)]
    lines += ["", f"verify{'':34s}{report['verify']}"]
    used = f"{_times(report, 'minutes', 60)}, largest process {report['gigabytes']} GB"
    return "\n".join([*lines, f"{used}: {report['machine']}"])


def _times(report: dict, unit: str, seconds: int) -> str:
    """How long it took, and how long its environment did, where that is known."""
    setup = report.get("setup_seconds")
    told = f"{report['seconds'] / seconds:.0f} {unit}"
    return told if setup is None else f"{told} and {setup / seconds:.0f} for its set-up"


def compared(report: dict, models: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """What each model makes of every measure, in words and figures."""
    results = [report["results"][key] for key in models]
    lines = []
    for key, title in (
        ("right", "the questions above, of {}"),
        ("facts", "facts, sentences ended rightly, of {}"),
        ("choices", "multiple choice, of {} questions"),
    ):
        lines.append((title.format(len(results[0][key])), [str(sum(r[key])) for r in results]))
    for key, title in (
        ("kl_answers", "KL to the base, on its own answers"),
        ("kl_text", "KL to the base, on plain text"),
        ("loss_text", "cross-entropy of plain text"),
    ):
        lines.append((title, [f"{r[key]:.3f}" for r in results]))
    count = len(results[0]["orders"])
    lines.append(
        (f"held-out orders exactly right, of {count}", [str(sum(r["orders"])) for r in results])
    )
    trained = [report["trained"].get(key) for key in models]
    lines.append(("steps of training", [f"{t['steps']}" if t else "-" for t in trained]))
    lines.append(("learning rate", [f"{t['rate']:g}" if t else "-" for t in trained]))
    return lines


def table(report: dict, models: Mapping[str, str]) -> list[str]:
    """The table as lines of text."""
    lines = [" " * 40 + "".join(f"{name:>8s}" for name in models.values())]
    for title, values in compared(report, models):
        lines.append(f"{title:40s}" + "".join(f"{v:>8s}" for v in values))
    return lines


def _short(said: str) -> str:
    said = " ".join(said.split())
    return said if len(said) <= _WIDTH else f"{said[: _WIDTH - 3]}..."


def _page(report: dict, work: Path, models: Mapping[str, str]) -> Path:
    from loki_plugin.picturing.page import rebuild

    rows = [
        (title, ",  ".join(f"{m} {v}" for m, v in zip(models.values(), values, strict=True)))
        for title, values in compared(report, models)
    ]
    rows.append(("verify", report["verify"]))
    sections = [{"title": "The demo: base, LoRA and LoKI", "rows": rows}]
    return rebuild(work / "loki", work / "cache", sections)[0]
