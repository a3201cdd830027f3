"""`loki ...`, and the same as `axolotl loki ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .choices import QUOTA, STRATEGY, plain_number


class _Command(click.Command):
    """A user's mistake is one line, not a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error


def _read_run(config: Path) -> dict[str, Any]:
    """An Axolotl YAML, as it stands."""
    import yaml

    try:
        run = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"'{config}' is not YAML: {error}") from error
    if not isinstance(run, dict) or not run.get("base_model"):
        raise ValueError(f"'{config}' is no Axolotl configuration: it has no base_model")
    return run


@click.group()
def loki():
    """LoKI: fine-tune the rows that carry little general knowledge, and prove it."""


@loki.command(cls=_Command)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="default: output_dir/merged")
@click.option("--adapter", type=click.Path(path_type=Path), help="default: the run's adapter")
def merge(config: Path, output: Path | None, adapter: Path | None):
    """Write the plain merged model of the run in CONFIG, an Axolotl YAML."""

    from .implanting.proven import NotProven, merge_run

    run = _read_run(config)
    folder = Path(run.get("output_dir") or "./model-out")  # Axolotl's own default
    adapter = adapter or folder
    try:
        merged, proof = merge_run(run, adapter, output or folder / "merged")
    except NotProven as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{merged.text()}\n{proof.text()}")


@loki.command("verify", cls=_Command)
@click.argument("base")
@click.argument("tuned", type=click.Path(exists=True, file_okay=False))
@click.option("--rows", required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--revision", help="of BASE on the hub")
@click.option("--trust-remote-code", is_flag=True, help="where BASE brings code of its own")
@click.option(
    "--directions",
    type=click.Path(exists=True, dir_okay=False),
    help="a loki_directions.safetensors: also say how much of the update reads them",
)
def verify_command(base, tuned, rows, revision, trust_remote_code, directions):
    """Prove that TUNED differs from BASE in selected rows only; exit code 1 if it does not.

    TUNED is a merged model, or an adapter's folder.
    """
    from .directions import Directions
    from .implanting.checkpoint import Base
    from .implanting.leaking import check_adapter, is_adapter, measure_leakage
    from .implanting.verify import verify
    from .rows import RowSelection

    base, selection = Base(base, revision, trust_remote_code), RowSelection.load(rows)
    if directions:
        click.echo(measure_leakage(base, tuned, selection, Directions.load(directions)).text())
    if is_adapter(tuned):
        click.echo(check_adapter(base, Path(tuned), selection))
        return
    report = verify(base, tuned, selection)
    click.echo(report.text())
    if not report.ok:
        raise SystemExit(1)


def _scores_options(command):
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


@loki.command(cls=_Command)
@_scores_options
@click.option("--rounds", default=10, show_default=True, help="resamples")
@click.option("--plot", type=click.Path(dir_okay=False), help="draw the figure into this file")
def stability(scores, folder, quota, strategy, magnitude, exclude, rounds, plot):
    """Say whether the calibration was enough: would other prompts choose the same rows?

    SCORES is an analysis of `loki cache list` (default: the newest) or the authors' HDF5 file.
    """
    from .selecting.stability import bootstrap_overlap, plot_stability

    source = _Source(scores, folder)
    rules = {"magnitude": magnitude, "exclude": _load_rows(exclude)}
    found = bootstrap_overlap(
        source.chunks, quota, strategy, **rules, prompts=source.prompts, rounds=rounds
    )
    click.echo(f"{source.title}, quota {quota} %, {strategy}\n{found.text()}")
    if plot:
        click.echo(f"figure in {plot_stability(found, plot)}")


@loki.command("select", cls=_Command)
@_scores_options
@click.option("--seed", default=0, show_default=True, help="of the strategy `random`")
@click.option("--output", default="loki_rows.json", show_default=True)
@click.option("--positions", is_flag=True, help="write the authors' bare list of lists")
def select_command(scores, folder, quota, strategy, magnitude, exclude, seed, output, positions):
    """Choose rows from an analysis that is there already, without loading the model.

    SCORES is an analysis of `loki cache list` (default: the newest) or the authors' HDF5 file.
    """
    from .rows import Made, RowSelection
    from .selecting.select import select_rows

    source = _Source(scores, folder)
    rules = {"magnitude": magnitude, "exclude": _load_rows(exclude), "seed": seed}
    rows = select_rows(source.chunks, quota, strategy, **rules)
    made = Made(
        quota=plain_number(quota),
        strategy=strategy,
        magnitude=magnitude,
        scores=source.title,
        exclude=list(exclude),
        seed=seed,
    )
    selection = RowSelection(rows, source.hidden_size, source.fingerprint, made)
    written = selection.save_positions(output) if positions else selection.save(output)
    click.echo(f"{sum(selection.counts)} rows of {selection.num_layers} layers in {written}")


class _Source:
    """Scores to choose from: a score log in the cache, or the authors' HDF5 file."""

    def __init__(self, name: str | None, folder: str | None):
        if name is not None and Path(name).is_file():
            from .analysing.scores.hdf5 import Hdf5Scores

            self.chunks: Any = Hdf5Scores(name)
            self.prompts, _, self.hidden_size = self.chunks.shape
            self.fingerprint = None
            self.title = f"scores of {name}"
            return
        from .analysing.scores.cache import cache_folder, find_log

        log = find_log(cache_folder(folder), name)
        self.chunks = log.read()
        self.prompts, self.hidden_size = len(log.manifest["prompts"]), log.manifest["hidden_size"]
        self.fingerprint = log.manifest["fingerprint"]
        self.title = f"analysis {log.folder.name} of {log.manifest['model']}"


def _load_rows(paths) -> list:
    from .rows import RowSelection

    return [RowSelection.load(path).rows for path in paths]


@loki.group()
def cache():
    """The score logs of earlier analyses."""


_DIRECTORY = click.option("--dir", "folder", help="default: the user cache folder")


@cache.command("list", cls=_Command)
@_DIRECTORY
def list_command(folder: str | None):
    """List the analyses that are kept, with size and age."""
    from .analysing.scores.cache import cache_folder, entries, strangers

    place = cache_folder(folder)
    found = entries(place)
    click.echo(f"{len(found)} analyses in {place}")
    for e in found:
        state = "complete" if e.complete else f"{e.shards} shards so far"
        click.echo(
            f"{e.key}  {e.prompts} prompts, {state}, {e.bytes / 2**20:.1f} MiB,"
            f" {e.age_seconds / 3600:.1f} h old  {e.model}"
        )
    for name in strangers(place):
        click.echo(f"{name}  is not ours (its manifest.json is another program's); left alone")


@cache.command("clear", cls=_Command)
@click.argument("key", required=False)
@_DIRECTORY
def clear_command(key: str | None, folder: str | None):
    """Delete the analysis KEY, or all of them; never one that is in use, nor others' files."""
    from .analysing.scores.cache import cache_folder, clear

    place = cache_folder(folder)
    removed, in_use = clear(place, key)
    click.echo(f"removed {len(removed)} analyses from {place}")
    for each in in_use:
        click.echo(f"{each}  is in use by a running analysis; kept")


@loki.command("forgetting", cls=_Command)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--base", help="the model before; default: CONFIG's base_model")
@click.option("--tuned", help="merged model or adapter; default: what CONFIG's run has left")
@click.option("--tasks", default="", help="lm-eval tasks, separated by commas")
@click.option("--include", help="a folder with lm-eval task files of your own")
@click.option("--limit", type=int, help="items per task")
@click.option("--batch-size", default="auto", show_default=True)
@click.option("--prompts", default="builtin", show_default=True, help="as loki.calibration.source")
@click.option("--noise-floor", is_flag=True, help="evaluate the base a second time")
@click.option("--device", help="default: the GPU where there is one")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False), help="write the figures as JSON")
@click.option("--plot", "picture", type=click.Path(dir_okay=False), help="draw them")
def forgetting_command(config, base, tuned, tasks, prompts, output, picture, **options):
    """How much did a fine-tuned model forget? KL and answers on prompts, lm-eval tasks, flips.

    Examples: `loki forgetting run.yaml`;
    `loki forgetting --base B --tuned T --tasks hellaswag,winogrande`
    """
    import json

    from . import forgetting

    if config is not None:
        run = _read_run(Path(config))
        if base is None or tuned is None:
            of_base, of_tuned = forgetting.of_a_run(run)
            base, tuned = base or of_base, tuned or of_tuned
        options["revision"] = run.get("revision_of_model")
        options["trust_remote_code"] = bool(run.get("trust_remote_code"))
    if base is None or tuned is None:
        raise ValueError("give a CONFIG, or --base and --tuned")
    names = [t for t in tasks.split(",") if t]
    click.echo(f"{base} -> {tuned}")
    report = forgetting.measure(base, tuned, names, prompts, **options)
    click.echo(report.text())
    if output:
        Path(output).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        click.echo(f"figures in {output}")
    if picture:
        click.echo(f"figure in {forgetting.plot(report, picture)}")


