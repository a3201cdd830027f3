"""`loki ...`, and the same as `axolotl loki ...`."""

from __future__ import annotations

from pathlib import Path

import click


class _Command(click.Command):
    """A user's mistake is one line, not a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group()
def loki():
    """LoKI: fine-tune the rows that carry little general knowledge, and prove it."""


@loki.command(cls=_Command)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="default: output_dir/merged")
@click.option("--adapter", type=click.Path(path_type=Path), help="default: the run's adapter")
def merge(config: Path, output: Path | None, adapter: Path | None):
    """Write the plain merged model of the run in CONFIG, an Axolotl YAML."""
    import yaml

    from .implanting.merge import merge_adapter
    from .implanting.verify import verify
    from .rows import FILE_NAME, RowSelection

    try:
        run = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"'{config}' is not YAML: {error}") from error
    if not isinstance(run, dict) or not run.get("base_model"):
        raise ValueError(f"'{config}' is no Axolotl configuration: it has no base_model")
    folder = Path(run.get("output_dir") or "./model-out")  # Axolotl's own default
    adapter = adapter or folder
    selection = RowSelection.load(adapter / FILE_NAME)
    report = merge_adapter(run["base_model"], adapter, output or folder / "merged", selection)
    click.echo(f"merged {report.rows} rows of {report.layers} layers into {report.output}")
    _conclude(verify(run["base_model"], report.output, selection))


@loki.command("verify", cls=_Command)
@click.argument("base")
@click.argument("tuned", type=click.Path(exists=True, file_okay=False))
@click.option("--rows", required=True, type=click.Path(exists=True, dir_okay=False))
def verify_command(base: str, tuned: str, rows: str):
    """Prove that TUNED differs from BASE in selected rows only; exit code 1 if it does not."""
    from .implanting.verify import verify
    from .rows import RowSelection

    _conclude(verify(base, tuned, RowSelection.load(rows)))


@loki.group()
def cache():
    """The score logs of earlier analyses."""


_DIRECTORY = click.option("--dir", "folder", help="default: the user cache folder")


@cache.command("list", cls=_Command)
@_DIRECTORY
def list_command(folder: str | None):
    """List the analyses that are kept, with size and age."""
    from .analysing.cache import cache_folder, entries

    place = cache_folder(folder)
    found = entries(place)
    click.echo(f"{len(found)} analyses in {place}")
    for e in found:
        state = "complete" if e.complete else f"{e.shards} shards so far"
        click.echo(
            f"{e.key}  {e.prompts} prompts, {state}, {e.bytes / 2**20:.1f} MiB,"
            f" {e.age_seconds / 3600:.1f} h old  {e.model}"
        )


@cache.command("clear", cls=_Command)
@click.argument("key", required=False)
@_DIRECTORY
def clear_command(key: str | None, folder: str | None):
    """Delete the analysis KEY, or all of them."""
    from .analysing.cache import cache_folder, clear

    place = cache_folder(folder)
    click.echo(f"removed {len(clear(place, key))} analyses from {place}")


def _conclude(report) -> None:
    click.echo(report.text())
    if not report.ok:
        raise SystemExit(1)
