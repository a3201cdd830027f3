"""What an earlier run of the same process left behind in classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.models.llama.modeling_llama import LlamaAttention

from loki_plugin.implanting.proven import merge_run
from loki_plugin.implanting.saved import FAILED_NAME, WEIGHTS


@pytest.fixture
def patched_attention(base):
    """As a plain LoRA run with `lora_qkv_kernel` leaves it: by Axolotl's own function."""
    from axolotl.monkeypatch.lora_kernels import patch_self_attn_lora
    from axolotl.utils.dict import DictDefault

    forward = LlamaAttention.forward
    patch_self_attn_lora(DictDefault({"base_model": str(base), "lora_qkv_kernel": True}))
    assert LlamaAttention.forward is not forward
    yield
    LlamaAttention.forward = forward
    del LlamaAttention._original_forward


@pytest.mark.slow
def test_a_run_trains_after_one_with_fused_attention(
    run_config, train, patched_attention, tmp_path
):
    train(run_config)
    report = json.loads((Path(run_config["output_dir"]) / "loki_report.json").read_text())
    assert report["verified"] is True


@pytest.mark.slow
def test_a_run_that_dies_in_the_folder_of_another_leaves_no_report_that_vouches_for_it(
    run_config, train, monkeypatch, our_log
):
    """Axolotl has written the new run's adapter_config.json beside the other's weights by then."""
    folder = Path(run_config["output_dir"])
    train(run_config)
    weights = (folder / WEIGHTS).read_bytes()
    assert (folder / "loki_report.json").exists() and not (folder / FAILED_NAME).exists()
    with monkeypatch.context() as dies:
        dies.setattr("transformers.Trainer.training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run_config | {"adapter": "lora", "lora_r": 2})
    assert "holds the adapter of an earlier run, which this one overwrites" in our_log.text
    assert (folder / WEIGHTS).read_bytes() == weights
    assert not (folder / "loki_report.json").exists()
    with pytest.raises(ValueError, match="The weights here are those of an earlier run"):
        merge_run(run_config, [folder], folder / "merged")
    train(run_config)
    assert json.loads((folder / "loki_report.json").read_text())["verified"] is True
    assert not (folder / FAILED_NAME).exists()


def test_the_mended_attention_computes_what_it_did(base, request):
    import torch
    from transformers import AutoModelForCausalLM

    from loki_plugin.host.patches import mend_attention

    ids = torch.arange(3, 20)[None]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(ids).logits
        request.getfixturevalue("patched_attention")
        with pytest.raises(AttributeError, match="apply_qkv"):
            model(ids)
        mend_attention(model)
        assert torch.equal(model(ids).logits, wanted)
    state = {k for k, _ in model.named_modules()}
    mend_attention(model)
    assert {k for k, _ in model.named_modules()} == state
