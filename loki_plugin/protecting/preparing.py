"""From a loaded model and texts to the directions that protect it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import ranks
from ..analysing.attribution.devices import first_device
from ..analysing.scores.cache import DIRECTIONS, cache_folder, kept_file
from ..analysing.scores.pruning import prune
from ..args import LokiConfig
from ..blocks import ProtectArgs
from ..choices import DOWN, PROTECT_GB
from ..model.anatomy import find_anatomy, linear_sizes
from ..model.fingerprint import fingerprint
from ..model.linears import kind_of
from .directions import FILE_NAME, Directions
from .finding import find_directions, targeted
from .keeping import by_one, key_of, read_kept
from .packed import packed
from .solving import Wanted

LOG = logging.getLogger("loki_plugin")


def earlier_directions(
    config: LokiConfig, adapter: str | None, checkpoint: str | None
) -> Directions | None:
    """The directions that a checkpoint or an adapter was trained with; training goes on with them.

    Raises:
        ValueError: the settings want directions where there were none, or, of a checkpoint,
            others or none.
    """
    folder = checkpoint or adapter
    file = Path(folder or "") / FILE_NAME
    if not folder or not file.exists():
        if folder and config.protect.reads:
            raise ValueError(
                f"'{folder}' has no {FILE_NAME}: it was trained without protected inputs, and"
                " protecting them now (`loki.protect: auto` is the default) would change what it"
                " has learned. Set `protect: off`, or `protect: {anchor: 1.0, text: self}`, or"
                " merge it and start from the merged model"
            )
        return None
    found = Directions.load(file)
    wanted = _settings(config)
    # An adapter decides where the YAML says nothing, and so does a checkpoint of its run.
    asked = config.protect.reads or (checkpoint and not adapter)
    soft = found.made.get("soft", found.soft)  # with nothing held it cannot be seen
    had_settings = {k: found.made.get(k) for k in wanted} | {"soft": soft}
    if asked and had_settings != wanted:
        had = ", ".join(f"{k}: {v}" for k, v in had_settings.items())
        raise ValueError(
            f"'{folder}' was trained with protect: {{{had}}}; going on with other directions would"
            " mix two constraints. Give the same settings, or start afresh"
        )
    if found.blind:
        LOG.warning(
            "loki: the directions of '%s' were found by an earlier version, in whose moments the"
            " massive activations of a few tokens could hide all others: some layers may be"
            " unprotected. To have them found anew, start afresh, or from the merged model",
            folder,
        )
    return found


def check_trained(found: Directions, trained: Collection[str], down: Sequence[str]) -> None:
    """Check that earlier directions are of the linears that train.

    Args:
        trained: names of the linears that train.
        down: names of the down-projections; some may have directions and no rows.

    Raises:
        ValueError: a linear without directions, or directions of one that does not train.
    """
    names = found.by_module(down).keys()
    others = sorted((set(trained) - names) | (names - {*trained, *down}))
    if others:
        kinds = ", ".join(dict.fromkeys(map(kind_of, others)))
        raise ValueError(
            f"the run that goes on was trained with directions of other linears: {kinds} had some"
            " there and would not train now, or the other way round. Give the `loki.targets` of"
            " that run, or start afresh"
        )


def choose_directions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: LokiConfig,
    still: Sequence[str] = (),
) -> Directions:
    """Find the directions that hold the wanted energy of `prompts`, or take them from the cache.

    Under `torch.distributed` one rank works and all return its directions, bit for bit.

    Args:
        still: names of targeted linears whose A will stand still (`fixing`); they get none.

    Raises:
        ValueError: as `input_directions`.
    """
    found, first = by_one(model, lambda: _choose(model, prompts, config, still))
    if ranks.count() == 1:
        return found
    layers = ranks.broadcast(found and len(found.basis), first)
    # One after another: all at once would stand in memory twice.
    basis = [ranks.broadcast(found and found.basis[i], first) for i in range(layers)]
    rest = ranks.broadcast(found and (found.fingerprint, found.made, found.sites), first)
    return found or Directions(basis, *rest)


def wanted_directions(model: nn.Module, config: LokiConfig) -> Wanted:
    """What `loki.protect` asks for, within the memory that it may take.

    In float32 where the largest number of directions fits so. Else soft ones in 8 bits and hard
    ones, of which 8 bits would let too much through, in bfloat16: then P is that of the rounded V,
    on the card as in what is saved.
    """
    settings = config.protect
    memory = room(settings, first_device(model)) if settings.inputs is not None else None
    dtype = None
    if memory is not None:
        sizes = {id(m): linear_sizes(m) for m in targeted(model, config.targets).values()}
        most = sum(4 * s[0] * s[0] for s in sizes.values() if s)
        small = torch.int8 if settings.soft else torch.bfloat16
        dtype = small if most > memory else None
    return replace(all_wanted(config), memory=memory, dtype=dtype)


def all_wanted(config: LokiConfig) -> Wanted:
    """The same without a limit, for directions that are not held while it trains."""
    settings = config.protect
    settles = settings.auto and settings.directions is None
    return Wanted(settings.inputs, settings.directions, settings.soft, settles=settles)


def _limits(wanted: Wanted, tokens: int) -> str:
    """What kept directions from being as many as were asked for."""
    said = [f"{wanted.memory / 10**9:.3g} GB (`protect.memory`)"] if wanted.memory else []
    said += [f"{tokens} tokens of text"] if wanted.settles else []
    return f"there is {' and '.join(said)}"


def room(settings: ProtectArgs, device: torch.device) -> int | None:
    """Bytes that directions may take: what the YAML says, else a tenth of the card and at most
    `PROTECT_GB`; None on a CPU, whose memory is large beside what trains there."""
    if settings.memory is not None:
        return int(settings.memory * 10**9)
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_properties(device).total_memory
    return min(card // 10, int(PROTECT_GB * 10**9))


def _settings(config: LokiConfig) -> dict[str, Any]:
    return config.protect.model_dump(include={"inputs", "directions", "soft"})


def _choose(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: LokiConfig,
    still: Sequence[str],
) -> Directions:
    moving = [name for name in targeted(model, config.targets) if name not in still]
    if not still:
        return _find(model, prompts, config)
    down = find_anatomy(model).names
    if moving:
        targets = DOWN if moving == down else moving
        found = _find(model, prompts, config.model_copy(update={"targets": targets}))
    else:
        made = {**_settings(config), "sinks": [], "tokens": sum(map(len, prompts))}
        made |= {"prompts": len(prompts), "text": config.protect.text}
        found = Directions([], fingerprint(model, unchanged=True), made, [])
    sizes = [linear_sizes(model.get_submodule(name)) for name in still]
    return replace(
        found,
        basis=[*found.basis, *(torch.empty(size[0], 0) for size in sizes if size)],
        made=found.made | {"still": list(still)},
        sites=[*(found.sites or [[name] for name in down] * bool(moving)), *([n] for n in still)],
    )


def _find(model: nn.Module, prompts: Sequence[Sequence[int]], config: LokiConfig) -> Directions:
    settings, wanted = _settings(config), wanted_directions(model, config)
    # In a run the model was read when its rows were chosen; what was written to is read again.
    mark = fingerprint(model, unchanged=True)
    digest = hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()
    identity = {
        "loki_plugin": version("loki_plugin"),
        "fingerprint": mark,
        "prompts": digest,
        "targets": config.targets,
        "memory": [wanted.memory, str(wanted.dtype), wanted.settles],
        **settings,
    }
    folder = cache_folder(config.cache_dir)
    path = kept_file(folder, DIRECTIONS, key_of(identity))
    kept = read_kept(path, lambda: Directions.load(path), "they will be found again")
    if kept is not None:
        LOG.info("loki: protected directions found in the cache (%s)", path)
        return kept
    started = time.perf_counter()
    found = find_directions(model, prompts, wanted, config.targets, coverage=True)
    if found.capped:
        LOG.warning(
            "loki: for %d of %d inputs fewer directions are protected than %g %% of what they read"
            " would take, the leading ones: %s",
            found.capped,
            len(found.basis),
            100 * settings["inputs"],
            _limits(wanted, found.tokens),
        )
    made = {
        **settings,
        "sinks": found.sinks,
        "capped": found.capped,
        "energy": [round(e, 6) for e in found.energy],
        "held_out": found.held_out and [round(e, 6) for e in found.held_out],
        "prompts": len(prompts),
        "tokens": found.tokens,
        "hash": digest,
        "text": config.protect.text,
        "seconds": round(time.perf_counter() - started, 3),
    }
    sites = None if config.targets == DOWN else found.sites
    directions = Directions(found.basis, mark, made, sites)
    try:
        directions.save(path)
        prune(folder, config.cache_limit, keep=path.stem)
    except OSError as error:  # they are here, and the run keeps them beside its adapter
        LOG.warning("loki: the protected directions could not be kept in the cache: %s", error)
    return directions


def report(directions: Directions) -> dict[str, Any]:
    """What `loki_report.json` says about the directions; null where the file does not tell.

    Lists have an entry per input that is read, in layer order; `inputs` says by which modules.
    """
    made = directions.made
    kept = ("tokens", "prompts", "seconds", "hash", "text", "capped")
    sinks = made.get("sinks")
    return {
        "directions_per_layer": directions.counts,
        "inputs": directions.sites,
        "soft": made.get("soft", directions.soft),
        "energy_per_layer": made.get("energy"),
        "energy_of_held_out_prompts_per_layer": made.get("held_out"),
        "sink_directions_per_layer": sinks and [s["directions"] for s in sinks],
        "sink_energy_per_layer": sinks and [s["energy"] for s in sinks],
        "sink_tokens_per_layer": sinks and [s["tokens"] for s in sinks],
        **{key: made.get(key) for key in kept},
    }


def describe(directions: Directions) -> str:
    """What is protected, in one line."""
    counts, made = directions.counts, directions.made
    size = sum((packed(b) or b).nbytes for b in directions.basis)
    held = (
        f", which hold at least {100 * min(made['energy']):.2f} % of what {made['tokens']} tokens"
        " read"
        if "energy" in made
        else ""
    )
    if made.get("held_out"):
        held += f" and {100 * min(made['held_out']):.2f} % of what prompts kept back read"
    sinks = [s for s in made.get("sinks") or [] if s["directions"]]
    if sinks:
        longest = max(s["longest"] for s in sinks)
        held += f"; {len(sinks)} inputs have sinks, tokens up to {longest:g} times as long as"
        held += " others, whose directions are among them"
    how = "reads in inverse proportion to their use" if directions.soft else "does not read"
    return f"the update {how} {_each(directions, counts)}{held} ({size / 2**20:.1f} MiB)"


def _each(directions: Directions, counts: Sequence[int]) -> str:
    """How many directions of how many inputs, by input size."""
    said = []
    for size in sorted({b.shape[0] for b in directions.basis}, reverse=True):
        some = [n for n, b in zip(counts, directions.basis, strict=True) if b.shape[0] == size]
        low, high = min(some), max(some)
        said.append(f"{low if low == high else f'{low} to {high}'} of {size}")
    where = "per layer" if directions.sites is None else f"at {len(counts)} places"
    return f"{' and '.join(said)} input directions {where}"
