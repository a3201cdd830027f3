"""A merged model says, and is read as, what trained; and a link is a place like another."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.merging import shaken
from transformers import (
    AutoConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loki_plugin import RowSelection, implant
from loki_plugin.implanting.checkpoint import Base
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.output import check_output, writing_to
from loki_plugin.implanting.verify import verify
from loki_plugin.model.fingerprint import fingerprint

ROWS = [[3, 1], [0, 47]]


@pytest.fixture(scope="module")
def old_form(tmp_path_factory):
    """A Qwen2 whose config.json is of transformers 4: no `rope_parameters`, no `layer_types`."""
    folder = tmp_path_factory.mktemp("base")
    config = Qwen2Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=128, sliding_window=4,
        use_sliding_window=False, max_window_layers=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    del said["rope_parameters"], said["layer_types"]
    said |= {"rope_theta": 10000.0, "sliding_window": 4, "use_sliding_window": False}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"rope_theta": 1000000.0}, "without rope_theta, which changed nothing"),
        ({"use_sliding_window": True}, "has the run's"),
        ({"max_position_embeddings": 256}, "has the run's"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "has the"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_merged_model_computes_what_trained_under_overrides(tmp_path, old_form, overrides, told):
    """Axolotl sets them after reading, where some have no effect, or another one."""
    config = AutoConfig.from_pretrained(old_form)
    for key, value in overrides.items():
        setattr(config, key, value)
    base = Qwen2ForCausalLM.from_pretrained(old_form, config=config)
    selection = RowSelection(ROWS, 48, fingerprint(base))
    tuned = shaken(implant(base, selection), 0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    place = Base(old_form, overrides=overrides)
    report = merge_adapter(place, tmp_path / "adapter", tmp_path / "out", selection, False)
    assert told in report.text()
    assert verify(place, tmp_path / "out", selection, False).ok
    known = RowSelection.load(tmp_path / "out" / "loki_rows.json")
    assert verify(old_form, tmp_path / "out", known, False).ok  # the file tells the overrides
    ids = torch.arange(60)[None]
    with torch.no_grad():
        merged = Qwen2ForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        torch.testing.assert_close(merged, tuned(ids).logits, rtol=1e-4, atol=1e-4)
    # As versions before 0.18.2 wrote it where it is read as another model.
    said = json.loads((old_form / "config.json").read_text()) | overrides
    (tmp_path / "out" / "config.json").write_text(json.dumps(said))
    read = Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        same = torch.allclose(read(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)
    assert verify(place, tmp_path / "out", selection, False).ok == same
    assert same == ("max_position_embeddings" in overrides or "rope_scaling" in overrides)


def test_new_tokens_of_a_base_that_counts_its_tokens_twice(tmp_path):
    """PaliGemma's config.json has `vocab_size` at the top and in that of its text model."""
    text = dict(
        model_type="gemma", hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=12, vocab_size=97,
    )  # fmt: skip
    vision = dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=48,
    )  # fmt: skip
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=48, hidden_size=48, vocab_size=97,
        image_token_index=5,
    )  # fmt: skip
    kind = PaliGemmaForConditionalGeneration
    kind(config).save_pretrained(tmp_path / "base")
    said = json.loads((tmp_path / "base" / "config.json").read_text())
    assert said["vocab_size"] == said["text_config"]["vocab_size"] == 97
    model = kind.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100, mean_resizing=False)
    selection = RowSelection(ROWS, 48)
    tuned = shaken(implant(model, selection), 0.3)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    out = tmp_path / "out"
    merge_adapter(tmp_path / "base", tmp_path / "adapter", out, selection, False)
    assert verify(tmp_path / "base", out, selection, False).ok
    assert len(kind.from_pretrained(out).get_input_embeddings().weight) == 100
    said = json.loads((out / "config.json").read_text())
    said["text_config"]["vocab_size"] = 97  # as it was written before 0.18.2; it does not load
    (out / "config.json").write_text(json.dumps(said))
    assert not verify(tmp_path / "base", out, selection, False).ok


def test_what_is_written_through_a_link_stands_where_the_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    check_output(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), writing_to(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert (tmp_path / "out").is_symlink() and not list((tmp_path / "disk").iterdir())
    with writing_to(tmp_path / "out") as folder:
        (folder / "model").touch()
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "model").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "out"}


def test_the_root_of_a_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_mount", lambda self: True)
    with pytest.raises(ValueError, match="is the root of a disk; give a folder on it"):
        check_output(tmp_path)
