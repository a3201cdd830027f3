"""What `loki estimate` says of a run."""

from __future__ import annotations

import json

import yaml
from click.testing import CliRunner

from loki_plugin.cli import loki


def asked(run, tmp_path, *options, code=0):
    """The answer of `loki estimate --json` to a run, and its exit code."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run))
    result = CliRunner().invoke(loki, ["estimate", str(config), *options])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if "--json" in options else result.stdout
