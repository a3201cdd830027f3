"""What README and docs show: fenced blocks, and the commands in them and in running text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
TEXTS = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in PAGES}
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```", re.M | re.S
)
IN_TEXT = re.compile(
    r"`((?:axolotl |loki |make |python -m )[^`\n]+)`(?: <!-- not run: ([^>]+) -->)?"
)
# The end of a command's `--help`, as docs/commands.md has it.
EXAMPLES = re.compile(r"^  Examples:\n((?:    .+\n)+)", re.M)
STARTS = re.compile(r"make|loki|axolotl|python|pip")


@dataclass(frozen=True)
class Block:
    """A fenced block; `why` is what a `<!-- not run: ... -->` above it says."""

    page: str
    number: int
    kind: str
    why: str | None
    text: str


@dataclass(frozen=True)
class Line:
    """A command; in running text (`whole` is False) it may stand without its arguments."""

    page: str
    text: str
    why: str | None = None
    whole: bool = True


def blocks(*kinds: str) -> list[Block]:
    """Every fenced block of these kinds."""
    return [
        Block(page, i, found["kind"], found["why"], found["body"])
        for page, text in TEXTS.items()
        for i, found in enumerate(FENCE.finditer(text))
        if found["kind"] in kinds
    ]


def lines_of(text: str) -> list[str]:
    """The commands of a block: lines that a backslash continues are one, comments are none."""
    joined = text.replace("\\\n", " ")
    return [line.partition("  #")[0].strip() for line in joined.splitlines() if line.strip()]


def shown() -> list[Line]:
    """Every line of the blocks that hold commands; what they print stands in `text` blocks."""
    return [
        Line(block.page, line, block.why)
        for block in blocks("", "bash")
        for line in lines_of(block.text)
        if block.page != "docs/map.md" and "|" not in line
    ]


def examples() -> list[Line]:
    """The examples of every command's `--help`."""
    return [
        Line("docs/commands.md", line)
        for found in EXAMPLES.findall(TEXTS["docs/commands.md"])
        for line in lines_of(found)
    ]


def named() -> list[Line]:
    """Every command in running text, once per page."""
    return [
        Line(page, line, why or None, whole=False)
        for page, text in TEXTS.items()
        for line, why in sorted(set(IN_TEXT.findall(FENCE.sub("", text))))
        if "..." not in line
    ]
