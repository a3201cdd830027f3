"""`loki_report.html`: one file that says what a run did, opens offline, and fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..implanting.saved import FAILED_NAME, PAGE_NAME, REPORT_NAME, WEIGHTS
from ..model.writing import write_text
from ..rows import FILE_NAME as ROWS_NAME
from ..rows import RowSelection
from . import numbers as figures
from . import telling
from .drawing.style import to_svg
from .numbers import Numbers
from .pictures import TITLES, Picture, pictures
from .telling import Section


def read_report(folder: Path) -> dict[str, Any]:
    """What `loki_report.json` holds; empty where there is none.

    Raises:
        ValueError: not a JSON object.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds no object, so it is no report of a run")
    return content


def write_page(
    folder: Path, numbers: Numbers, more: Sequence[Section] = ()
) -> tuple[Path, list[Picture], dict[str, str]]:
    """Write the page of a run from its files and its numbers.

    Args:
        more: sections to stand before those about the run.

    Returns:
        The page, its pictures, and what is not shown with the reason.

    Raises:
        ValueError: the folder has no rows file, or one of its files is damaged.
    """
    selection = RowSelection.load(folder / ROWS_NAME)
    report = read_report(folder)
    drawn, left_out = pictures(numbers, report)
    path = folder / PAGE_NAME
    page = render(folder, report, selection, numbers, drawn, left_out, more)
    write_text(path, page)
    return path, drawn, left_out


def render(
    folder: Path,
    report: dict[str, Any],
    selection: RowSelection,
    numbers: Numbers,
    drawn: list[Picture],
    left_out: dict[str, str],
    more: Sequence[Section] = (),
) -> str:
    """The page as text. Everything that comes from outside is escaped, whatever it holds."""
    # Autoescaping holds for every value but these two, which are made here.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    files = resources.files(__package__)
    style = files.joinpath("page.css").read_text(encoding="utf-8")
    page = environment.from_string(files.joinpath("page.html.j2").read_text(encoding="utf-8"))
    title, subtitle = telling.title(report, folder)
    return page.render(
        style=Markup(style),
        title=title,
        subtitle=subtitle,
        verdict=telling.verdict(report, (folder / FAILED_NAME).exists()),
        tiles=telling.tiles(report, selection, numbers),
        pictures=[
            {
                "name": p.name,
                "title": p.title,
                "caption": p.caption,
                "svg": Markup(to_svg(p.figure, p.name)),
            }
            for p in drawn
        ],
        left_out=[(TITLES[name], why) for name, why in left_out.items()],
        sections=[*more, *telling.sections(report, selection)],
        commands=telling.commands(report, folder, (folder / WEIGHTS).exists()),
        settings=telling.settings(report),
        versions=list((report.get("versions") or {}).items()),
    )


def rebuild(
    folder: Path, cache: Path | None = None, more: Sequence[Section] = ()
) -> tuple[Path, list[Picture], dict[str, str]]:
    """The page of a run that is over, also of one by an older version.

    Its numbers are read where they were kept; else they are gathered from the analysis, if the
    cache still has it, and from the state of its last checkpoint.

    Args:
        cache: the folder of score logs; None: where the run kept them, or the user's.
        more: as `write_page` takes them.

    Raises:
        ValueError: the folder holds no run of ours, or one of its files is damaged.
    """
    from ..analysing.scores.cache import cache_folder

    if not (folder / ROWS_NAME).exists():
        raise ValueError(
            f"'{folder}' has no {ROWS_NAME}, so no run of ours ended there; give the output_dir of"
            " a training run"
        )
    numbers = figures.load(folder)
    if numbers is None or "scores" not in numbers:
        selection = RowSelection.load(folder / ROWS_NAME)
        kept = (read_report(folder).get("settings") or {}).get("cache_dir")
        place = cache or cache_folder(kept)
        found = figures.gather(selection, place, last_history(folder))
        if numbers and "training" in numbers:
            found["training"] = numbers["training"]
            found["left_out"].pop("training", None)
        numbers = found
        figures.save(numbers, folder)
    return write_page(folder, numbers, more)


def last_history(folder: Path) -> list[dict[str, Any]]:
    """What the trainer had logged by its last checkpoint; empty where there is none.

    Raises:
        ValueError: its state is damaged.
    """
    states = folder.glob("checkpoint-*/trainer_state.json")
    latest = max(states, key=lambda p: p.stat().st_mtime, default=None)
    if latest is None:
        return []
    try:
        return list(json.loads(latest.read_text(encoding="utf-8")).get("log_history") or ())
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"'{latest}' is damaged ({error}); remove that checkpoint and try again"
        ) from error
