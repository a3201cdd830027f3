"""From a loaded model to its rows: calibration, score log, attribution, selection."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import ranks
from .analysing.analysis import analyse, convergence
from .analysing.attribution.devices import first_device, give_back
from .analysing.attribution.quadrature import Rule, quadrature
from .analysing.calibration.prompts import Calibration, load_prompts
from .analysing.pace import Pace, duration, why_elsewhere
from .analysing.scores.cache import cache_folder, open_log
from .analysing.scores.log import ScoreLog, fill
from .analysing.scores.pruning import prune
from .args import LokiConfig
from .blocks import AttributionArgs
from .implanting.carrier import check_rank
from .inputs import Inputs
from .model.anatomy import Anatomy, find_anatomy
from .model.fingerprint import fingerprint
from .model.linears import chosen, chosen_down
from .model.loading import is_loaded
from .model.positions import check_lengths
from .rows import Made, RowSelection
from .selecting.select import Election, quota_to_count, rows_without_scores, select_rows

LOG = logging.getLogger("loki_plugin")
_CONVERGENCE_PROMPTS = 8


def choose_rows(
    model: nn.Module, tokenizer, config: LokiConfig, inputs: Inputs | None = None
) -> RowSelection:
    """Analyse `model` on the calibration prompts, or take its scores from the cache; select rows.

    Nothing is analysed where no score decides (`strategy: random`, `quota: 100`, or `targets`
    without the down-projections).

    `inputs` are read now unless given.

    Under `torch.distributed` the ranks share the work and all return one selection, bit for bit.

    Raises:
        ValueError: an unsupported model, a quota without rows, a faulty calibration source; all
            before the first prompt runs.
    """
    rank, world = ranks.current(), ranks.count()
    with ranks.together():
        inputs = inputs or Inputs.read(config)
    selection: Any = None
    if world == 1:
        selection = _choose(model, tokenizer, config, inputs, 0, 1)
        return selection
    loaded = ranks.gather(is_loaded(model))
    if not any(loaded):
        raise ValueError("no rank holds the weights of the model; load it on one of them at least")
    # Sharded training loads the weights of one rank only; that one then works alone.
    first = loaded.index(True)
    with ranks.together():
        if all(loaded):
            selection = _choose(model, tokenizer, config, inputs, rank, world)
        elif rank == first:
            selection = _choose(model, tokenizer, config, inputs, 0, 1)
    return ranks.broadcast(selection, first)


def is_analysed(model: nn.Module, config: LokiConfig) -> bool:
    """Whether scores decide which rows of `model` train."""
    return config.needs_scores and bool(chosen_down(find_anatomy(model), config.targets))


def _choose(
    model: nn.Module, tokenizer, config: LokiConfig, inputs: Inputs, worker: int, workers: int
) -> RowSelection | None:
    with _together(workers):
        anatomy = find_anatomy(model)
        if not chosen_down(anatomy, config.targets):
            return _without_rows(model, anatomy, config)
        count = quota_to_count(config.quota, anatomy.hidden_size)
        if not config.strategy.startswith("global"):  # there the fullest layer is still to be found
            check_rank(config.rank, count)
        excluded = [selection.check_shape(anatomy) for selection in inputs.excluded]
        if not config.needs_scores:
            return _without_scores(model, anatomy, config, excluded)
        shape, taken = (anatomy.num_layers, anatomy.hidden_size), [s.rows for s in excluded]
        Election(shape, config.quota, config.strategy, exclude=taken)  # refused ahead of hours
        calibration = load_prompts(
            tokenizer, **config.calibration.model_dump(), records=inputs.records
        )
        check_lengths(model, [prompt.ids for prompt in calibration.prompts])
        mark = fingerprint(model)
        settings = config.attribution.model_dump(exclude={"batch_size"})
        log = open_log(
            cache_folder(config.cache_dir),
            mark,
            calibration,
            settings,
            anatomy.num_layers,
            anatomy.hidden_size,
            str(model.config._name_or_path),
        )
    with ExitStack() as held:
        held.callback(give_back)
        with _together(workers):
            if worker == 0:  # until the scores are read, nobody may take them away
                held.enter_context(log.locked())
        started = time.perf_counter()
        analysed = _complete(log, model, anatomy, calibration, config.attribution, worker, workers)
        seconds = time.perf_counter() - started
        if worker:
            return None  # its disk may lack the shards of others; the first selects for all
        error = _convergence(log, model, anatomy, calibration, config.attribution)
        rows = select_rows(
            log.read(),
            config.quota,
            config.strategy,
            magnitude=config.magnitude,
            exclude=taken,
            seed=config.seed,
        )
    prune(log.folder.parent, config.cache_limit, keep=log.folder.name)
    made: Made = {
        **config.model_dump(mode="json", include={"quota", "strategy", "magnitude", "exclude"}),
        "seed": config.seed,
        "attribution": settings,
        "calibration": {
            **config.calibration.model_dump(exclude_none=True),
            "prompts": len(calibration.prompts),
            "dropped": calibration.dropped,
            "hash": calibration.hash,
        },
        "analysis": log.folder.name,
        "convergence_error": error,
        "analysis_seconds": round(seconds, 3),
        "prompts_analysed": analysed,
    }
    return RowSelection(rows, anatomy.hidden_size, mark, made)


def _without_rows(model: nn.Module, anatomy: Anatomy, config: LokiConfig) -> RowSelection:
    """Of `targets` without the down-projections."""
    none = [torch.empty(0, dtype=torch.long)] * anatomy.num_layers
    linears = chosen(model, anatomy, config.targets)
    return RowSelection(none, anatomy.hidden_size, fingerprint(model), linears=linears)


def _without_scores(
    model: nn.Module, anatomy: Anatomy, config: LokiConfig, excluded: list[RowSelection]
) -> RowSelection:
    """Drawn rows, or all: no prompt runs, so that any model will do that has rows."""
    rows = rows_without_scores(
        (anatomy.num_layers, anatomy.hidden_size),
        config.quota,
        config.strategy,
        [s.rows for s in excluded],
        config.seed,
    )
    made: Made = {
        **config.model_dump(mode="json", include={"quota", "strategy", "exclude"}),
        "seed": config.seed,
    }
    return RowSelection(rows, anatomy.hidden_size, fingerprint(model), made)


def _together(workers: int) -> AbstractContextManager:
    return ranks.together() if workers > 1 else ExitStack()


def _complete(
    log: ScoreLog,
    model: nn.Module,
    anatomy: Anatomy,
    calibration: Calibration,
    settings: AttributionArgs,
    worker: int,
    workers: int,
) -> int:
    """Make the shards that the log lacks, each worker every `workers`-th of them.

    Returns how many prompts that were, over all workers; 0 where the cache had them all.
    """
    if workers > 1:
        shared = _missing_at_first(log)
        with ranks.together():
            mine = set(log.missing()).intersection(shared[worker::workers])
            _analyse(log, model, anatomy, calibration, settings, sorted(mine))
        # Nodes without a common disk send the first worker what its own does not show.
        for shard in _missing_at_first(log):
            owner = shared.index(shard) % workers
            with ranks.together():
                scores = log.scores(shard) if worker == owner else None
            scores = ranks.broadcast(scores, owner)
            with ranks.together():
                if worker == 0:
                    log.write(shard, scores)
        return sum(len(log.prompts(s)) for s in shared)
    missing = log.missing()
    if not missing:
        age, size = log.age_and_size()
        LOG.info(
            "loki: analysis found in the cache (%s, %.1f h old, %.1f MiB)",
            log.folder,
            age / 3600,
            size / 2**20,
        )
        return 0
    if len(missing) < log.num_shards:
        LOG.info(
            "loki: resuming, %d of %d shards are done",
            log.num_shards - len(missing),
            log.num_shards,
        )
    sharded = ranks.count() > workers
    _analyse(log, model, anatomy, calibration, settings, missing, sharded)
    return sum(len(log.prompts(s)) for s in missing)


def _missing_at_first(log: ScoreLog) -> list[int]:
    """The shards that the first worker's disk lacks, on every worker."""
    with ranks.together():
        missing = log.missing() if ranks.is_first() else None
    return ranks.broadcast(missing, 0)


