"""How often a whole run reads the base's weights to tell whether they changed."""

from __future__ import annotations

import pytest

from loki_plugin.host.proof import Proof
from loki_plugin.host.run import Run
from loki_plugin.model import fingerprint as module

ROWS, INPUTS, LAYERS = 64, 128, 3  # of the base's down-projections


@pytest.mark.slow
def test_a_run_reads_the_weights_once_before_training_and_once_after(
    run_config, train, monkeypatch
):
    told, checksum = [], module._checksum

    def counted(tensor, block):
        if tuple(tensor.shape) == (ROWS, INPUTS):
            told.append("read")
        return checksum(tensor, block)

    def telling(room, name):
        own = getattr(room, name)

        def tell(self, *args):
            told.append(name)
            return own(self, *args)

        monkeypatch.setattr(room, name, tell)

    monkeypatch.setattr(module, "_checksum", counted)
    telling(Run, "prepare_trainer")
    telling(Proof, "_look_at")
    run_config["loki"]["protect"] = {"directions": 5}  # which reads the model too
    train(run_config | {"max_steps": 2})
    once = ["read"] * LAYERS
    assert told == [*once, "prepare_trainer", "_look_at", *once]
