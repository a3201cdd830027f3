"""Dialogues of every kind that people have: told by the tokenizer's own template, or refused."""

from __future__ import annotations

import json
import logging

import pytest
from helpers.tokenizers import CHATML, make_tokenizer

from loki_plugin.analysing.calibration.prompts import load_prompts, load_texts, read_dialogues
from loki_plugin.analysing.calibration.sources import load_records
from loki_plugin.protecting.asking import lists

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
ASKED = {"role": "user", "content": "Is it cold in Oslo?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "minus seven"}
ANSWER = {"role": "assistant", "content": "Yes, very."}
SAID = [ASKED, CALLS, TOLD, ANSWER]


def text_of(call: dict, **more) -> dict:
    """The call with its arguments as JSON, as OpenAI sends them."""
    function = call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}
    return call | {"function": function} | more


# Every one of them is the dialogue SAID with the tool WEATHER, stored another way.
STORED = {
    "as it is": {"messages": SAID, "tools": [WEATHER]},
    "null content": {"messages": [ASKED, CALLS | {"content": None}, *SAID[2:]], "tools": [WEATHER]},
    "no content": {
        "messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}, *SAID[2:]],
        "tools": [WEATHER],
    },
    "arguments as JSON": {
        "messages": [ASKED, CALLS | {"tool_calls": [text_of(CALL)]}, *SAID[2:]],
        "tools": [WEATHER],
    },
    "messages as JSON": {"messages": json.dumps(SAID), "tools": json.dumps([WEATHER])},
    "tools as list of JSON": {"messages": SAID, "tools": [json.dumps(WEATHER)]},
    "parts": {
        "messages": [
            ASKED | {"content": [{"type": "text", "text": "Is it "}, {"text": "cold in Oslo?"}]},
            *SAID[1:],
        ],
        "tools": [WEATHER],
    },
    "a table's nulls": {
        "messages": [m | {k: None for k in ("tool_calls", "name") if k not in m} for m in SAID],
        "tools": [WEATHER | {"strict": None}],
    },
    "an empty list of calls": {
        "messages": [ASKED, CALLS, TOLD, ANSWER | {"tool_calls": []}],
        "tools": [WEATHER],
    },
    "from and value": {
        "conversations": [
            {"from": "human", "value": ASKED["content"]},
            {"from": "gpt", "value": "", "tool_calls": [CALL]},
            {"from": "tool", "value": TOLD["content"]},
            {"from": "gpt", "value": ANSWER["content"], "weight": 1},
        ],
        "tools": [WEATHER],
    },
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A tokenizer with one of the templates that Axolotl ships, or with a text as template."""
    from axolotl.utils.chat_templates import get_chat_template

    def made(name: str):
        template = name if "{" in name else get_chat_template(name)
        return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), template)

    return made


def write(tmp_path, *rows) -> str:
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def axolotls(tokenizer, record: dict, **dataset) -> list[int]:
    """What Axolotl's own strategy makes of a record."""
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault({"sequence_len": 4096, "train_on_inputs": True})
    strategy = load(tokenizer, cfg, {"chat_template": "tokenizer_default", **dataset})
    return list(strategy.tokenize_prompt(json.loads(json.dumps(record)))["input_ids"])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("template", ["qwen_25", "qwen3"])
def test_a_dialogue_with_calls_is_told_whole_however_it_is_stored(make, tmp_path, template, stored):
    tokenizer = make(template)
    wanted = tokenizer.apply_chat_template(SAID, tools=[WEATHER])["input_ids"]
    record = STORED[stored]
    (window,) = load_texts(tokenizer, load_records(write(tmp_path, record)))[:1]
    text = tokenizer.decode(wanted)
    assert all(words in text for words in ("get_weather", "The weather", "Oslo", "minus seven"))
    assert list(window) == wanted[: len(window)]
    # Of the others Axolotl wants the first mapped, and takes two texts for a batch of letters.
    if stored not in ("from and value", "tools as list of JSON", "messages as JSON"):
        assert axolotls(tokenizer, record)[: len(window)] == list(window)


def test_names_as_axolotls_datasets_spell_them(make, tmp_path):
    tokenizer = make("qwen3")
    said = {"human": ASKED, "bot": CALLS, "observation": TOLD, "gpt": ANSWER}
    record = {
        "turns": [
            {"who": who, "what": m["content"]} | {k: v for k, v in m.items() if k == "tool_calls"}
            for who, m in said.items()
        ],
        "functions": [WEATHER],
        "messages": "of another kind",
    }
    spelled = {
        "field_messages": "turns",
        "message_property_mappings": {"role": "who", "content": "what"},
        "roles": {"user": ["human"], "assistant": ["bot", "gpt"], "tool": ["observation"]},
    }
    source = write(tmp_path, record)
    records = load_records(source, field_tools="functions", **spelled)
    wanted = tokenizer.apply_chat_template(SAID, tools=[WEATHER])["input_ids"]
    assert list(load_texts(tokenizer, records)[0]) == wanted[:512]
    told = record | {"tools": [WEATHER]}
    assert axolotls(tokenizer, told, **spelled) == wanted
    same = load_records(
        source,
        {"messages": "turns", "tools": "functions"},
        **{k: v for k, v in spelled.items() if k != "field_messages"},
    )
    assert same[0].messages == records[0].messages and same[0].tools == records[0].tools
    with pytest.raises(ValueError, match="field_messages is 'turns' and .* says messages: other"):
        load_records(source, {"messages": "other"}, field_messages="turns")
    with pytest.raises(ValueError, match=r"said.jsonl': no record has the columns \['gone'\]"):
        load_records(source, field_tools="gone", **spelled)
    with pytest.raises(ValueError, match="message 3: the role 'observation' is not known; known"):
        load_records(
            source,
            **{k: v for k, v in spelled.items() if k != "roles"}
            | {"roles": {"assistant": ["bot"], "user": ["human"]}},
        )


def test_a_system_message_may_stand_in_a_column_of_its_own(make, tmp_path):
    tokenizer = make("chatml")
    record = {"system": "Be brief.", "messages": [ASKED, ANSWER]}
    (ids,) = load_texts(tokenizer, load_records(write(tmp_path, record)))
    assert "system\nBe brief." in tokenizer.decode(ids)
    assert list(ids) == axolotls(tokenizer, record)
    two = {"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, ASKED]}
    with pytest.raises(ValueError, match="said.jsonl:1: .*two different system messages"):
        load_records(write(tmp_path, two))


def test_calls_at_the_end_are_what_would_be_predicted(make, tmp_path):
    tokenizer = make("qwen_25")
    source = write(tmp_path, {"messages": SAID[:2], "tools": [WEATHER]})
    (prompt,) = load_prompts(tokenizer, source, target="gold").prompts
    asked = tokenizer.apply_chat_template([ASKED], tools=[WEATHER], add_generation_prompt=True)
    assert list(prompt.ids) == asked["input_ids"]
    whole = tokenizer.apply_chat_template(SAID[:2], tools=[WEATHER])["input_ids"]
    assert prompt.target == whole[len(prompt.ids)]


@pytest.mark.parametrize("template", ["deepseek_v3", "exaone4", "jamba", "llama4", "mistral_v2v3"])
def test_calls_are_told_by_templates_that_want_them_otherwise(make, tmp_path, template):
    """DeepSeek's looks for calls where the content is null, and wants arguments as JSON."""
    call = CALL | {"id": "abcdefghi"}
    said = [ASKED, CALLS | {"tool_calls": [call]}, TOLD | {"tool_call_id": "abcdefghi"}, ANSWER]
    tokenizer = make(template)
    (ids,) = load_texts(tokenizer, load_records(write(tmp_path, {"messages": said})))[:1]
    text = tokenizer.decode(ids)
    assert all(words in text for words in ("get_weather", '"city": "Oslo"', "minus seven", "very"))


NULL_ONLY = (  # as DeepSeek's: calls are looked for where the content is null
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is none %}"
    "{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)


def test_a_template_that_looks_for_null_gets_null(make, tmp_path):
    source = write(tmp_path, {"messages": SAID})
    tokenizer = make(NULL_ONLY)
    (ids,) = load_texts(tokenizer, load_records(source))
    assert "get_weather" in tokenizer.decode(ids)


PAIRS_ONLY = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}<|im_start|>"
    "{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
THOUGHT = ANSWER | {"reasoning_content": "It is January."}


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (CHATML, {"messages": SAID}, r"leaves out `tool_calls` of message 2 \(assistant\)"),
        (CHATML, {"messages": [ASKED, ANSWER], "tools": [WEATHER]}, "leaves out `tools`"),
        (
            CHATML,
            {"messages": [ASKED, {"role": "assistant", "function_call": CALL["function"]}]},
            "leaves out `function_call` of message 2",
        ),
        (CHATML, {"messages": [ASKED, THOUGHT]}, "leaves out `reasoning_content` of message 2"),
        (
            PAIRS_ONLY,
            {"messages": [ASKED, TOLD | {"content": "7"}, ANSWER | {"content": "7"}]},
            r"leaves out the content of message 2 \(tool\)",
        ),
        (
            PAIRS_ONLY,
            {"messages": [{"role": "system", "content": "cold"}, ASKED]},
            r"leaves out the content of message 1 \(system\)",
        ),
        (
            "{% for m in messages %}{{ m['content'] + (m['tool_calls'] or '') }}{% endfor %}",
            {"messages": SAID},
            "refuses the dialogue: can only concatenate str",
        ),
        (None, {"messages": SAID}, "`tool_calls` of a dialogue is told by a chat template"),
        (None, {"messages": [ASKED], "tools": [WEATHER]}, "`tools` of a dialogue is told by"),
    ],
)
def test_what_a_template_leaves_out_is_named_and_not_dropped(
    make, tmp_path, template, record, message
):
    tokenizer = make(template or CHATML)
    tokenizer.chat_template = template
    records = load_records(write(tmp_path, {"messages": [ASKED, ANSWER]}, record))
    with pytest.raises(ValueError, match=rf"said.jsonl:2: .*{message}"):
        load_texts(tokenizer, records)


