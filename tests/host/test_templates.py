"""The chat template of the calibration and of what the base writes is that of the data."""

from __future__ import annotations

import pytest
from axolotl.utils.chat_templates import get_chat_template
from helpers.axolotl import load
from helpers.families import tiny
from helpers.tokenizers import make_tokenizer
from transformers import LlamaForCausalLM

from loki_plugin.host.files import Files
from loki_plugin.host.tokens import calibration_tokenizer

LETTERS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
OWN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def told(run_config, tmp_path):
    """The template of the calibration's tokenizer, given what each data set and the YAML say."""

    def made(*data, own=None, **top):
        base = tmp_path / "base"
        tokenizer = make_tokenizer(base, own)
        tiny("llama", vocab_size=len(tokenizer)).save_pretrained(base)
        (data_set,) = run_config["datasets"]
        sets = [data_set | more for more in data]
        cfg = load({**run_config, "base_model": str(base), **top, "datasets": sets})
        model = LlamaForCausalLM.from_pretrained(base)
        return calibration_tokenizer(cfg, model, Files.read(cfg)).tokenizer.chat_template

    return made


def test_that_of_the_data_sets_is_taken_also_where_it_stands_nowhere_else(told):
    chatml = get_chat_template("chatml")
    named = {"chat_template": "chatml"}
    assert told(named, chat_template=None) == chatml
    assert told(named, named, own=OWN, chat_template=None) == chatml
    assert told(named, chat_template="alpaca") == chatml
    jinja = {"chat_template": "jinja", "chat_template_jinja": LETTERS}
    assert told(jinja, own=OWN, chat_template=None) == LETTERS


def test_where_they_name_none_it_is_the_yamls_or_the_tokenizers(told, our_log):
    assert told({}, own=OWN, chat_template=None) == OWN
    assert told({"chat_template": "tokenizer_default"}, own=OWN, chat_template=None) == OWN
    assert told({}, own=OWN, chat_template="chatml") == get_chat_template("chatml")
    assert "several chat templates" not in our_log.text


def test_of_several_none_is_taken_and_that_is_told(told, our_log):
    one, other = {"chat_template": "chatml"}, {"chat_template": "alpaca"}
    assert told(one, other, own=OWN, chat_template=None) == OWN
    assert "several chat templates (chatml, alpaca)" in our_log.text
    assert "are told in the tokenizer's own, and that form alone is held" in our_log.text
    our_log.clear()
    assert told(one, {}, own=OWN, chat_template=None) == OWN
    assert "several chat templates (chatml, tokenizer_default)" in our_log.text
