"""The tokenizer beside a merged model: bytes of the base, as releases before 5 wrote them."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers.pages import TEXTS as PAGES
from helpers.wrappers import save_llava
from transformers import AddedToken, AutoProcessor, AutoTokenizer

from loki_plugin.implanting import checkpoint
from loki_plugin.implanting.tokenizer_files import write_tokenizer

STYLES = {
    "llama": ("LlamaTokenizer", ["<unk>", "<s>", "</s>"], {"legacy": True, "unk_token": "<unk>",
              "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}),
    "gemma": ("GemmaTokenizer", ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
              {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>",
               "pad_token": "<pad>"}),
    "qwen": ("Qwen2Tokenizer", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
             {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": None,
              "unk_token": None, "errors": "replace",
              "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}),
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
TEXTS = ["say the number", " and  the answer, please\n<s>", "<|im_start|>user\nwhat?<|im_end|>"]


def make_base(folder, style, jinja=False):
    """A base's tokenizer and configurations in the form of transformers 4."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    name, special, more = STYLES[style]
    byte_level = style == "qwen"
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level, fuse_unk=not byte_level))
    bytes_ = pre_tokenizers.ByteLevel.alphabet() if byte_level else list("abcdefghijklmnopqrst▁")
    first = [] if byte_level else [f"<0x{i:02X}>" for i in range(256)]
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*special, *first], initial_alphabet=bytes_
    )
    tokenizer.train_from_iterator(["say the number and the answer, please"] * 4, trainer)
    held = json.loads(tokenizer.to_str())
    held["added_tokens"] = held["added_tokens"][: len(special)]  # the bytes are ordinary ones
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(held, indent=2, ensure_ascii=False))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    listed = {str(i): {"content": t, **flags, "special": True} for i, t in enumerate(special)}
    config = {"tokenizer_class": name, "added_tokens_decoder": listed, **more}
    config |= {"extra_special_tokens": {}, "clean_up_tokenization_spaces": False}
    if jinja:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    named = {k: v for k, v in more.items() if k.endswith("_token") and v}
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2))
    ids = {
        "eos_token_id": special.index(more["eos_token"]),
        "vocab_size": len(held["model"]["vocab"]),
    }
    (folder / "config.json").write_text(json.dumps(ids))
    (folder / "generation_config.json").write_text(json.dumps({**ids, "do_sample": True}))


