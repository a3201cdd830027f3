"""How many directions of what a real base reads are protected, layer by layer, before and after
massive activations counted apart; and how much of ordinary and of sink tokens that holds."""

from __future__ import annotations

import torch

from benchmarks.real.lab import Lab
from benchmarks.writer import command, write
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting.eigen import leading
from loki_plugin.protecting.solving import Wanted, solve

_SHARE = 0.99


def compare(lab: Lab) -> list[dict]:
    """A line per down-projection: the directions of 99 % of Σ x xᵀ, as 0.6.0 had it, and of today's
    moments, with what either holds of the directions of ordinary tokens."""
    down = set(find_anatomy(lab.known).names)
    sites = [(s, m) for s, m in lab.moments("prompts") if s.names[0] in down]
    rows = []
    for layer, ((site, moments), blind) in enumerate(zip(sites, lab.raw_moments(), strict=True)):
        before = leading(blind, _SHARE).vectors
        now = solve(site, moments, None, Wanted(_SHARE), None, 10**9)
        assert moments.ordinary is not None
        rows.append(
            {
                "layer": layer,
                "inputs": site.size,
                "longest over median": round(max(moments.longest, 1), 1),
                "0.6.0: directions": before.shape[1],
                "0.6.0: held of ordinary tokens": _held(moments.ordinary, before),
                "now: directions": now.basis.shape[1],
                "of them sinks'": now.sinks["directions"],
                "now: held of ordinary tokens": _held(moments.ordinary, now.basis),
                "now: held of sinks": now.sinks["energy"] or "",
                "for 0.9": len(leading(moments.ordinary, 0.9).values),
            }
        )
    return rows


def _held(moment: torch.Tensor, u: torch.Tensor) -> float:
    return round(float((u * (moment @ u)).sum() / moment.trace()), 4)


def report(lab: Lab) -> None:
    rows = compare(lab)
    tokens = sum(map(len, lab.prompts))
    write(
        "input_directions",
        f"{lab.name}, {len(lab.prompts)} calibration prompts of {tokens} tokens: directions of"
        f" {100 * _SHARE:g} % of what the down-projections read. A token is a sink where its input"
        " is more than ten times as long as the median.",
        command("real", DATA=str(lab.data.folder)),
        rows,
        as_csv=True,
    )
