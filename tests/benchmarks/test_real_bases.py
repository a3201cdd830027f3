"""The benchmark on real bases themselves; skipped where their packages cannot be had."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real import bases, matching, sweep, tasks
from benchmarks.real.data import Data
from benchmarks.real.lab import Lab
from benchmarks.real.scoring import Asked, score

NAME = "smollm2-135m-instruct"


def real(name):
    try:
        return bases.path(name)
    except RuntimeError as error:
        pytest.skip(str(error))


EIFFEL = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is"
    " named after the engineer Gustave Eiffel, whose company designed and built the tower from 1887"
    " to 1889."
)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(bases.SOURCES))
def test_the_bases_are_made_and_read_english(name):
    folder = real(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(EIFFEL)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == EIFFEL
    assert len(ids) < 80  # a token a letter would be a tokenizer without merges
    assert score(model, [Asked(ids, 1)]).loss < 2.5
    if tokenizer.chat_template:
        asked = tasks.dialogue(
            tokenizer,
            [("user", "What is the capital of France?")],
            "The capital of France is Paris.",
        )
        assert score(model, [asked]).whole.item()  # its own words, and then it ends


@pytest.mark.slow
def test_a_base_gets_turns_that_it_was_never_taught(tmp_path, monkeypatch):
    plain = real("gemma-3-270m")
    monkeypatch.setattr(bases, "folder", lambda: tmp_path)
    (tmp_path / "gemma-3-270m").symlink_to(plain)
    folder = real("gemma-3-270m-turns")
    asked = [{"role": "user", "content": "Apples"}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert text == "<bos><start_of_turn>user\nApples<end_of_turn>\n<start_of_turn>model\n"
    assert (folder / "config.json").read_text() == (plain / "config.json").read_text()


@pytest.mark.slow
def test_on_a_real_base_protection_keeps_what_lora_loses(tmp_path):
    """The benchmark in small: the pipeline, and one ordering that is far outside noise."""
    real(NAME)
    data = Data()
    if not data.folder.is_dir():
        pytest.skip(f"no data in '{data.folder}' (python -m benchmarks.real data)")
    lab, file = Lab(NAME, data, "ci"), tmp_path / "real_ci.csv"
    keys = [sweep.Key(NAME, "snips", a, 0, 1e-3, "ci") for a in ("lora_all_r16", "lora_soft")]
    sweep.run_all({NAME: lab}, keys, file, precision="float32", points=(5, 10))
    lora, soft = (
        matching.at(c, "task_loss", 1.7) for c in matching.curves(matching.read(tmp_path)).values()
    )
    assert lora["arm"] == "lora_all_r16" and soft["arm"] == "lora_soft"
    assert 3 * soft["kl_dialogues"] < lora["kl_dialogues"]
    assert 3 * soft["kl_text"] < lora["kl_text"]