def test_a_thought_that_the_template_drops_from_earlier_turns_is_no_fault(make, tmp_path):
    tokenizer = make("qwen3")
    record = {"messages": [ASKED, THOUGHT, ASKED, THOUGHT]}
    (ids,) = load_texts(tokenizer, load_records(write(tmp_path, record)))
    assert tokenizer.decode(ids).count("January") == 1  # it keeps the last one


def test_what_is_beside_a_dialogue_is_said(make, tmp_path, our_log):
    record = {"id": 7, "messages": [ASKED | {"mood": "cold"}, ANSWER], "prompt": "other"}
    with our_log.at_level(logging.INFO, logger="loki_plugin"):
        records = load_records(write(tmp_path, record))
        load_texts(make("chatml"), records)
    assert "that are not read: id, prompt" in our_log.text
    assert "of messages the chat template does not tell: mood" in our_log.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hello"}, "`messages` is a text and not JSON"),
        ({"messages": []}, r"`messages` must be a list of {'role': .*, got \[\]"),
        ({"messages": '"hello"'}, "`messages` must be a list of .*, got 'hello'"),
        ({"messages": [ASKED, "hi"]}, "message 2: must be {'role': .* or {'from': .*, got 'hi'"),
        ({"messages": [ASKED, {"speaker": "x", "text": "y"}]}, "message 2: must be {'role'"),
        ({"messages": [ASKED, {"role": "bot", "content": "y"}]}, "message 2: the role 'bot' is"),
        ({"messages": [{"role": "user"}]}, "message 1: has neither a `content` nor `tool_calls`"),
        ({"messages": [ASKED, TOLD | {"content": None}]}, "message 2: has neither a `content`"),
        ({"messages": [ASKED, TOLD | {"content": {"t": 1}}]}, "message 2: `content` must be a t"),
        (
            {"messages": [ASKED | {"content": [{"type": "image", "url": "x"}]}]},
            "message 1: a part of `content` is no text, .*got {'type': 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "message 1: a part of `content` is no text",
        ),
        ({"messages": [ASKED], "images": ["a.png"]}, "the dialogue has `images`, and only text"),
        ({"messages": [ASKED], "target": "y"}, "`target` is what follows a `prompt`; of `messag"),
        ({"messages": [ANSWER]}, "`messages` holds nothing that a user says"),
        ({"messages": [ASKED], "tools": "x"}, "`tools` is a text and not JSON"),
        ({"messages": [ASKED], "tools": {"a": 1}}, "`tools` must be a list of functions, got {"),
        ({"messages": [ASKED], "tools": [3]}, "`tools` must be a list of functions, got 3 in it"),
        ({"messages": [ASKED], "system": 3}, "`system` must be a text, got 3"),
        (
            {"messages": [ASKED, CALLS | {"tool_calls": [{"function": {"arguments": {}}}]}]},
            "message 2: a call in `tool_calls` has no `name` of its function",
        ),
        (
            {"messages": [ASKED, CALLS | {"tool_calls": "call it"}]},
            "message 2: `tool_calls` is a text and not JSON",
        ),
        (
            {"messages": [ASKED, CALLS | {"tool_calls": [{"function": "f"}]}]},
            "message 2: a call in `tool_calls` has no `name`",
        ),
        (
            {
                "messages": [
                    ASKED,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}],
                    },
                ]
            },
            "message 2: `arguments` is a text and not JSON",
        ),
        ({"prompt": [ASKED]}, "`prompt` must be a text, .*; a dialogue is called `messages`"),
    ],
)
def test_a_faulty_dialogue_is_named_by_file_and_line(tmp_path, record, message):
    source = write(tmp_path, {"messages": [ASKED, ANSWER]}, record)
    with pytest.raises(ValueError, match=rf"said.jsonl:2: {message}"):
        load_records(source)