@loki.command("suppress", cls=_Command)
@click.argument("model")
@click.option("--scores", help="an analysis of `loki cache list`; default: the newest")
@click.option("--dir", "folder", help="cache folder; default: the user cache folder")
@click.option("--quotas", default="1,2,5,10,20", show_default=True, help="percent of the rows")
@click.option("--prompts", default="builtin", show_default=True, help="as loki.calibration.source")
@click.option("--device", help="default: the GPU where there is one")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False), help="write the figures as JSON")
def suppress_command(model, scores, folder, quotas, prompts, device, dtype, output):
    """Do the scores tell what rows MODEL needs? Silences its lowest, random and highest rows.

    MODEL is the model that was analysed: a folder or a hub id.
    """
    import json

    from transformers import AutoTokenizer

    from .analysing.scores.cache import cache_folder, find_log
    from .args import CalibrationArgs
    from .forgetting import load_model, load_questions
    from .model.fingerprint import fingerprint, same_model
    from .suppress import curve, text

    log = find_log(cache_folder(folder), scores)
    loaded = load_model(model, None, device, dtype)
    difference = same_model(log.manifest["fingerprint"], fingerprint(loaded))
    if difference:
        raise ValueError(
            f"analysis {log.folder.name} was made of {log.manifest['model']}, not of '{model}':"
            f" {difference}; choose another one of `loki cache list`"
        )
    asked = load_questions(AutoTokenizer.from_pretrained(model), CalibrationArgs(source=prompts))
    found = curve(
        loaded,
        [p.ids for p in asked],
        list(log.read()),
        [float(q) for q in quotas.split(",")],
        [p.target for p in asked],
    )
    click.echo(f"analysis {log.folder.name}, {len(asked)} prompts\n{text(found)}")
    if output:
        Path(output).write_text(
            json.dumps([s.to_json() for s in found], indent=2) + "\n", encoding="utf-8"
        )
