"""Models that Axolotl has made ready for packed sequences: ours are whole."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.families import tiny
from helpers.prompts import error, pad, prompts
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from loki_plugin import attribute, input_directions
from loki_plugin.model.quantised import evaluating

KINDS = [
    getattr(modeling_qwen3_5, name)
    for name in ("Qwen3_5DecoderLayer", "Qwen3_5GatedDeltaNet", "Qwen3_5Attention")
] + [
    getattr(modeling_qwen3_next, name)
    for name in ("Qwen3NextDecoderLayer", "Qwen3NextGatedDeltaNet", "Qwen3NextAttention")
]


@pytest.fixture
def packing(monkeypatch):
    """Axolotl's patches of both families, for the test."""
    for name in [n for n in sys.modules if n.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla", None)  # it needs a GPU; a broken one would be imported
    for kind in KINDS:
        monkeypatch.setattr(kind, "forward", kind.forward)  # put back after
    from axolotl.monkeypatch.models.qwen3_5.modeling import patch_qwen3_5_modeling_packing
    from axolotl.monkeypatch.models.qwen3_next.modeling import patch_qwen3_next_modeling_packing

    patch_qwen3_5_modeling_packing()
    patch_qwen3_next_modeling_packing()
    yield
    for name in [n for n in sys.modules if n.startswith("axolotl.monkeypatch.models.qwen3_")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_a_model_patched_for_packing_is_analysed_as_without(family, request, our_log):
    batch = pad(prompts(), "right")
    expected = attribute(tiny(family), *batch)
    directions = input_directions(tiny(family), *batch, directions=2)
    request.getfixturevalue("packing")
    model = tiny(family)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Packed sequences require"):
        model(batch[0])  # so that this test can fail
    assert error(attribute(model, *batch), expected) <= 1e-5
    for found, wanted in zip(
        input_directions(model, *batch, directions=2), directions, strict=True
    ):
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=0, atol=1e-4)
    with torch.no_grad(), evaluating(model):
        model(batch[0])
    assert not [r for r in our_log.records if r.name.startswith("loki_plugin")]
    with torch.no_grad(), pytest.raises(RuntimeError, match="Packed sequences require"):
        model(batch[0])
