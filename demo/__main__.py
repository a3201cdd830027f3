"""`python -m demo`: a model that knows things is taught a job, with LoRA and with LoKI.

On SmolLM2-135M-Instruct, pretrained, in about a quarter of an hour on two cores (`real.py`); with
`--toy` on a small Llama that is trained here, which needs nothing from outside (`toy.py`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import running


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="on a small model that is made here")
    parser.add_argument("--work", type=Path, help="where everything goes (.demo or .demo-toy)")
    parser.add_argument("--fresh", action="store_true", help="make again what an earlier run left")
    parser.add_argument("--results", action="store_true", help="keep the figures for the pages")
    options = parser.parse_args()
    work = (options.work or Path(".demo-toy" if options.toy else ".demo")).resolve()
    running.claim(work)
    running.environment()
    if options.toy:
        from . import toy

        toy.main(work, options.fresh)
    else:
        from . import real

        real.main(work, options.fresh, options.results)


if __name__ == "__main__":
    main()
