"""Preference training, as `rl:` users write it, through Axolotl."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from helpers.laws import assert_confined, assert_equal, base_tensors
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """The same 16 judgements in the shape that each method reads."""
    folder = tmp_path_factory.mktemp("preferences")
    pairs = [(f"say {i}", f"number {i} it is", f"no, {i} it is not") for i in range(16)]
    records = {
        "pairs": [{"prompt": q, "chosen": y, "rejected": n} for q, y, n in pairs],
        "judged": [
            {"instruction": q, "completion": text, "label": text == y}
            for q, y, n in pairs
            for text in (y, n)
        ],
        "chats": [
            {
                which: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
                for which, a in (("chosen", y), ("rejected", n))
            }
            for q, y, n in pairs
        ],
    }
    for name, lines in records.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


# method -> (file, Axolotl's data set type)
METHODS = {
    "grpo": ("pairs", "rewards.questions"),
    "dpo": ("pairs", "chatml.default"),
    "ipo": ("pairs", "chatml.default"),
    "kto": ("judged", "chatml.argilla"),
    "orpo": ("chats", "chat_template.argilla"),
    "simpo": ("pairs", "chatml.default"),
}
MORE = {
    "kto": {"remove_unused_columns": False},
    "simpo": {"rl_beta": 2.0, "simpo_gamma": 0.5},
    "grpo": {
        "trl": {
            "beta": 0.1,  # with a reference
            "num_generations": 2,
            "max_completion_length": 4,
            "reward_funcs": ["rewards.even_letters"],
        }
    },
}


@pytest.fixture
def prefer(run_config, preferences, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(helpers.__file__).parent / "rewards"))

    def configure(method):
        file, kind = METHODS[method]
        run_config["datasets"] = [
            {
                "path": str(preferences / f"{file}.jsonl"),
                "ds_type": "json",
                "type": kind,
                "split": "train",
            }
        ]
        run_config.update(rl=method, chat_template="chatml", max_steps=3, weight_decay=0.1)
        run_config.update(dataloader_num_workers=0)
        return run_config | MORE.get(method, {})

    return configure


@pytest.fixture
def watched(monkeypatch):
    from loki_plugin.plugin import LokiPlugin

    seen = {}
    for hook in ("post_model_build", "post_trainer_create", "post_train"):
        original = getattr(LokiPlugin, hook)

        def wrapped(self, cfg, what, hook=hook, original=original):
            if hook == "post_model_build":
                seen["before"] = base_tensors(what)
            seen[hook] = what
            return original(self, cfg, what)

        monkeypatch.setattr(LokiPlugin, hook, wrapped)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_only_the_selected_rows_move(method, prefer, train, base, watched):
    config = prefer(method)
    rank = 2 if method in ("ipo", "orpo") else None
    config["loki"]["rank"] = rank
    if method == "dpo":
        config["loki"]["protect"] = {"anchor": 0.1}
    train(config)
    model, out = watched["post_trainer_create"].model, Path(config["output_dir"])
    assert list(model.peft_config) == ["default"]
    assert_equal(watched["before"], base_tensors(model))
    assert_confined(out, rank)
    assert not (out / "model.safetensors").exists()  # Axolotl's save of the base that TRL wrapped
    ids = torch.arange(3, 40, device=model.device)[None]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain.to(model.device)
    with torch.no_grad():
        reference = plain(input_ids=ids).logits
        with model.eval().disable_adapter():  # what TRL asks for the reference
            assert torch.equal(model(input_ids=ids).logits, reference)
        tuned = model(input_ids=ids).logits
        assert not torch.equal(tuned, reference)
        loaded = PeftModel.from_pretrained(plain, out).eval()
        assert torch.allclose(loaded(input_ids=ids).logits, tuned, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_low_rank_updates_read_is_set_from_the_preferences(method, prefer, train, our_log):
    config = prefer(method) | {"max_steps": 1}
    config["loki"] |= {"targets": "all", "rank": 2, "linear_rank": 2, "quota": 100}
    config["loki"]["protect"] = {"inputs": 0.5, "soft": True, "freeze_a": True}
    train(config)
    count = 32 if method == "kto" else 16
    assert "of 21 low-rank updates only lora_B trains; lora_A is set from" in our_log.text
    assert f"lora_A is set from {count} texts of yours" in our_log.text
    report = json.loads((Path(config["output_dir"]) / "loki_report.json").read_text())
    assert report["verified"] is True and len(report["protection"]["still"]) == 21
