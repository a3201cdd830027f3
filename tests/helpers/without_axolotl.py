"""What a test may do in an environment that holds the package without Axolotl."""

from __future__ import annotations

import traceback
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOMS = ("host", "plugin.py", "commands")  # of the package; tests/test_layout.py has the same


def asks_for_it(error: ImportError) -> bool:
    """Was it raised because Axolotl is not installed, by what may know Axolotl?

    A stage that imports it is a fault and no reason to skip.
    """
    if find_spec("axolotl") is not None:
        return False
    named = (error.name or "").split(".")[0] == "axolotl"
    if not named and "needs Axolotl, which is not installed" not in str(error):
        return False
    ours = [Path(f.filename) for f in traceback.extract_tb(error.__traceback__)]
    for path in reversed(ours):
        if path.is_relative_to(TESTS):
            return True
        if "loki_plugin" in path.parts:
            inside = path.parts[len(path.parts) - path.parts[::-1].index("loki_plugin") :]
            return inside[0] in (*ROOMS, "__init__.py")
    return False