def run_of(folder, change):
    """What Axolotl saves beside the adapter, with the installed release."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    change(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as Axolotl does
    tokenizer.save_pretrained(folder / "run")
    return AutoTokenizer.from_pretrained(folder / "run")


def write(folder, **more):
    shutil.copytree(folder / "base", folder / "out")
    told = write_tokenizer(folder / "base", folder / "run", folder / "out", **more)
    names = {f.name for f in (folder / "base").iterdir()} | {
        f.name for f in (folder / "out").iterdir()
    }

    def content(where, name):
        return (folder / where / name).read_bytes() if (folder / where / name).exists() else None

    return told, {n for n in names if content("base", n) != content("out", n)}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_table_of_the_guide_is_what_changes(tmp_path):
    """Of a base of the old form and a run of the installed release."""
    rows = re.findall(r"^\| like `(\w+)` \| (.*) \| (.*) \|$", PAGES["docs/guide.md"], re.M)
    assert [style for style, *_ in rows] == list(STYLES)
    for style, *cells in rows:
        for cell, change in zip(cells, (lambda tokenizer: None, chatml), strict=True):
            folder = tmp_path / f"{style}-{change.__name__}"
            folder.mkdir()
            make_base(folder / "base", style)
            run_of(folder, change)
            assert write(folder)[1] == set(re.findall("`(.*?)`", cell)), (style, cell)


@pytest.mark.parametrize("jinja", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_a_run_that_adds_nothing_leaves_every_byte(tmp_path, style, jinja):
    make_base(tmp_path / "base", style, jinja)
    run_of(tmp_path, lambda tokenizer: None)
    assert read(tmp_path / "run" / "tokenizer_config.json")["is_local"]  # which 4 never wrote
    told, changed = write(tmp_path)
    assert changed == set()
    assert told == ["tokenizer: every byte is the base's"]


def chatml(tokenizer):
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|im_end|>", normalized=False)})
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML


@pytest.mark.parametrize("jinja", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_a_chatml_run_changes_its_tokens_its_template_and_where_a_text_ends(tmp_path, style, jinja):
    make_base(tmp_path / "base", style, jinja)
    run = run_of(tmp_path, chatml)
    told, changed = write(tmp_path)
    out, end = tmp_path / "out", run.convert_tokens_to_ids("<|im_end|>")
    new = style != "qwen"  # whose base has these tokens
    configs = {"config.json", "generation_config.json"}
    assert changed == configs | {"tokenizer_config.json", "special_tokens_map.json"} | (
        {"tokenizer.json"} if new else set()
    ) | ({"chat_template.jinja"} if jinja else set())

    merged = AutoTokenizer.from_pretrained(out)
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert merged.get_vocab() == run.get_vocab()
    for text in TEXTS:
        # Saving alone makes the installed release forget `legacy`, and with it the space that the
        # base puts before a text; the merged model keeps it.
        wanted = run if style != "llama" else base
        if "<|im_start|>" in text and style == "llama":
            continue
        assert merged(text).input_ids == wanted(text).input_ids
    dialogue = [{"role": "user", "content": "what?"}]
    assert merged.apply_chat_template(dialogue, tokenize=False) == TEXTS[2] + "\n"
    assert merged.eos_token == "<|im_end|>" and merged.pad_token == base.pad_token
    assert merged.decode([end], skip_special_tokens=True) == ""

    config = read(out / "tokenizer_config.json")
    before = read(tmp_path / "base" / "tokenizer_config.json")
    allowed = {"added_tokens_decoder", "eos_token", "chat_template"}
    assert {k for k in config if config[k] != before.get(k)} <= allowed
    assert ("chat_template" in config) != jinja
    for i, token in before["added_tokens_decoder"].items():
        assert config["added_tokens_decoder"][i] == token
    assert read(out / "special_tokens_map.json")["eos_token"] == "<|im_end|>"
    held, old = read(out / "tokenizer.json"), read(tmp_path / "base" / "tokenizer.json")
    assert {k: v for k, v in held.items() if k != "added_tokens"} == {
        k: v for k, v in old.items() if k != "added_tokens"
    }
    assert held["added_tokens"][: len(old["added_tokens"])] == old["added_tokens"]

    before = read(tmp_path / "base" / "generation_config.json")
    assert read(out / "generation_config.json") == before | {
        "eos_token_id": [end, before["eos_token_id"]]
    }
    assert read(out / "config.json")["eos_token_id"] == end
    assert any(line.startswith(f"config.json: eos_token_id is {end} now") for line in told)
    assert any(f"generation_config.json: eos_token_id is [{end}, " in line for line in told)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, 9), (9, 9), (2, 9), ([2, 3], [9, 2, 3]), ([2, 9], [2, 9])],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_other_ends_of_a_text_stay(file, given, wanted):
    from loki_plugin.implanting.tokenizer_files import _ids

    if (given, file) == (2, "generation_config.json"):
        wanted = [9, 2]
    assert _ids(given, 9, "eos_token_id", file) == wanted
    assert _ids(given, 9, "pad_token_id", file) == 9


def test_reserved_tokens_with_another_text_keep_their_ids(tmp_path):
    """`added_tokens_overrides`."""
    make_base(tmp_path / "base", "gemma")
    run_of(tmp_path, lambda tokenizer: None)
    path = tmp_path / "run" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<mask>"', '"<tool>"'))
    path = tmp_path / "run" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"<mask>"', '"<tool>"'))
    told, changed = write(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= changed
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.convert_ids_to_tokens(4) == "<tool>"
    assert len(merged) == len(AutoTokenizer.from_pretrained(tmp_path / "base"))


def test_listed_special_tokens_are_listed(tmp_path):
    make_base(tmp_path / "base", "qwen")
    listed = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<tool>"]}
    run_of(tmp_path, lambda tokenizer: tokenizer.add_special_tokens(listed))
    write(tmp_path)
    config = read(tmp_path / "out" / "tokenizer_config.json")
    assert config["additional_special_tokens"] == listed["additional_special_tokens"]
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.extra_special_tokens == listed["additional_special_tokens"]


@pytest.mark.parametrize("case", ["another", "none"])
def test_another_tokenizer_comes_whole_and_in_the_old_form(tmp_path, case):
    """`tokenizer_config:` of the YAML, or a base that has none."""
    from helpers.tokenizers import make_tokenizer

    make_base(tmp_path / "base", "llama")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"of the base")
    if case == "none":
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "base" / name).unlink()
    run = make_tokenizer(tmp_path / "run")
    run.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    run.save_pretrained(tmp_path / "run")
    assert read(tmp_path / "run" / "tokenizer_config.json")["tokenizer_class"] == (
        "TokenizersBackend"
    )
    told, _ = write(tmp_path)
    assert told[0].startswith("tokenizer: the files are the run's, for ")
    config = read(tmp_path / "out" / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<tool>"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & config.keys()
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.get_vocab() == run.get_vocab() and merged.eos_token == run.eos_token
    assert merged("say the number").input_ids == run("say the number").input_ids
    assert read(tmp_path / "out" / "config.json")["eos_token_id"] == run.eos_token_id


def test_a_tokenizer_that_differs_in_its_vocabulary_alone_is_another_one(tmp_path):
    make_base(tmp_path / "base", "qwen")
    shutil.copytree(tmp_path / "base", tmp_path / "run")
    held = read(tmp_path / "run" / "tokenizer.json")
    words = held["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(held))
    told, _ = write(tmp_path)
    assert told[0].startswith("tokenizer: the files are the run's, for it is another one")
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.convert_tokens_to_ids("a") == words["a"]


def test_an_adapter_without_a_tokenizer_leaves_the_bases(tmp_path):
    make_base(tmp_path / "base", "qwen")
    (tmp_path / "run").mkdir()
    told, changed = write(tmp_path)
    assert told == [] and changed == set()


def test_several_chat_templates_come_along(tmp_path):
    """transformers 5 keeps them in a folder of their own."""
    make_base(tmp_path / "base", "qwen", jinja=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": CHATML}
    tokenizer.save_pretrained(tmp_path / "base")
    named = tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja"
    assert named.is_file()
    run_of(tmp_path, lambda tokenizer: None)
    checkpoint.copy_files(tmp_path / "base", tmp_path / "out", checkpoint.COMPANIONS)
    told = write_tokenizer(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    assert told == ["tokenizer: every byte is the base's"]
    place = named.relative_to(tmp_path / "base")
    assert (tmp_path / "out" / place).read_bytes() == named.read_bytes()
    # What was left behind before is seen, and one that the run changed is the run's.
    (tmp_path / "out" / place).unlink()
    told = write_tokenizer(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    assert told[0].startswith("tokenizer: the files are the run's")
    run = AutoTokenizer.from_pretrained(tmp_path / "run")
    run.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE}
    run.save_pretrained(tmp_path / "run")
    write_tokenizer(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    held = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert held == {"default": TEMPLATE, "tool_use": TEMPLATE}


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_processors_of_images_get_the_run_s_template_too(tmp_path, several):
    """The older form of a processor's template, which it takes before any other."""
    base, run, target = (tmp_path / name for name in ("base", "run", "target"))
    save_llava(base)
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoProcessor.from_pretrained(base).chat_template == template
    tokenizer = AutoTokenizer.from_pretrained(base)
    new = template.replace("<|im_start|>", "[TURN]")
    tokenizer.chat_template = {"default": new, "tools": new + " "} if several else new
    tokenizer.save_pretrained(run)
    shutil.copytree(base, target)
    told = write_tokenizer(base, run, target)
    assert "processor: chat_template.json has changed: chat_template" in told
    found = AutoProcessor.from_pretrained(target).chat_template
    assert (found["default"] if several else found) == new
    same = "processor_config.json"  # which has no template
    assert (target / same).read_bytes() == (base / same).read_bytes()
