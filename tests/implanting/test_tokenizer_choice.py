"""Several adapters, one merged model: whose tokenizer, template and end of a text it gets."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers.tokenizers import CHATML, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting.adapters import Adapter
from loki_plugin.implanting.merge import merge_adapters

ROWS = {"one": [[1, 9], [2]], "two": [[4], [5, 30]], "three": [[7], [8]]}
END = "<|im_end|>"
DIALOGUE = [{"role": "user", "content": "the number"}]


@pytest.fixture
def base(tmp_path):
    """A base without a chat template, whose texts end with </s>."""
    tokenizer = make_tokenizer(tmp_path / "base", chat_template=None)
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base, name, change=None):
    """An adapter on rows of its own, beside a tokenizer that its run changed; None: unchanged."""
    folder = base.parent / name
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = implant(model, RowSelection(ROWS[name], 32))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if change:
        change(tokenizer)
    tokenizer.save_pretrained(folder)
    return Adapter.load(folder)


def chatml(tokenizer):
    tokenizer.eos_token, tokenizer.chat_template = END, CHATML


def template_alone(tokenizer):
    tokenizer.chat_template = CHATML


def other_template(tokenizer):
    tokenizer.eos_token, tokenizer.chat_template = END, "{{ messages[0]['content'] }}"


def other_end(tokenizer):
    tokenizer.eos_token, tokenizer.chat_template = "<|im_start|>", CHATML


def merge(base, *adapters):
    """The bytes of all files that were written, by name, and what was said."""
    out = base.parent / "-".join(["out", *(a.folder.name for a in adapters)])
    report = merge_adapters(base, adapters, out, progress=False)
    files = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    files.pop("loki_rows.json")  # says where it was made
    return out, files, report.companions


def assert_speaks_chatml(base, out):
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == END
    asked = tokenizer.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nthe number<|im_end|>\n<|im_start|>assistant\n"
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.convert_tokens_to_ids(END), 2]  # the other task's texts end too
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == ends[0]


# Of them one has all that any changed; a first adapter without a change had hidden it.
AGREEING = {
    "one changed it": (None, chatml),
    "both changed it, the same way": (chatml, chatml),
    "one changed more of it": (template_alone, chatml),
}


@pytest.mark.parametrize("case", AGREEING)
def test_what_a_run_changed_is_there_in_both_orders(base, case):
    one, two = (
        adapter(base, name, change)
        for name, change in zip(("one", "two"), AGREEING[case], strict=True)
    )
    out, files, told = merge(base, one, two)
    turned, again, told_again = merge(base, two, one)
    assert files.keys() == again.keys() > {"tokenizer_config.json", "generation_config.json"}
    assert [name for name in files if files[name] != again[name]] == []
    assert_speaks_chatml(base, out)
    if case != "both changed it, the same way":
        assert f"that of adapter '{two.folder}'" in told[0] and told == told_again


def test_where_no_run_changed_it_every_byte_is_the_bases(base):
    one, two = adapter(base, "one"), adapter(base, "two")
    shutil.rmtree(merge(base, one, two)[0])
    (one.folder / "tokenizer_config.json").unlink()  # saved without a tokenizer
    (one.folder / "tokenizer.json").unlink()
    for order in ((one, two), (two, one)):
        _, files, told = merge(base, *order)
        assert told == ["tokenizer: every byte is the base's"]
        for file in base.glob("*.json"):
            assert files[file.name] == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (other_template, r"chat_template \(one of its own and one of its own\)\."),
        (other_end, r"eos_token \('<\|im_end\|>' and '<\|im_start\|>'\)\."),
        (
            lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<s>"}),
            r"eos_token \('<\|im_end\|>' and as in the base\), chat_template \(one of its own and"
            r" as in the base\), pad_token \(as in the base and '<s>'\)\.",
        ),
    ],
    ids=["template", "end", "something else"],
)
def test_different_changes_are_refused_and_the_way_out_works(base, change, differs):
    parts = [adapter(base, "one"), adapter(base, "two", chatml), adapter(base, "three", change)]
    with pytest.raises(ValueError, match=rf"two' and '.*three' changed .*: {differs}") as refused:
        merge(base, *parts)
    assert not list(base.parent.glob("*out*"))
    with pytest.raises(ValueError, match=r"three' and '.*two' changed the base's tokenizer"):
        merge(base, *reversed(parts))

    # What the message says is done.
    way = f"take that of '{parts[1].folder}', merge a copy of '{parts[2].folder}' from which"
    marks = ("tokenizer.json", "tokenizer_config.json")
    assert f"{way} {', '.join(marks)} were removed" in str(refused.value)
    copy = shutil.copytree(parts[2].folder, base.parent / "copy")
    for name in marks:
        (copy / name).unlink()
    out, _, told = merge(base, Adapter.load(copy), *parts[:2])
    assert_speaks_chatml(base, out)
    assert told[0].endswith(f"'{parts[1].folder}', the only one that changed the base's")


def test_the_command_refuses_and_leaves_nothing(base):
    parts = [adapter(base, "one", other_end), adapter(base, "two", chatml)]
    config = base.parent / "run.yaml"
    config.write_text(json.dumps({"base_model": str(base), "output_dir": str(base.parent)}))
    words = [w for part in parts for w in ("--adapter", str(part.folder))]
    done = CliRunner().invoke(loki, ["merge", str(config), *words])
    assert done.exit_code == 1 and "in different ways: eos_token" in done.output, done.output
    assert not list(base.parent.glob("*merged*"))


def grow(part, tokens=("<a>", "<b>")):
    """Tokens that an adapter brings with their embeddings, as PEFT saves them."""
    file = part.folder / "adapter_model.safetensors"
    old = load_file(part.folder.parent / "base" / "model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    more = {f"base_model.model.{n}": torch.cat([old[n], torch.ones(2, 32)]) for n in names}
    save_file(load_file(file) | more, file)
    tokenizer = AutoTokenizer.from_pretrained(part.folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(part.folder)


def test_new_tokens_come_with_their_tokenizer_in_both_orders(base):
    parts = [adapter(base, "one"), adapter(base, "two", chatml)]
    grow(parts[1])
    out, files, _ = merge(base, *parts)
    assert files == merge(base, *reversed(parts))[1]
    assert_speaks_chatml(base, out)
    size = len(AutoTokenizer.from_pretrained(base))
    ids = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(["<a>", "<b>"])
    assert ids == [size, size + 1]
    rows = AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight
    assert torch.equal(rows[size:], torch.ones(2, 32))


def test_beside_new_tokens_another_change_does_not_vanish(base):
    """The way out that is named keeps the tokenizer whose tokens have embeddings."""
    parts = [adapter(base, "one", chatml), adapter(base, "two")]
    grow(parts[1])
    for order in (parts, parts[::-1]):
        with pytest.raises(ValueError, match=r"to take that of '.*two', .* a copy of '.*one'"):
            merge(base, *order)


def test_tokens_of_one_adapter_do_not_get_the_embeddings_of_another(base):
    """Their ids would be the same."""
    parts = [adapter(base, "one"), adapter(base, "two")]
    for part in parts:
        grow(part)
    file = parts[0].folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".lora_" in k}, file)
    for order in (parts, parts[::-1]):
        with pytest.raises(ValueError, match="one' has tokens up to id .* were not saved with it"):
            merge(base, *order)


def test_tokenizers_that_cannot_be_read_are_compared_by_their_bytes(base):
    parts = [adapter(base, name) for name in ("one", "two")]
    for part in parts:
        (part.folder / "tokenizer.json").write_text("{}")
    _, files, told = merge(base, *parts)
    assert files == merge(base, *reversed(parts))[1]
    assert files["tokenizer.json"] == b"{}" and "cannot be read" in told[1]
    (parts[0].folder / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="in different ways: its files, which cannot be read"):
        merge_adapters(base, parts, base.parent / "no", progress=False)


def test_another_vocabulary_is_no_smaller_change_than_a_template(base):
    """Its special tokens are all the base's, as with `tokenizer_config:` of the YAML."""
    parts = [adapter(base, "one"), adapter(base, "two", chatml)]
    path = parts[0].folder / "tokenizer.json"
    held = json.loads(path.read_text())
    ids = held["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    path.write_text(json.dumps(held))
    for order in (parts, parts[::-1]):
        with pytest.raises(ValueError, match=r"vocabulary \(.*chat_template|chat_template .*voc"):
            merge(base, *order)
