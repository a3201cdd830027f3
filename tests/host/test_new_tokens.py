"""YAMLs that add tokens: the base that is analysed does not know them yet."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.axolotl import load
from helpers.tokenizers import make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loki_plugin.cli import loki
from loki_plugin.evaluating.forgetting import load_model
from loki_plugin.host.settings import EMBEDDINGS
from loki_plugin.rows import RowSelection

CHATML = {"chat_template": "chatml", "tokens": ["<|im_start|>", "<|im_end|>"]}
CHATML |= {"special_tokens": {"eos_token": "<|im_end|>"}}
PAD = {"special_tokens": {"pad_token": "<|new_pad|>"}}
LISTED = {"special_tokens": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}}
LISTED |= {"chat_template": "chatml"}


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory):
    """A Llama of 3 layers x 64 rows whose tokenizer has no chat tokens and no template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("plain_base")
    tokenizer = make_tokenizer(folder, chat_template=None, special=["<pad>", "<s>", "</s>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("added", [CHATML, PAD, LISTED], ids=["chatml", "pad", "listed"])
def test_new_tokens_train_the_rows_and_nothing_else(
    run_config, train, plain_base, tmp_path, monkeypatch, added
):
    from loki_plugin.plugin import LokiPlugin

    models, log = [], []
    look, handle = LokiPlugin.post_lora_load, logging.getLogger("axolotl").handle

    def post_lora_load(self, cfg, model):
        look(self, cfg, model)
        if self._acts_on(cfg):  # plugins of earlier tests are called too
            models.append((model, model.get_input_embeddings().weight.detach().clone()))

    monkeypatch.setattr(LokiPlugin, "post_lora_load", post_lora_load)
    monkeypatch.setattr(
        logging.getLogger("axolotl"),
        "handle",
        lambda record: (log.append(record.getMessage()), handle(record)),
    )
    run_config |= {"base_model": str(plain_base), "chat_template": "chatml", **added}
    if added is PAD:
        run_config |= {"chat_template": "jinja", "chat_template_jinja": "{{ messages[0].content }}"}
        run_config["chat_template_jinja"] = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        )
    if added is CHATML:  # the directions are those of the base, before it grows
        protect = {"inputs": 0.9, "soft": True, "text": "self", "count": 12}
        run_config["loki"] |= {"protect": protect}
    train(run_config)
    out = Path(run_config["output_dir"])
    old = load_file(plain_base / "model.safetensors")["model.embed_tokens.weight"]
    count = 1 if added is PAD else 2
    ((model, embeddings),) = models
    assert len(embeddings) == len(old) + count
    assert torch.equal(embeddings[: len(old)], old)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 and all(".down_proj.lora_A." in n for n in trainable)
    assert any(f"{count} tokens are new to the base" in line for line in log)
    assert any("base's own tokenizer" in line for line in log) == (added is not PAD)
    saved = load_file(out / "adapter_model.safetensors")
    (stored,) = (t for n, t in saved.items() if n.endswith("embed_tokens.weight"))
    assert torch.equal(stored, embeddings)
    report = json.loads((out / "loki_report.json").read_text())
    assert report["rows_per_layer"] == [6] * 3

    tuned = load_model(str(plain_base), str(out), "cpu", "float32")  # as `loki forgetting` does
    assert torch.equal(tuned.get_input_embeddings().weight, embeddings)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run_config))  # JSON is YAML
    result = CliRunner().invoke(loki, ["merge", str(config)])
    assert result.exit_code == 0, result.output
    assert f"embed_tokens.weight has {count} new rows, of added tokens" in result.output
    assert "OK: nothing outside the selected rows has changed but for the new" in result.output
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert merged.config.vocab_size == len(tokenizer) == len(old) + count
    tokens = ["<|new_pad|>"] if added is PAD else ["<|im_start|>", "<|im_end|>"]
    if added is CHATML:  # the base ends its texts with another token
        end = tokenizer.eos_token_id
        assert tokenizer.eos_token == "<|im_end|>" and merged.config.eos_token_id == end
        assert merged.generation_config.eos_token_id[0] == end
        assert f"generation_config.json: eos_token_id is [{end}, " in result.output
    ids = sorted(tokenizer.convert_tokens_to_ids(tokens))
    assert ids == [len(old) + i for i in range(count)]
    ids = torch.tensor([[5, 6, len(old)]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, atol=1e-4)

    # The rows were chosen before the base grew: they fit the base as it lies there, and going on
    # from the adapter, or from its rows, fits too.
    first = RowSelection.load(out / "loki_rows.json")
    for i, more in enumerate(
        ({"lora_model_dir": str(out)}, {"loki": {"rows": str(out / "loki_rows.json")}})
    ):
        again = str(tmp_path / f"again{i}")
        train(run_config | {"output_dir": again} | more)
        assert RowSelection.load(Path(again) / "loki_rows.json") == first
    assert torch.equal(models[1][1], embeddings)  # those that the adapter brought
    without = {k: v for k, v in run_config.items() if k not in added}
    said = f"trained with {len(embeddings)} embeddings, and this run has {len(old)}"
    with pytest.raises(ValueError, match=said):
        train(without | {"chat_template": "llama3", "lora_model_dir": str(out)})


@pytest.mark.slow
def test_a_run_with_new_tokens_resumes_though_others_are_drawn(run_config, train, plain_base):
    """Embeddings of new tokens are drawn anew in each process; the checkpoint's are the run's."""
    run_config |= {"base_model": str(plain_base), **CHATML, "save_strategy": "steps"}
    run_config |= {"save_steps": 3, "auto_resume_from_checkpoints": True}
    train(run_config)
    out = Path(run_config["output_dir"])
    whole = load_file(out / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-6")
    (out / "adapter_model.safetensors").unlink()
    train(run_config)
    assert json.loads((out / "loki_report.json").read_text())["verified"] is True
    resumed = load_file(out / "adapter_model.safetensors")
    assert {k for k in whole if "embed" in k}
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_embeddings_that_axolotl_wants_listed_do_not_train(run_config, our_log):
    listed = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
    said = "lora_modules_to_save = ['embed_tokens', 'lm_head']: whole modules do not train"
    for more, now in (({"tokens": ["<x>"]}, EMBEDDINGS), ({}, None)):
        our_log.clear()
        assert load(run_config | listed | more).lora_modules_to_save == now
        assert said in our_log.text
    listed["lora_modules_to_save"].append("q_proj")
    load(run_config | listed)
    assert "'lm_head', 'q_proj']: whole modules do not train" in our_log.text