@pytest.mark.parametrize("template", ["chatml", "qwen3", "llama3", "gemma"])
def test_where_answers_begin(make, tmp_path, template):
    """Behind what asks for the answer; also where a template asks for one without a thought."""
    tokenizer = make(template)
    words = ("say the number", "seven", "and another", "eight and nine")
    roles = ("user", "assistant") * 2
    said = [{"role": r, "content": c} for r, c in zip(roles, words, strict=True)]
    records = load_records(write(tmp_path, {"messages": said}))
    (text,) = read_dialogues(tokenizer, records)
    assert list(text.ids) == tokenizer.apply_chat_template(said)["input_ids"]
    assert len(text.starts) == 2
    for at, answer in zip(text.starts, words[1::2], strict=True):
        before, behind = tokenizer.decode(text.ids[: at + 1]), tokenizer.decode(text.ids[at + 1 :])
        head, _, rest = behind.partition(answer)
        assert rest and answer not in head and "user" not in head and len(head) < 24
        assert words[words.index(answer) - 1] in before
    (asked,) = read_dialogues(tokenizer, load_records(write(tmp_path, {"messages": said[:1]})))
    assert asked.starts == ()
    (prompt,) = read_dialogues(tokenizer, load_records(write(tmp_path, {"prompt": "say"})))
    assert prompt.starts == (len(prompt.ids) - 1,)
    assert read_dialogues(tokenizer, load_records(write(tmp_path, {"text": "say"})))[0].starts == ()


