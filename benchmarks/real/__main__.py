"""`python -m benchmarks.real bases`: see README.md beside this file."""

from __future__ import annotations

import argparse

from benchmarks.real import bases


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__)
    parser.add_argument("what", choices=["bases"])
    parser.add_argument("--base", help=f"of: {', '.join(bases.SOURCES)}")
    options = parser.parse_args()
    for name in [options.base] if options.base else bases.SOURCES:
        print(bases.path(name))


if __name__ == "__main__":
    main()
