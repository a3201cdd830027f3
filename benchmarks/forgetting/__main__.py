"""What keeps knowledge?

    python -m benchmarks.forgetting screen --size small --work DIR    # every arm, three rates
    python -m benchmarks.forgetting final --size small --work DIR     # finalists, five rates
    python -m benchmarks.forgetting bracket --size small --work DIR   # the rates around the score
    python -m benchmarks.forgetting climb --size small --work DIR     # ... and up to the collapse
    python -m benchmarks.forgetting axolotl --size small --work DIR   # through `axolotl train`
    python -m benchmarks.forgetting suppress --size small --work DIR  # do the scores mean anything?
    python -m benchmarks.forgetting written --size small --work DIR   # what does the base write?
    python -m benchmarks.forgetting join --parts A,B                  # files of several processes
    python -m benchmarks.forgetting report                            # figures, docs/evidence.md

A run that is killed goes on where it stopped; `--minutes` ends it between two runs. One thread;
processes that work side by side write to different `--output` folders, which `join` brings into
one. Finals of the size `reported`, and of each `--base` (the seed of the world and of the base that
has learned it), have a file of their own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.forgetting import base, matching, overlap, report, silencing, sweep, through
from benchmarks.forgetting.tasks import TASKS
from benchmarks.writer import RESULTS

FINALISTS = (
    "lora_all_r16,full,loki_q30,random_q30,loki_protect_q30,random_protect_q30,protect_q99,"
    "lora_anchor,loki_anchor_q30,lora_protect,lora_replay1,lora_all_r16_wd0.3,lora_attn,"
    "lora_gateup,loki_protect_anchor_q30"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "what",
        choices=(
            *("screen", "final", "bracket", "climb", "axolotl", "suppress", "written"),
            *("join", "report"),
        ),
    )
    parser.add_argument("--work", type=Path, help="where base models are kept")
    parser.add_argument("--base", type=int, default=0, help="seed of the world and of its base")
    parser.add_argument("--size", choices=base.SIZES, default="small")
    parser.add_argument("--arms", help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", help=f"default: {','.join(TASKS)}; of axolotl: facts")
    parser.add_argument("--minutes", type=float, help="begin no run after that")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--parts", default="", help="folders to join, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    until = None if options.minutes is None else time.time() + 60 * options.minutes
    if options.what == "join":
        parts = [Path(part) for part in options.parts.split(",")]
        stages = [f"forgetting_{stage}*.csv" for stage in sweep.STAGES]
        for name in sorted({f.name for part in parts for s in stages for f in part.glob(s)}):
            files = [folder / name for folder in (options.output, *parts)]
            sweep.join(files, options.output / name)
        return
    if options.what == "report":
        report.write(options.output)
        return
    if options.work is None:
        parser.error("--work DIR says where base models are kept; they are trained where missing")
    if options.base and options.what == "suppress":
        parser.error(f"{options.what} is told of the first base only; leave --base out")
    known = base.load(options.work, options.size, options.base)
    if options.what == "written":
        overlap.write(known, options.output)
        return
    screen = options.what == "screen"
    stage = "screen" if screen else "reported" if options.size == "reported" else "final"
    file = options.output / sweep.results(stage, options.base)
    runs = sweep.Sweep(known, options.size, file, final=not screen)
    if options.what == "suppress":
        silencing.suppress(known, options.output)
        return
    arms = options.arms.split(",") if options.arms else None
    finalists = arms or FINALISTS.split(",")
    tasks = options.tasks.split(",") if options.tasks else list(TASKS)
    if options.what == "axolotl":
        tasks = tasks if options.tasks else ["facts"]
        through.run_all(known, runs, options.output, options.work, arms or through.ARMS, tasks)
    elif screen:
        runs.run_all(sweep.screening(arms), until)
    elif options.what == "final":
        runs.run_all(sweep.finals(finalists, options.seeds, tasks), until)
    else:
        for seed in range(options.seeds):
            for task in tasks:
                go = runs.climb if options.what == "climb" else runs.bracket
                go(finalists, task, seed, matching.MATCHED[task], until)


if __name__ == "__main__":
    main()