def _rule(settings: AttributionArgs) -> Rule:
    return quadrature(settings.rule, settings.steps)


def _convergence(
    log: ScoreLog,
    model: nn.Module,
    anatomy: Anatomy,
    calibration: Calibration,
    settings: AttributionArgs,
) -> float | None:
    """The completeness error of the scores, on a few prompts of all lengths; kept beside them."""
    if settings.path != "token":
        return None  # the sequence path has another baseline
    prompts = calibration.prompts
    some = prompts[:: -(-len(prompts) // _CONVERGENCE_PROMPTS)]
    return log.fact("convergence_error", lambda: convergence(model, anatomy, some, _rule(settings)))


def _analyse(
    log: ScoreLog,
    model: nn.Module,
    anatomy: Anatomy,
    calibration: Calibration,
    settings: AttributionArgs,
    shards: list[int],
    sharded: bool = False,
) -> None:
    """Make the given shards of the log; `sharded` as in `why_elsewhere`."""
    if not shards:
        return
    prompts, rule = calibration.prompts, _rule(settings)
    count = sum(len(log.prompts(s)) for s in shards)
    LOG.info(
        "loki: analysing %d prompts of %d to %d tokens (%s) on %d layers x %d rows",
        count,
        min(len(p.ids) for p in prompts),
        max(len(p.ids) for p in prompts),
        calibration.source,
        anatomy.num_layers,
        anatomy.hidden_size,
    )
    started = time.perf_counter()
    why = why_elsewhere(first_device(model), sharded)

    def tell(whole: float) -> None:
        if why:
            LOG.warning("loki: %s", _ahead(whole, count, why))

    pace = Pace(count, tell)
    hidden = not ranks.is_first()
    with tqdm(total=count, desc="loki: analysing", unit=" prompts", disable=hidden) as bar:

        def done(some: int) -> None:
            bar.update(some)
            pace.update(some)

        def make(positions: range) -> torch.Tensor:
            some = [prompts[i] for i in positions]
            return analyse(model, anatomy, some, rule, settings.path, settings.batch_size, done)

        fill(log, make, shards)
    seconds = time.perf_counter() - started
    LOG.info("loki: analysed in %.1f s (%.1f ms per prompt)", seconds, 1000 * seconds / count)


def _ahead(whole: float, count: int, why: str) -> str:
    """What to do about an analysis that will take `whole` seconds."""
    return (
        f"at the pace of its first prompts the analysis takes about {duration(whole)} for {count}"
        f" prompts: {why}. `loki analyse CONFIG`, with the configuration of this run, makes it"
        " ahead on one GPU; the run then takes its rows from the cache or, on another machine,"
        " from the file that it writes (`loki.rows`)"
    )
