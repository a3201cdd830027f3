"""Other plugins beside ours; their patches stay in a process, so these runs have their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.utils.dict import DictDefault
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.plugin import LokiPlugin

build, seen = LokiPlugin.post_model_build, {}

def post_model_build(self, cfg, model):
    seen["names"] = find_anatomy(model).names
    seen["kinds"] = sorted({type(m).__name__ for m in model.modules()})
    seen["forward"] = type(model).forward.__module__
    build(self, cfg, model)

LokiPlugin.post_model_build = post_model_build
if __name__ == "__main__":
    config, found = json.load(open(sys.argv[1])), []
    for plugins in json.loads(sys.argv[2]):
        try:
            do_train(load_cfg(DictDefault(config | {"plugins": plugins})), TrainerCliArgs())
        except (ValueError, ImportError) as error:
            found.append(dict(seen, error=str(error)))
    json.dump(found, open(sys.argv[3], "w"))
"""
LIGER = "axolotl.integrations.liger.LigerPlugin"


def run(config, orders, tmp_path):
    files = [tmp_path / name for name in ("run.py", "config.json", "found.json")]
    files[0].write_text(SCRIPT)
    files[1].write_text(json.dumps(config))
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, files[0], files[1], json.dumps(orders), files[2]],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(files[2].read_text())


def test_liger_is_recognised_in_any_order_and_its_kernels_without_a_gpu_are_named(
    run_config, tmp_path
):
    flags = ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")
    run_config |= {f"liger_{flag}": True for flag in flags}
    found = run(run_config, [["loki", LIGER], [LIGER, "loki"]], tmp_path)
    assert len(found) == 2
    for run_of in found:
        assert run_of["names"] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
        assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= set(run_of["kinds"])
        assert run_of["forward"].startswith("liger_kernel.")
        assert "the model itself does not run on CPU" in run_of["error"]
        assert "`liger_*`" in run_of["error"]
