"""`plugins: [loki]` in every kind of installation, and the real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import wheels

LOAD = (
    "from axolotl.integrations import base; p = base.load_plugin('loki');"
    "print(type(p).__module__, __import__('loki_plugin').__file__)"
)


def python(executable, code, **environment):
    return subprocess.run(
        [str(executable), "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


@pytest.mark.slow
def test_the_installed_package_resolves_the_short_name():
    done = python(sys.executable, LOAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2] == "loki_plugin.plugin"


@pytest.mark.slow
def test_a_wheel_install_resolves_the_short_name(tmp_path):
    wheel = wheels.build(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert "loki_plugin/analysing/calibration/data/builtin.jsonl" in archive.namelist()
    executable = wheels.environment(tmp_path / "venv", wheel, sysconfig.get_path("purelib"))
    done = python(executable, LOAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2] == "loki_plugin.plugin"
    assert str(tmp_path) in done.stdout


def test_it_can_be_switched_off():
    code = "import sys; print(any(type(f).__name__ == '_Finder' for f in sys.meta_path))"
    assert python(sys.executable, code).stdout.strip() == "True"
    assert python(sys.executable, code, LOKI_NO_SHORT_NAME="1").stdout.strip() == "False"


def test_interpreter_start_imports_next_to_nothing():
    code = (
        "import sys; print(sorted(m for m in sys.modules if 'loki' in m or m in ('torch','peft')))"
    )
    assert (
        python(sys.executable, code).stdout.strip() == "['loki_plugin', 'loki_plugin._short_name']"
    )


def test_it_steps_aside_where_axolotl_resolves_short_names_itself():
    from types import SimpleNamespace

    from loki_plugin._short_name import wrap

    module = SimpleNamespace(load_plugin=lambda name: f"axolotl's own {name}")
    wrap(module)
    assert module.load_plugin("loki") == "axolotl's own loki"
    assert module.load_plugin("a.B") == "axolotl's own a.B"
    once = module.load_plugin
    wrap(module)
    assert module.load_plugin is once


def test_one_name_in_place_of_the_list_is_told_apart():
    """Axolotl takes `plugins: loki` for four plugins, and asks for the first."""
    from axolotl.integrations.base import load_plugin

    with pytest.raises(ValueError, match=r"'l' is unknown.* takes a list, as in \[loki\]"):
        load_plugin("l")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["--launcher", "python"]], ids=["default", "python"])
def test_the_real_command(run_config, tmp_path, launcher):
    run_config["max_steps"] = 2
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_config))
    commands = Path(sys.executable).parent  # as in an activated environment
    done = subprocess.run(
        [str(commands / "axolotl"), "train", str(config), *launcher],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = done.stdout + done.stderr
    stages = ["loki: settings", "loki: rows", "loki: training", "loki: verified"]
    places = [said.index(stage) for stage in stages]
    assert places == sorted(places) and f"loki merge {config} " in said
    assert "prompts: KL to the base" in said and " prompts/s" in said
    assert (Path(run_config["output_dir"]) / "loki_report.json").exists()
