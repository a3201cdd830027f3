"""What a model writes by itself: it is what the model has learned, and writing leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.runs import model
from helpers.tokenizers import CHATML, make_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from loki_plugin.analysing.calibration.prompts import load_texts
from loki_plugin.analysing.calibration.sources import load_records, record_of
from loki_plugin.args import LokiConfig
from loki_plugin.cli import loki
from loki_plugin.model.fingerprint import fingerprint
from loki_plugin.model.quantised import quantised_modules
from loki_plugin.protecting import asking, own_text, texts
from loki_plugin.protecting.own_text import Marks, Turn, user_turn, write_texts

SAID = [
    ("say the number", "the answer, please, and say the number"),
    ("and the number", "say and say"),
]
DIALOGUES = [[{"role": "user", "content": u}, {"role": "assistant", "content": a}] for u, a in SAID]
TEXTS = ["please say the answer and the number", "the number and the answer"]
ANSWERS = dict(SAID)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A Llama that has learned these dialogues, users' words too, and these texts, and no more."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    ids = [tokenizer.apply_chat_template(d)["input_ids"] for d in DIALOGUES]
    ids += [tokenizer("<s>" + t + "<|im_end|>")["input_ids"] for t in TEXTS]
    optimizer = torch.optim.AdamW(llama.parameters(), 5e-3)
    for _ in range(250):
        loss = sum(llama(input_ids=i, labels=i).loss for i in map(torch.tensor, [[x] for x in ids]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return llama


def test_it_writes_what_it_has_learned_and_both_kinds_of_it(learned, tokenizer):
    written = write_texts(learned, tokenizer, 40, 24)
    dialogues = [row["messages"] for row in written if "messages" in row]
    texts = [row["text"] for row in written if "text" in row]
    # Repeated ones are left out, so that few are left; nearly all are the learned ones.
    assert sum(d in DIALOGUES for d in dialogues) == 2 and len(dialogues) <= 5
    assert set(TEXTS) <= set(texts) and len(texts) <= 5
    assert write_texts(learned, tokenizer, 40, 24, kind="text") != written
    assert all("text" in row for row in write_texts(learned, tokenizer, 9, 24, kind="text"))
    assert all("messages" in r for r in write_texts(learned, tokenizer, 9, 24, kind="dialogues"))


def test_padding_changes_nothing(learned, tokenizer):
    """Prompts of several lengths in one batch are each answered as if they were alone."""
    starts = [
        tokenizer.apply_chat_template(d[:1], add_generation_prompt=True)["input_ids"]
        for d in [[{"role": "user", "content": "say the number and the number"}], *DIALOGUES]
    ]
    stop = Marks.of(learned, tokenizer).ends
    together = own_text._continued(learned, starts, 24, stop, 3, lambda n: None)
    assert len({len(s) for s in starts}) > 1
    assert [own_text._words(tokenizer, t) for t in together[1:3]] == list(ANSWERS.values())
    assert all(ids[-1] in stop and not {*ids[:-1]} & stop for ids in together)


def test_who_learns_from_them_gets_no_dialogues_that_were_cut_off(learned, tokenizer):
    def answers(tokens, **how):
        written = write_texts(learned, tokenizer, 30, tokens, kind="dialogues", **how)
        return {row["messages"][1]["content"] for row in written}

    sizes = {a: max(len(tokenizer(x)["input_ids"]) for x in (u, a)) for u, a in SAID}
    (short, few), (long, many) = sorted(sizes.items(), key=lambda pair: pair[1])
    assert few < many
    assert {short, long} <= answers(many) & answers(many + 1, finished=True)
    found = answers(many, finished=True)  # no room for the token that ends it
    assert short in found and long not in found
    with pytest.raises(ValueError, match="is empty or not finished after 1 tokens"):
        write_texts(learned, tokenizer, 9, 1, kind="dialogues", finished=True)


def test_the_same_seed_writes_the_same_and_nothing_is_left_changed(tokenizer):
    llama = model().train()
    llama.model.layers[0].eval()
    modes = [m.training for m in llama.modules()]
    mark, state = fingerprint(llama), torch.get_rng_state()
    first = write_texts(llama, tokenizer, 8, 6)
    assert (
        first == write_texts(llama, tokenizer, 8, 6) != write_texts(llama, tokenizer, 8, 6, seed=1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in llama.modules()] == modes and fingerprint(llama) == mark
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    for i, row in enumerate(first):  # nothing that is no text
        said = json.dumps(row)
        assert not any(token in said for token in ("<|im_", "<s>", "</s>", "<pad>")), said
        assert load_texts(tokenizer, [record_of(row, f"{i}")])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_writes_and_keeps_every_byte(base, tokenizer, bits):
    from transformers import BitsAndBytesConfig

    how = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=how).eval()
    mark = fingerprint(quantised)
    assert write_texts(quantised, tokenizer, 6, 5)
    states = [getattr(m.weight, "quant_state", None) for m in quantised_modules(quantised)]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    assert fingerprint(quantised) == mark


def test_neither_settings_nor_attention_of_the_model_have_a_say(tokenizer):
    llama = model()
    llama.config._attn_implementation_internal = "eager"
    plain = write_texts(llama, tokenizer, 8, 6)
    own = GenerationConfig(
        min_p=0.9, no_repeat_ngram_size=1, stop_strings=["e"], num_beams=3, max_length=7
    )
    llama.generation_config = own
    seen = []
    hook = llama.register_forward_pre_hook(lambda m, _: seen.append(m.config._attn_implementation))
    assert write_texts(llama, tokenizer, 8, 6) == plain
    hook.remove()
    assert llama.generation_config is own and llama.config._attn_implementation == "eager"
    assert set(seen) == {"sdpa"}


# The template, what stands before a user's words, which marks and letters end them.
TEMPLATES = {
    "chatml": (CHATML, "<|im_start|>user\n", {"<|im_start|>", "<|im_end|>"}, ""),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        "<s>[INST]",
        set(),
        "[/INST]",
    ),
    "system": (
        "<s>You are helpful.\n{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n- {% endif %}",
        "<s>You are helpful.\n[user]",
        set(),
        "### Response:",
    ),
    "thinks": (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{% if add_generation_prompt"
        " %}<|im_end|><think>\n{% if not enable_thinking %}\n</think>{% endif %}{% endif %}",
        "<|im_start|>",
        {"<|im_end|>"},
        "",
    ),
    "small letters": (
        "<s>{% for m in messages %}{{ m.content | lower }}{% endfor %}", "<s>", set(), ""
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "before", "marks", "letters"), TEMPLATES.values(), ids=TEMPLATES
)
def test_what_stands_around_a_users_words(tmp_path, template, before, marks, letters):
    tokenizer = make_tokenizer(tmp_path, template)
    turn = user_turn(model(), tokenizer)
    assert tokenizer.decode(turn.start).rstrip() == before.rstrip()
    assert set(tokenizer.convert_ids_to_tokens(turn.marks)) == marks
    assert turn.behind == letters
    said = tokenizer.apply_chat_template([{"role": "user", "content": "seven"}])["input_ids"]
    assert said[: len(turn.start)] == turn.start


@pytest.mark.parametrize(
    "template",
    [None, "{% for m in messages %}{{ m.content }}{% endfor %}", "<s>always the same"],
    ids=["none", "bare", "same"],
)
def test_a_template_that_begins_no_users_turn(tmp_path, template):
    assert user_turn(model(), make_tokenizer(tmp_path, template)) is None


def test_a_template_with_tokens_new_to_the_model_begins_none(tmp_path, our_log):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_tokens([f"<new{i}>" for i in range(400)] + ["<says>"])
    tokenizer.chat_template = "{% for m in messages %}<s><says>{{ m.content }}{% endfor %}"
    assert user_turn(model(), tokenizer) is None and "new to the model" in our_log.text
    with pytest.raises(ValueError, match="a user's turn: the chat template refuses"):
        tokenizer.chat_template = "{{ raise_exception('a system message first') }}"
        user_turn(model(), tokenizer)


def test_words_end_where_the_template_ends_them(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_tokens(["<says>"])  # no special token
    ids = tokenizer(" say the number [/INST] 7")["input_ids"]
    turn = Turn([1], frozenset(), "[/INST]")
    assert own_text._words(tokenizer, ids, turn) == "say the number"
    assert own_text._passed(tokenizer, ids, turn)
    assert not own_text._passed(tokenizer, ids[:5], turn)
    marked = [*tokenizer("say")["input_ids"], tokenizer.convert_tokens_to_ids("<says>")]
    assert own_text._words(tokenizer, marked, Turn([1], frozenset(marked[-1:]), "")) == "say"


def test_tokenizers_of_mistral_common_write_too(tmp_path):
    """They are what transformers takes for a folder with their vocabulary, and list no tokens."""
    import mistral_common
    from transformers import MistralCommonBackend

    data = Path(mistral_common.__file__).parent / "data"
    (tmp_path / "tekken.json").write_bytes((data / "tekken_240911.json").read_bytes())
    tokenizer = MistralCommonBackend.from_pretrained(tmp_path)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=len(tokenizer.get_vocab()),
        )
    )
    turn = user_turn(llama, tokenizer)
    if turn is not None:
        said = tokenizer.apply_chat_template([{"role": "user", "content": "seven"}])["input_ids"]
        assert said[: len(turn.start)] == turn.start
    assert tokenizer.bos_token_id == Marks.of(llama, tokenizer).beginning
    assert write_texts(llama, tokenizer, 4, 5)


def test_without_a_users_turn_a_base_goes_on_with_a_list_of_what_people_ask(tmp_path, monkeypatch):
    """It answers each in the form that dialogues have without a template: behind a line break."""
    plain, begun = make_tokenizer(tmp_path, None), []
    listed = " say the number\n- the answer\nno mark\n- say the number\n- cut of"
    generate = own_text._generate

    def list_or_generate(model, starts, tokens, stop):
        begun.extend(plain.decode(ids) for ids in starts)
        if "Things that people ask" in begun[-1]:
            return [plain(listed, add_special_tokens=False)["input_ids"]] * len(starts)
        return generate(model, starts, tokens, stop)

    monkeypatch.setattr(own_text, "_generate", list_or_generate)
    written = write_texts(model(), plain, 16, 5)
    lists = [text for text in begun if "Things that people ask" in text]
    assert len(lists) == 2 and all(text.endswith("\n-") for text in lists)  # four lines of each
    assert lists[0] != lists[1]  # other examples
    asked = [row["messages"][0]["content"] for row in written if "messages" in row]
    assert asked == ["say the number", "the answer"]
    assert sum(text.strip().endswith("say the number") for text in begun) == 1
    [first, *_] = load_texts(plain, [record_of(written[0], "here")])
    assert plain.decode(first).startswith("say the number\n")
    with pytest.raises(ValueError, match="no chat template that begins a user's turn"):
        write_texts(model(), plain, 6, 5, kind="dialogues")
    assert all("text" in row for row in write_texts(model(), plain, 6, 5, kind="text"))


def test_turns_that_the_model_does_not_know_are_not_begun_for_it(tokenizer, monkeypatch):
    """What people ask comes from a list; what it answers stands in the template."""
    begun, generate = [], own_text._generate

    def listing(model, starts, tokens, stop):
        begun.extend(tokenizer.decode(ids) for ids in starts)
        if "Things that people ask" in begun[-1]:
            return [tokenizer(" say the number\n- cut", add_special_tokens=False)["input_ids"]]
        return generate(model, starts, tokens, stop)

    monkeypatch.setattr(own_text, "_generate", listing)
    written = write_texts(model(), tokenizer, 4, 5, kind="dialogues", turns=False)
    assert len(begun) == 2 and begun[0].endswith("\n-")
    asked = [{"role": "user", "content": "say the number"}]
    whole = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert begun[1] == whole and written[0]["messages"][0] == asked[0]


def test_thoughts_that_the_template_leaves_out_are_no_answer(tmp_path, monkeypatch):
    """Templates of reasoning models tell of an answer what stands behind its thoughts."""
    said = "{{ m['content'].split('</think>')[-1] }}"
    thinking = make_tokenizer(tmp_path, CHATML.replace("{{ m['content'] }}", said))
    thoughts = thinking("say the number</think>", add_special_tokens=False)["input_ids"]
    answer = thinking("the number", add_special_tokens=False)["input_ids"]
    begun = []

    def half_thoughts(model, starts, tokens, stop):
        begun.extend(starts)
        said = [[*answer, *thinking(f" {len(begun)}{n}")["input_ids"]] for n in range(len(starts))]
        if "assistant" in thinking.decode(starts[0]):
            said[::2] = [thoughts] * len(said[::2])
        return said

    monkeypatch.setattr(own_text, "_generate", half_thoughts)
    written = write_texts(model(), thinking, 12, 5)
    talks = [row for row in written if "messages" in row]
    assert 0 < len(talks) < 6
    assert len(load_texts(thinking, [record_of(row, "here") for row in written])) == len(written)
    # A cache of an earlier version has them.
    bad = {"messages": [{"role": "user", "content": "say"},
                        {"role": "assistant", "content": "so</think>"}]}  # fmt: skip
    monkeypatch.setattr(texts, "_write", lambda *rest: [record_of(r, "x") for r in [bad, *talks]])
    config = LokiConfig(cache_dir=str(tmp_path))
    found = texts.own_texts(model(), thinking, config)
    assert [r.messages for r in found] == [r["messages"] for r in talks]


def test_tokens_new_to_the_model_leave_plain_text_only(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_tokens([f"<new{i}>" for i in range(400)] + ["<says>"])
    tokenizer.chat_template = "{% for m in messages %}<s><says>{{ m.content }}{% endfor %}"
    assert all("text" in row for row in write_texts(model(), tokenizer, 6, 5))


def test_what_was_asked_is_whole_lines_in_turn_of_each_list():
    longest = "x" * 200
    lists = [" a\n- b\n- a\n- cut", f" c\n-no\n- {longest}x\n- {longest}\n", "", "cut", "\n- d\n"]
    assert asking.asked_in(lists, 9) == ["a", "c", "d", "b", longest]
    assert asking.asked_in(lists, 2) == ["a", "c"]
    assert asking.asked_in([f" {asking._EXAMPLES[0]}\n- e\n"], 9) == ["e"]


def test_a_text_begins_behind_the_token_that_ends_one_where_none_begins_one(tmp_path):
    tokenizer, llama = make_tokenizer(tmp_path), model()
    assert Marks.of(llama, tokenizer).beginning == tokenizer.bos_token_id
    tokenizer.bos_token = None
    llama.generation_config.bos_token_id = None
    llama.generation_config.eos_token_id = [7, 8]
    assert Marks.of(llama, tokenizer).beginning == 7
    assert {7, 8} <= Marks.of(llama, tokenizer).ends
    llama.generation_config.eos_token_id = None
    assert Marks.of(llama, tokenizer).beginning == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names a token that begins or ends a text"):
        write_texts(llama, tokenizer, 6, 5)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(tokenizer, monkeypatch, our_log):
    llama, sizes = model(), []
    generate = own_text._generate

    def small(model, starts, tokens, stop):
        sizes.append(len(starts))
        if len(starts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, starts, tokens, stop)

    monkeypatch.setattr(own_text, "_generate", small)
    starts = [[tokenizer.bos_token_id]] * 7
    with our_log.at_level("INFO", "loki_plugin"):
        written = own_text._continued(llama, starts, 4, frozenset(), 64, lambda n: None)
    assert len(written) == 7 and sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "going on with 1 texts at once" in our_log.text
    monkeypatch.setattr(own_text, "_generate", lambda *a: (_ for _ in ()).throw(RuntimeError("x")))
    with pytest.raises(RuntimeError, match="x"):
        own_text._continued(llama, starts, 4, frozenset(), 64, lambda n: None)


def test_a_model_that_writes_nothing_is_told(tokenizer, monkeypatch):
    monkeypatch.setattr(own_text, "_generate", lambda model, starts, *rest: [[]] * len(starts))
    with pytest.raises(ValueError, match="wrote nothing usable: every text is empty; is"):
        write_texts(model(), tokenizer, 6, 5)


def test_the_command_writes_a_file_that_calibration_reads_and_refuses_others(base, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(loki, ["write", str(base), *map(str, arguments)])

    file = tmp_path / "new" / "own.jsonl"
    result = run("--output", file, "--count", 8, "--tokens", 6)
    assert result.exit_code == 0, result.output
    rows = load_records(str(file))
    dialogues = sum(r.messages is not None for r in rows)
    assert f"{dialogues} dialogues and {len(rows) - dialogues} texts in {file}" in result.output
    assert 0 < dialogues < len(rows)
    found = run("--output", file, "--count", 8, "--tokens", 6, "--seed", 1, "--json")
    assert json.loads(found.stdout)["file"] == str(file) and load_records(str(file)) != rows
    for options, message in (
        (["--output", tmp_path / "own.txt"], "own.txt' must be a .jsonl file"),
        (["--output", file, "--kind", "poems"], "is not one of 'both', 'dialogues', 'text'"),
    ):
        result = run(*options)
        assert result.exit_code and message in result.output
