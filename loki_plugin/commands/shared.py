"""What several commands need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..choices import QUOTA, STRATEGY


class Command(click.Command):
    """A user's mistake is one line, not a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error


def read_run(config: Path) -> dict[str, Any]:
    """An Axolotl YAML, as it stands."""
    import yaml

    try:
        run = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"'{config}' is not YAML: {error}") from error
    if not isinstance(run, dict) or not run.get("base_model"):
        raise ValueError(f"'{config}' is no Axolotl configuration: it has no base_model")
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
        from ..analysing.scores.cache import cache_folder, find_log

        log = find_log(cache_folder(folder), name)
        self.chunks = log.read()
        self.prompts, self.hidden_size = len(log.manifest["prompts"]), log.manifest["hidden_size"]
        self.fingerprint = log.manifest["fingerprint"]
        self.title = f"analysis {log.folder.name} of {log.manifest['model']}"


def load_rows(paths) -> list:
    from ..rows import RowSelection

    return [RowSelection.load(path).rows for path in paths]
