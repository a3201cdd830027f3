"""What several commands need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..choices import QUOTA, STRATEGY

if TYPE_CHECKING:
    from ..rows import RowSelection

# Of an Axolotl YAML; Axolotl itself looks at their kinds when it trains.
_BLOCKS = ("loki", "peft", "bnb_config_kwargs", "overrides_of_model_config")

JSON = "print JSON and nothing else; what is logged goes to stderr"


@dataclass(frozen=True)
class Answer:
    """What a command has found out: for the reader, for `--json`, and as the exit code."""

    text: str
    facts: Any = None
    ok: bool = True


class Command(click.Command):
    """A command that returns an `Answer`; a user's mistake is one line, not a traceback.

    Args:
        example: lines to type, for the end of `--help`.
        fails: when the exit code is 1 though the command itself went through.
    """

    def __init__(self, *args, example: str = "", fails: str = "", **kwargs):
        one = "a mistake, named in one line" + (f"; or {fails}" if fails else "")
        shown = "\n".join(f"  {line}" for line in example.splitlines())
        kwargs.setdefault(
            "epilog",
            f"\b\nExamples:\n{shown}\n\n\b\nExit codes:\n  0  done\n  1  {one}\n"
            "  2  a wrong option or argument",
        )
        super().__init__(*args, **kwargs)
        if not any("--json" in p.opts for p in self.params):
            self.params.append(click.Option(["--json", "as_json"], is_flag=True, help=JSON))

    def invoke(self, ctx):
        as_json = ctx.params.pop("as_json", False)
        try:
            with stdout_is_free() if as_json else nullcontext():
                answer = super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        if isinstance(answer, Answer):
            from ..model.writing import json_text

            click.echo(json_text(answer.facts) if as_json else answer.text)
            ctx.exit(0 if answer.ok else 1)


@contextmanager
def stdout_is_free() -> Iterator[None]:
    """What other libraries print and log goes to stderr: stdout is for one JSON document."""
    with redirect_stdout(sys.stderr):
        yield


def make_room(*files: str | None) -> None:
    """Make the folders of files that are written after hours of work, before it.

    Raises:
        OSError: a folder that cannot be made.
    """
    for file in filter(None, files):
        Path(file).parent.mkdir(parents=True, exist_ok=True)


def write_json(path: str, facts: Any) -> str:
    """Write figures for a script; returns the path."""
    from ..model.writing import json_text, write_text

    write_text(Path(path), json_text(facts) + "\n")
    return path


def read_run(config: Path) -> dict[str, Any]:
    """An Axolotl YAML, as it stands.

    Raises:
        ValueError: it is none, or a key that is read here has a value of another kind.
    """
    import yaml

    try:
        run = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{config}' is not YAML in UTF-8: {error}") from error
    if not isinstance(run, dict) or not run.get("base_model"):
        raise ValueError(f"'{config}' is no Axolotl configuration: it has no base_model")
    for key in ("base_model", "output_dir", "optimizer"):
        if not isinstance(run.get(key) or "", str):
            raise ValueError(f"'{config}': {key} must be a text, got {run[key]!r}")
    for key in _BLOCKS:
        if not isinstance(run.get(key) or {}, dict):
            raise ValueError(f"'{config}': `{key}:` must be a block of settings, got {run[key]!r}")
    return run


def scores_options(command):
    """SCORES and how rows are chosen from them, as `stability` and `select` take them."""
    options = [
        click.argument("scores", required=False),
        click.option("--dir", "folder", help="cache folder; default: the user cache folder"),
        click.option("--quota", default=str(QUOTA), show_default=True, help="percent of rows"),
        click.option("--strategy", default=STRATEGY, show_default=True),
        click.option("--magnitude", is_flag=True, help="rank |score|"),
        click.option("--exclude", multiple=True, help="a rows file whose rows are not taken"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


class Source:
    """Scores to choose from: a score log in the cache, or the authors' HDF5 file."""

    def __init__(self, name: str | None, folder: str | None):
        if name is not None and Path(name).is_file():
            from ..analysing.scores.hdf5 import Hdf5Scores

            self.chunks: Any = Hdf5Scores(name)
            self.prompts, _, self.hidden_size = self.chunks.shape
            self.fingerprint = None
            self.title = f"scores of {name}"
            return
        from ..analysing.scores.cache import cache_folder, find_log, fingerprint_of

        log = find_log(cache_folder(folder), name)
        self.chunks = log.read()
        self.prompts, self.hidden_size = len(log.manifest["prompts"]), log.manifest["hidden_size"]
        self.fingerprint = fingerprint_of(log)
        self.title = f"analysis {log.folder.name} of {log.manifest['model']}"


def load_rows(paths) -> list:
    from ..rows import RowSelection

    return [RowSelection.load(path).rows for path in paths]


def check_adapter_beside(file: Path, found: RowSelection) -> None:
    """Without its own rows file an adapter can be neither merged nor gone on with.

    Raises:
        ValueError: `file` is the rows file of an adapter that trained other rows, or another base.
    """
    from ..model.fingerprint import same_model
    from ..protecting.leaking import is_adapter
    from ..rows import RowSelection

    if not (is_adapter(file.parent) and file.is_file()):
        return
    old = RowSelection.load(file)
    marks = old.fingerprint, found.fingerprint
    other_base = same_model(marks[0], marks[1]) if marks[0] and marks[1] else None
    if old != found or other_base:
        what = "another base" if old == found else "other rows than those found now"
        raise ValueError(
            f"'{file}' belongs to the adapter beside it, which trained {what}; give --output, or"
            " another output_dir for the new run"
        )
