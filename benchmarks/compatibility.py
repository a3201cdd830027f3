"""Which versions the package runs with: a fresh environment per combination, and a set of tests.

    python -m benchmarks.compatibility --work DIR python3.12:0.19.0:2.11.0 ...
    python -m benchmarks.compatibility --work DIR \\
        python3.12:none:2.15.0:transformers=5.24.0,peft=0.21.2,trl=1.16.0 ...

A combination is PYTHON:AXOLOTL:TORCH. Axolotl pins transformers, PEFT, TRL and bitsandbytes itself,
so each combination stands for those too. Without Axolotl (`none`) they are named behind it, and the
tests of the stages run, a line for each stage. The package is installed without its own ranges, so
that a combination outside of them can be tried before they are widened. Combinations that were run
before stay in the results; `--render` only writes the table again.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.writer import RESULTS, write

ROOT = Path(__file__).parents[1]
# Registration, attribution, selection, the constraint, and one run through `axolotl train` and the
# merge for each of dense, low-rank, fp32 and NF4.
TESTS = (
    "tests/host/test_plugin.py",
    "tests/host/test_registering.py",
    "tests/host/test_axolotl.py::test_trains_saves_and_merges",
    "tests/analysing/attribution/test_attribute.py",
    "tests/analysing/attribution/test_quantised.py",
    "tests/selecting/test_selecting.py",
    "tests/implanting/test_implant.py",
    "tests/implanting/test_selected.py",
    "tests/implanting/test_merge.py",
    "tests/model/test_fingerprint.py",
    "tests/test_rows.py",
    "tests/test_short_name.py::test_the_installed_package_resolves_the_short_name",
)
# What runs where there is no Axolotl, in any trainer: a line for each stage.
STAGES = {
    "analysing": ("tests/analysing",),
    "selecting": ("tests/selecting", "tests/model", "tests/test_rows.py"),
    "protecting": (
        "tests/protecting/test_reading.py",
        "tests/protecting/test_soft.py",
        "tests/protecting/test_anchor.py",
    ),
    "implanting": (
        "tests/implanting/test_implant.py",
        "tests/implanting/test_selected.py",
        "tests/implanting/test_merge.py",
        "tests/implanting/test_targets.py",
    ),
    "evaluating": ("tests/evaluating",),
    "in TRL": ("tests/implanting/test_trl.py",),
}
PLUGIN, NONE = "plugin", "none"
TOOLS = ("captum", "h5py", "hatchling", "matplotlib", "pytest")
SHOWN = ("transformers", "peft", "trl", "bitsandbytes", "accelerate")
# What a failure in the table comes from; looked into by hand.
NOTES = Path(__file__).with_name("compatibility_notes.md")


@dataclass(frozen=True)
class Outcome:
    """One row of the table; what was not run has no counts."""

    python: str
    axolotl: str
    torch: str
    with_it: str
    stage: str
    result: str
    failures: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("combinations", nargs="*", metavar="PYTHON:AXOLOTL:TORCH[:MORE]")
    parser.add_argument("--work", type=Path, help="folder for the environments")
    parser.add_argument("--render", action="store_true", help="write the table from the CSV only")
    options = parser.parse_args()
    if not options.render and not (options.combinations and options.work):
        parser.error("give --work DIR and combinations, or --render")
    for combination in options.combinations:
        python, axolotl, torch, *more = combination.split(":")
        pins = [pin.replace("=", "==", 1) for pin in ",".join(more).split(",") if pin]
        folder = options.work / re.sub(r"[:,=/]", "-", combination)
        for outcome in try_out(python, axolotl, torch, pins, folder):
            _keep(outcome)
    _render()


def try_out(
    python: str, axolotl: str, torch: str, pins: Sequence[str], folder: Path
) -> Iterator[Outcome]:
    """Install one combination into `folder` (kept for a second try) and run the tests there."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    number = _output(interpreter, "import platform; print(platform.python_version())")
    host = [*_core(), *pins] if axolotl == NONE else [f"axolotl=={axolotl}"]
    wanted = [*host, f"torch=={torch}", *TOOLS]
    installed = subprocess.run(
        [interpreter, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True
    )
    if installed.returncode:
        why = [line.strip() for line in installed.stderr.splitlines() if "Error:" in line]
        package = re.findall(r"/pip-install-\w+/([\w-]+)_\w+/", installed.stderr)
        reason = re.sub(r"/\S+/", "", why[-1]) if why else "see pip's output"
        failed = f"{package[-1]}: {reason}" if package else reason
        yield Outcome(number, axolotl, torch, "", "", "does not install", failed)
        return
    subprocess.run(
        [interpreter, "-m", "pip", "install", "-q", "--no-deps", "-e", str(ROOT)], check=True
    )
    versions = _output(interpreter, _VERSIONS).splitlines()
    for stage, tests in STAGES.items() if axolotl == NONE else [(PLUGIN, TESTS)]:
        done = subprocess.run(
            [interpreter, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        (folder / f"{stage}.log").write_text(done.stdout + done.stderr)
        found = counted(done.stdout, done.stderr)
        yield Outcome(number, axolotl, versions[0], versions[1], stage, *found)


def counted(said: str, errors: str = "") -> tuple[str, str]:
    """What pytest counted at its end, and the names of the tests that failed."""
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", said, re.MULTILINE)
    counts = re.findall(r"(\d+ (?:passed|failed|error|skipped)\w*)", said.splitlines()[-1])
    if not counts:
        counts, failed = ["tests do not start"], [errors.strip().splitlines()[-1]]
    return ", ".join(counts), " ".join(sorted(set(failed)))


def _core() -> list[str]:
    """What the package itself requires, without its ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(r).name for r in project["dependencies"]]


_VERSIONS = f"""
from importlib.metadata import version
print(version("torch"))
def said(p):
    try:
        return f"{{p}} {{version(p)}}"
    except ImportError:
        return ""
print(", ".join(filter(None, map(said, {SHOWN!r}))))
"""


def _output(interpreter: Path, code: str) -> str:
    done = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _keep(outcome: Outcome) -> None:
    names = ("python", "axolotl", "torch", "stage")
    key = [getattr(outcome, name) for name in names]
    rows = [r for r in _rows() if [r[name] for name in names] != key]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "compatibility.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Outcome)])
        writer.writeheader()
        writer.writerows([*rows, asdict(outcome)])


def _rows() -> list[dict[str, str]]:
    path = RESULTS / "compatibility.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _shown(tests: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(f"`{test.split('::')[0]}`" for test in tests))


def _render() -> None:
    write(
        "compatibility",
        "Each line is an environment made for it. With Axolotl these tests ran: "
        + _shown(TESTS)
        + ". Without it (`none`), by stage: "
        + "; ".join(f"{stage} {_shown(tests)}" for stage, tests in STAGES.items())
        + ". The whole suite runs with the versions above and Axolotl"
        f" {version('axolotl')}. Combinations that are not listed have not been run.",
        "python -m benchmarks.compatibility --work DIR PYTHON:AXOLOTL:TORCH[:MORE]",
        _rows(),
        more=NOTES.read_text(encoding="utf-8").rstrip(),
    )


if __name__ == "__main__":
    main()
