"""A run that is ended from outside, and one whose disk is full."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.laws import assert_confined
from helpers.room import little_room
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loki_plugin.cli import loki

pytestmark = pytest.mark.slow


def start(config, tmp_path):
    """`axolotl train`, a process of its own that would train for hours."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).parent / "axolotl", "train", file, "--launcher", "python"]
    with (tmp_path / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def wait_for(path, process, tmp_path, seconds=240):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.1)


def assert_sound(folder, base):
    """Stock PEFT loads it, and the proof finds nothing outside the rows."""
    assert_confined(folder, None)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        after = PeftModel.from_pretrained(plain, folder)(input_ids=ids).logits
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    arguments = ["verify", str(base), str(folder), "--rows", str(folder / "loki_rows.json")]
    done = CliRunner().invoke(loki, arguments)
    assert done.exit_code == 0 and "OK: an adapter on" in done.output, done.output


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_ended_run_leaves_a_sound_adapter(name, run_config, base, tmp_path):
    """Axolotl saves on SIGINT (Ctrl-C); SIGTERM leaves the checkpoints."""
    out = Path(run_config["output_dir"])
    out.mkdir()
    (out / "loki_report.json").write_text(json.dumps({"verified": True}, indent=2))
    run_config |= {"max_steps": 100_000, "save_strategy": "steps", "save_steps": 2}
    process = start(run_config, tmp_path)
    try:
        wait_for(out / "checkpoint-6", process, tmp_path)
        process.send_signal(getattr(signal, name))
        code = process.wait(60)
    finally:
        process.kill()
    assert_sound(out / "checkpoint-4", base)
    report = out / "loki_report.json"
    if name == "SIGTERM":
        assert code == -signal.SIGTERM and not (out / "adapter_model.safetensors").exists()
        assert report.exists()  # nothing was overwritten
    else:
        assert code == 0
        assert_sound(out, base)
        assert not report.exists()  # an earlier one, which would vouch for this adapter


def test_a_full_disk_is_said_and_nothing_half_written_is_called_done(
    run_config, train, monkeypatch
):
    save, out = PeftModel.save_pretrained, Path(run_config["output_dir"])

    def without_room(self, *args, **kwargs):
        with little_room(10_000):
            save(self, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", without_room)
    with pytest.raises(OSError, match="could not be saved to .* If that disk is full"):
        train(run_config | {"max_steps": 2})
    report = json.loads((out / "loki_report.json").read_text())
    assert report["verified"] is False and report["verified_what"]["saved"] == "not yet"
    assert not (out / "loki_rows.json").exists()
