"""What real pretrained models forget: see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.real import (
    bases,
    beginning,
    building,
    finals,
    forms,
    front,
    matching,
    pace,
    report,
    seen,
    sweep,
    tables,
    through,
)
from benchmarks.real.arms import ARMS
from benchmarks.real.building.reading import Reader
from benchmarks.real.data import Data, built
from benchmarks.real.lab import Lab
from benchmarks.real.probes import AMOUNTS
from benchmarks.real.tasks import TASKS
from benchmarks.writer import RESULTS

_TASK, _SEED = "snips", "0"  # what `run` takes where nothing is said
# What writes a results file of its own.
_REPORTS = {
    "directions": lambda lab, options: seen.report(lab),
    "forms": lambda lab, options: forms.report(lab),
    "pace": lambda lab, options: pace.report(lab, options.precision),
    "beginning": lambda lab, options: beginning.report(lab, options.steps, options.precision),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__)
    parser.add_argument(
        "what",
        choices=["bases", "data", "run", "report", "through", *_REPORTS],
    )
    parser.add_argument("--base", default="", help=f"of: {', '.join(bases.NAMES)}")
    parser.add_argument("--arms", default="", help="names by commas; default: all")
    parser.add_argument("--tasks", default=_TASK, help=f"of: {', '.join(TASKS)}")
    parser.add_argument("--seeds", default=_SEED, help="numbers by commas")
    parser.add_argument("--rates", default="", help="by commas; default: the arm's own")
    parser.add_argument("--finals", action="store_true", help="those of finals.py, for `run`")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th run, for n processes")
    parser.add_argument("--best", action="store_true", help="the first of the arm's rates only")
    parser.add_argument("--steps", type=int, default=sweep.POINTS[-1], help="of a run at most")
    parser.add_argument("--points", default="", help="steps to measure at, by commas")
    parser.add_argument("--to-end", action="store_true", help="go on behind the matched score")
    parser.add_argument("--amount", choices=AMOUNTS, default="brief", help="how much is measured")
    parser.add_argument(
        "--precision",
        choices=["bf16", "float32"],
        default="bf16",
        help="of training; float32 is faster on a CPU without AVX512-BF16 or AMX",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="default: LOKI_REAL_DATA, or beside the bases")
    parser.add_argument("--repositories", type=Path, help="of `data`: git repositories to read")
    parser.add_argument("--work", type=Path, help="what is made once; default: beside the bases")
    parser.add_argument("--hours", type=float, help="begin no run after so long")
    parser.add_argument("--stage", default="runs", help="of the file real_STAGE.csv")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.repositories and options.what != "data":
        parser.error(f"--repositories {options.repositories}: only `data` reads repositories")
    if options.repositories and not options.repositories.is_dir():
        parser.error(f"--repositories {options.repositories}: no such folder")
    chosen_otherwise = (options.arms, options.rates, options.best, options.tasks, options.seeds)
    if options.finals and chosen_otherwise != ("", "", False, _TASK, _SEED):
        parser.error(
            "--finals says which runs; leave out --tasks, --arms, --seeds, --rates, --best"
        )
    if (options.finals or options.part != "1/1") and options.what != "run":
        parser.error(f"{options.what}: --finals and --part are for `run`")
    if options.what == "bases":
        for name in options.base.split(",") if options.base else bases.NAMES:
            print(bases.path(name))
        return
    if options.what == "data":
        _build(options.data or built(), options.repositories)
        return
    if options.what == "report":
        report.write(options.output)
        every = [r for r in matching.read(options.output) if r["amount"] != "ci"]
        print(f"written: {tables.write_rates(options.output, every)}")
        if options.output == RESULTS:  # the pages tell what is committed
            for path in front.fill(front.kept()):
                print(f"written: {path}")
        return
    arms = _names(options.arms, ARMS, "--arms", parser)
    chosen = _names(options.tasks, TASKS, "--tasks", parser)
    names = _names(options.base or bases.NAMES[0], bases.NAMES, "--base", parser)
    given = tuple(float(r) for r in options.rates.split(",") if r)
    data = Data(options.data)
    labs = {n: Lab(n, data, options.amount, options.device, options.work) for n in names}
    if options.what == "through":
        names = options.arms.split(",") if options.arms else list(through.YAMLS)
        known = _names(",".join(names), through.YAMLS, "--arms", parser)
        for lab in labs.values():
            for task in chosen:
                through.report(lab, known, task, options.steps)
        return
    if options.what != "run":
        for lab in labs.values():
            _REPORTS[options.what](lab, options)
        return
    keys = [
        sweep.Key(base, task, arm, int(seed), rate, options.amount)
        for seed in options.seeds.split(",")
        for base in names
        for task in chosen
        for arm in arms
        for rate in given or (ARMS[arm].rates[:1] if options.best else ARMS[arm].rates)
    ]
    if options.finals:
        keys = [key for base in names for key in finals.keys(base, options.amount)]
    try:
        keys = finals.part(keys, options.part)
    except ValueError as error:
        parser.error(str(error))
    sweep.run_all(
        labs,
        keys,
        options.output / f"real_{options.stage}.csv",
        None if options.hours is None else time.time() + 3600 * options.hours,
        options.steps,
        options.to_end,
        precision=options.precision,
        points=tuple(int(p) for p in options.points.split(",") if p) or sweep.POINTS,
    )


def _build(folder: Path, repositories: Path | None) -> None:
    print(f"'{folder}'; some licences allow to measure with a file, not to pass it on: README.md")
    wrong = building.build(folder, Reader(repositories))
    if wrong:
        sys.exit("\n".join(["", *wrong]))
    print(f"{len(building.FILES)} files, with the bytes that the results were measured with")


def _names(given: str, known, option: str, parser) -> list[str]:
    found = [n for n in given.split(",") if n] or list(known)
    unknown = [n for n in found if n not in known]
    if unknown:
        parser.error(f"{option} {','.join(unknown)}: there are {', '.join(known)}")
    return found


if __name__ == "__main__":
    main()
