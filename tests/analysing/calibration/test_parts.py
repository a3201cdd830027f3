"""Chat templates that look for words in parts of a content, as those of models that see."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from helpers.families import tiny
from helpers.tokenizers import make_tokenizer

from loki_plugin.analysing.calibration.prompts import load_prompts, read_dialogues
from loki_plugin.analysing.calibration.rendering import chat
from loki_plugin.analysing.calibration.sources import load_records
from loki_plugin.host.task import task_texts
from loki_plugin.protecting.own_text import is_told, user_turn

# As SmolVLM and Idefics3 have it: of plain text the first letter is asked for its type.
INDEX = (
    "{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}"
    "{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for part in m['content'] %}{% if part['type'] =="
    " 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# As LLaVA has it.
SELECT = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' }}{% for part in m['content'] |"
    " selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
NOTHING = "{% for m in messages %}{{ m['role'] }}\n{% endfor %}"
PRINTS = "{% for m in messages %}{{ m['content'] if m['content'] is not string }}\n{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path):
    def made(template):
        return make_tokenizer(tmp_path, template)

    return made


@pytest.mark.parametrize("template", [INDEX, SELECT])
def test_all_that_is_made_of_dialogues_has_their_words(tokenizer, template, tmp_path):
    known = tokenizer(template)
    prompts = [known.decode(p.ids) for p in load_prompts(known).prompts]
    assert len(set(prompts)) == len(prompts) > 500
    assert all(p.startswith("User: There is a") and p.endswith("\nAssistant:") for p in prompts)
    turn = user_turn(tiny("llama", vocab_size=len(known)), known)
    assert known.decode(turn.start) == "User: " and turn.behind == "Assistant:"
    said = [("user", "How cold?"), ("assistant", "Very.")]
    file = tmp_path / "said.jsonl"
    messages = [{"role": r, "content": c} for r, c in said]
    assert is_told(known, messages)
    file.write_text(json.dumps({"messages": messages}))
    (text,) = read_dialogues(known, load_records(str(file)))
    assert [known.decode(text.ids[: at + 1]) for at in text.starts] == [
        "User: How cold?\nAssistant:"
    ]
    assert known.decode(text.ids) == "User: How cold?\nAssistant: Very.\n"


@pytest.mark.parametrize("template", [INDEX, SELECT])
def test_the_words_of_the_tasks_rows_are_read(tokenizer, template):
    known = tokenizer(template)
    parts = [{"type": "image"}, {"type": "text", "text": "say seven"}]
    rows = [{"messages": [{"role": "user", "content": parts}], "images": ["x.png"]}]
    rows += [{"prompt": [{"role": "user", "content": "say eight"}]}]
    model = tiny("llama")
    found = task_texts(SimpleNamespace(train_dataset=rows, processing_class=known, model=model))
    said = [known.decode(ids) for ids in found]
    assert said == ["User: say seven\n", "User: say eight\nAssistant:"]


def test_a_template_that_tells_no_words_is_refused_and_told(tokenizer, our_log):
    for template in (NOTHING, PRINTS):
        known = tokenizer(template)
        with pytest.raises(ValueError, match="chat template leaves out the content of message 1"):
            load_prompts(known)
        assert not is_told(known, [{"role": "user", "content": "How cold?"}])
        rows = [{"prompt": [{"role": "user", "content": "say eight"}]}]
        trainer = SimpleNamespace(train_dataset=rows, processing_class=known, model=tiny("llama"))
        our_log.clear()
        assert not task_texts(trainer)
        assert "1 rows of the training set could not be told as text" in our_log.text
        assert "the chat template leaves out what is said" in our_log.text


def test_a_template_that_refuses_plain_words_and_prints_parts_is_refused_for_what_it_says(
    tokenizer,
):
    """What it prints is no text: neither is it read, nor does it hide the reason."""
    wants = (
        "{% if messages[0]['content'] is string %}{{ raise_exception('say it well') }}{% endif %}"
    )
    known = tokenizer(wants + "{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="refuses the dialogue: say it well"):
        chat(known, [("user", "How cold?")], "here")


def test_words_that_look_like_parts_are_words(tokenizer):
    said = [("user", "{'type': 'text', \"type\": \"text\"}")]
    for template in (INDEX, SELECT):
        known = tokenizer(template)
        assert said[0][1] in known.decode(chat(known, said, "here"))