def test_a_template_that_tells_the_date_gives_the_same_prompts_on_any_day(tmp_path):
    tokenizer = make_tokenizer(tmp_path, "Today is {{ strftime_now('%d %B %Y') }}.\n" + CHATML)
    file = tmp_path / "said.jsonl"
    file.write_text(json.dumps({"messages": [ASKED, ANSWER]}) + "\n")
    [prompt] = load_prompts(tokenizer, str(file)).prompts
    assert tokenizer.decode(prompt.ids).startswith("Today is 01 January 2025.")


def test_a_tokenizer_that_ends_every_text_does_not_end_what_is_to_go_on(tmp_path):
    """Without a chat template; what follows the end of a text says nothing of a question."""
    from tokenizers import processors

    plain = make_tokenizer(tmp_path, None)
    ends = make_tokenizer(tmp_path, None)
    first, last = (("<s>", plain.bos_token_id), ("<|im_end|>", plain.eos_token_id))
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[first, last]
    )
    assert ends("hello")["input_ids"][-1] == plain.eos_token_id
    wanted = load_prompts(plain, "builtin", target="gold").prompts
    found = load_prompts(ends, "builtin", target="gold").prompts
    expected = {(plain.bos_token_id, *p.ids): p.target for p in wanted}
    assert {p.ids: p.target for p in found} == expected and len(found) == len(expected)
    open_lists = lists(ends, 3, 0)
    assert open_lists == [[plain.bos_token_id, *ids] for ids in lists(plain, 3, 0)]
