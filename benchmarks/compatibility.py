"""Which versions the package runs with: a fresh environment per combination, and a set of tests.

    python -m benchmarks.compatibility --work DIR python3.12:0.19.0:2.11.0 ...

A combination is PYTHON:AXOLOTL:TORCH. Axolotl pins transformers, PEFT, TRL and bitsandbytes itself,
so each combination stands for those too. The package is installed without its own ranges, so that a
combination outside of them can be tried before they are widened. Combinations that were run before
stay in the results; `--render` only writes the table again.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

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
TOOLS = ("captum", "h5py", "hatchling", "matplotlib", "pytest")
SHOWN = ("transformers", "peft", "trl", "bitsandbytes", "accelerate")
# What a failure in the table comes from; looked into by hand.
NOTES = """\
Axolotl 0.18 has no hook for a rejected configuration, so that one comes back rewritten
(`test_a_rejected_configuration_is_left_as_it_was`). The bitsandbytes 0.49 that it pins has no 8-bit
optimizer on a CPU (the two other tests). Axolotl 0.18 and 0.19 pin zstandard 0.22.0, which has no
wheel for Python 3.13."""


@dataclass(frozen=True)
class Outcome:
    """One row of the table; what was not run has no counts."""

    python: str
    axolotl: str
    torch: str
    with_it: str
    result: str
    failures: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("combinations", nargs="*", metavar="PYTHON:AXOLOTL:TORCH")
    parser.add_argument("--work", type=Path, help="folder for the environments")
    parser.add_argument("--render", action="store_true", help="write the table from the CSV only")
    options = parser.parse_args()
    if not options.render and not (options.combinations and options.work):
        parser.error("give --work DIR and combinations, or --render")
    for combination in options.combinations:
        python, axolotl, torch = combination.split(":")
        _keep(try_out(python, axolotl, torch, options.work / combination.replace(":", "-")))
    _render()


def try_out(python: str, axolotl: str, torch: str, folder: Path) -> Outcome:
    """Install one combination into `folder` (kept for a second try) and run the tests there."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    number = _output(interpreter, "import platform; print(platform.python_version())")
    wanted = [f"axolotl=={axolotl}", f"torch=={torch}", *TOOLS]
    installed = subprocess.run(
        [interpreter, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True
    )
    if installed.returncode:
        why = [line.strip() for line in installed.stderr.splitlines() if "Error:" in line]
        package = re.findall(r"/pip-install-\w+/([\w-]+)_\w+/", installed.stderr)
        reason = re.sub(r"/\S+/", "", why[-1]) if why else "see pip's output"
        failed = f"{package[-1]}: {reason}" if package else reason
        return Outcome(number, axolotl, torch, "", "does not install", failed)
    subprocess.run(
        [interpreter, "-m", "pip", "install", "-q", "--no-deps", "-e", str(ROOT)], check=True
    )
    versions = _output(interpreter, _VERSIONS).splitlines()
    done = subprocess.run(
        [interpreter, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    (folder / "tests.log").write_text(done.stdout + done.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.MULTILINE)
    counts = re.findall(r"(\d+ (?:passed|failed|error|skipped)\w*)", done.stdout.splitlines()[-1])
    if not counts:
        counts, failed = ["tests do not start"], [done.stderr.strip().splitlines()[-1]]
    return Outcome(
        number, axolotl, versions[0], versions[1], ", ".join(counts), " ".join(sorted(set(failed)))
    )


_VERSIONS = f"""
from importlib.metadata import version
print(version("torch"))
print(", ".join(f"{{p}} {{version(p)}}" for p in {SHOWN!r}))
"""


def _output(interpreter: Path, code: str) -> str:
    done = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _keep(outcome: Outcome) -> None:
    key = (outcome.python, outcome.axolotl, outcome.torch)
    rows = [r for r in _rows() if (r["python"], r["axolotl"], r["torch"]) != key]
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


def _render() -> None:
    write(
        "compatibility",
        "Each line is an environment made for it, in which these tests ran: "
        + ", ".join(f"`{test.split('::')[0]}`" for test in TESTS)
        + ". The whole suite runs with the versions above and Axolotl"
        f" {version('axolotl')}. Combinations that are not listed have not been run.",
        "python -m benchmarks.compatibility --work DIR PYTHON:AXOLOTL:TORCH",
        _rows(),
        more=NOTES,
    )


if __name__ == "__main__":
    main()
