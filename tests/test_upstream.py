"""The patch that we offer to Axolotl applies to its present release, and its own test passes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import axolotl.integrations.base as base

PATCH = Path(__file__).parents[1] / "docs" / "upstream" / "load_plugin.patch"


def test_the_patch_applies_and_its_own_test_passes(tmp_path):
    target = tmp_path / "src" / "axolotl" / "integrations"
    target.mkdir(parents=True)
    shutil.copy(base.__file__, target / "base.py")
    subprocess.run(["git", "apply", str(PATCH)], cwd=tmp_path, check=True)
    # The patched module takes the installed one's place for the patch's own test.
    (tmp_path / "conftest.py").write_text(
        "import importlib.util, sys, axolotl.integrations\n"
        "name = 'axolotl.integrations.base'\n"
        f"spec = importlib.util.spec_from_file_location(name, {str(target / 'base.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules[name] = axolotl.integrations.base = module\n"
        "spec.loader.exec_module(module)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
