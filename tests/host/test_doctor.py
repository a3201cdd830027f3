"""`loki doctor`: every finding says what to do, and what LoKI needs decides the exit code."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
from click.testing import CliRunner
from helpers.families import tiny

from loki_plugin.cli import loki
from loki_plugin.host import doctor


def run(*options):
    return CliRunner().invoke(loki, ["doctor", *options])


def by_name(findings):
    return {f.what: f for f in findings}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the command says here, with a real NF4 round trip and Axolotl's own loader."""
    return run("--json", "--dir", str(tmp_path_factory.mktemp("cache")))


def test_this_machine_has_what_loki_needs(whole):
    said = json.loads(whole.stdout)
    found = {f["what"]: f for f in said["findings"]}
    assert whole.exit_code == 0 and said["ok"], said
    for what in ("python", "torch", "axolotl", "peft", "plugin", "NF4", "cache", "disk"):
        assert found[what]["state"] in ("ok", "note"), found[what]
    assert metadata.version("peft") in found["peft"]["found"]
    assert "bitsandbytes quantises on" in found["NF4"]["found"]


def test_every_note_says_what_to_do(whole):
    findings = json.loads(whole.stdout)["findings"]
    assert all(f["do"] for f in findings if f["state"] != "ok")


@pytest.mark.parametrize(
    "version, said", [("0.1", "0.1, but LoKI was run with"), (None, "is not installed")]
)
def test_a_package_outside_its_range_is_broken(monkeypatch, version, said):
    real = metadata.version

    def changed(name):
        if name != "peft":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", changed)
    found = by_name(doctor.versions())["peft"]
    assert found.state == "broken" and said in found.found
    assert found.do.startswith("pip install 'peft<") and ",>=0." in found.do


def test_a_damaged_bitsandbytes_is_broken_and_ends_with_code_1(monkeypatch, tmp_path):
    import bitsandbytes.functional

    def fails(*_, **__):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fails)
    found = doctor.bitsandbytes()
    assert found.state == "broken" and found.found.endswith("does not quantise: no kernel image")
    monkeypatch.setattr(doctor, "versions", list)
    monkeypatch.setattr(doctor, "plugin", list)
    done = run("--dir", str(tmp_path))
    assert done.exit_code == 1
    assert "BROKEN  NF4" in done.output and "cannot work as it should: NF4" in done.output
    monkeypatch.setattr(doctor, "bitsandbytes", lambda: doctor.Finding("NF4", "ok", "fine"))
    done = run("--dir", str(tmp_path))
    assert done.exit_code == 0 and done.output.endswith("everything that LoKI needs is there\n")


def test_a_cache_that_cannot_be_written_is_broken(tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = doctor.cache(str(tmp_path / "file"))
    assert found.state == "broken" and "LOKI_CACHE_DIR" in found.do
    kept, disk = doctor.cache(str(tmp_path / "new"))
    assert "0 analyses, 0.00 GB of 20 GB" in kept.found and disk.what == "disk"


def test_the_cache_is_that_of_the_run(tmp_path):
    folder, other = tmp_path / "cache", tmp_path / "other"
    given = {"plugins": ["loki"], "base_model": "none", "loki": {"cache_dir": str(folder)}}
    assert str(folder) in by_name(doctor.examine(None, given))["cache"].found
    assert str(other) in by_name(doctor.examine(str(other), given))["cache"].found
    given["loki"]["cache_dir"] = "~nobody-here/cache"
    found = by_name(doctor.examine(None, given))
    assert found["settings"].state == found["cache"].state == "broken"
    assert "names the home of nobody here" in found["cache"].found


@pytest.mark.parametrize(
    ("quota", "stored", "said"),
    [
        (10, "model.safetensors", None),
        (0.1, "model.safetensors", r"no row at all \(k = 0\)"),
        (10, "pytorch_model.bin", "has no model.safetensors"),
    ],
)
def test_what_the_run_would_refuse_of_its_base_is_broken(tmp_path, quota, stored, said):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / stored)
    given = {"plugins": ["loki"], "base_model": str(tmp_path), "adapter": "loki"}
    found = by_name(doctor.examine(None, given | {"loki": {"quota": quota}}))["base_model"]
    assert found.state == ("broken" if said else "ok")
    assert re.search(said or "rows in 3 of 3 layers train, and can be merged", found.found)


def test_the_short_name_may_be_switched_off(monkeypatch):
    from axolotl.integrations import base

    real = base.load_plugin

    def without(name):
        if "." not in name:
            raise ValueError("not enough values to unpack")
        return real(name)

    monkeypatch.setattr(base, "load_plugin", without)
    monkeypatch.setenv("LOKI_NO_SHORT_NAME", "1")
    found = by_name(doctor.plugin())
    assert found["plugin"].state == "ok" and found["short name"].state == "note"
    assert found["short name"].do.startswith("unset LOKI_NO_SHORT_NAME, or write `plugins: [loki_")


def test_flags_of_the_environment():
    assert doctor.offline({}).state == doctor.offline({"HF_HUB_OFFLINE": "0"}).state == "ok"
    found = doctor.offline({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "yes"})
    assert found.state == "note" and found.do.endswith("unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE")
    assert doctor.telemetry({}).do and not doctor.telemetry({"AXOLOTL_DO_NOT_TRACK": "1"}).do
