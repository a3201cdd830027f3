"""Do merged models load where transformers is older than the release that trained them?

    python -m venv OLD && OLD/bin/pip install torch "transformers==4.57.*" sentencepiece protobuf
    python -m benchmarks.older --work DIR --python OLD/bin/python

The older release makes four small bases, with tokenizers as Llama 2, Llama 3, Gemma and Qwen2 have
them. On each, `axolotl train` runs twice: with nothing added, and with ChatML tokens and template.
`loki merge` writes the models, and both releases load them, encode texts and answer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.writer import command, write

ROOT = Path(__file__).parents[1]
STYLES = ("llama", "llama3", "gemma", "qwen")
CHATML = {"chat_template": "chatml", "tokens": ["<|im_start|>", "<|im_end|>"]}
CHATML |= {"special_tokens": {"eos_token": "<|im_end|>"}}
RUNS: dict[str, dict[str, Any]] = {"nothing added": {}, "ChatML": CHATML}
TEXTS = ["say the number", " and  the answer, please\nhello", "def f(self):\n    return 1"]
DIALOGUE = [{"role": "user", "content": "what is it?"}]
# Run by the older release.
MAKE = """
import sys
from pathlib import Path
import sentencepiece, torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig, GemmaForCausalLM, GemmaTokenizerFast, LlamaConfig, LlamaForCausalLM,
    LlamaTokenizerFast, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2TokenizerFast,
)

work = Path(sys.argv[1])
source = Path(transformers.__file__).parent / "utils" / "generic.py"
lines = [line for line in source.read_text().splitlines() if line.strip()]

def pieces(folder, **more):
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=600,
        model_type="bpe", byte_fallback=True, minloglevel=2, **more)
    (folder / "tokenizer.vocab").unlink()
    return str(folder / "tokenizer.model")

def save(folder, tokenizer, template, config, model):
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    sizes = config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=len(tokenizer), initializer_range=0.1,
        max_position_embeddings=512, **ids)
    model(sizes).save_pretrained(folder)

each = "{% for m in messages %}BEFORE{{ m['role'] }}\\n{{ m['content'] }}AFTER{% endfor %}"
folder = work / "llama"
save(folder, LlamaTokenizerFast(vocab_file=pieces(folder)),
     each.replace("BEFORE", "[").replace("AFTER", "</s>"), LlamaConfig, LlamaForCausalLM)
folder, turns = work / "gemma", ["<start_of_turn>", "<end_of_turn>"]
file = pieces(folder, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
              bos_piece="<bos>", unk_piece="<unk>", user_defined_symbols=["<mask>", *turns])
save(folder, GemmaTokenizerFast(vocab_file=file, additional_special_tokens=turns),
     each.replace("BEFORE", turns[0]).replace("AFTER", turns[1] + "\\n"),
     GemmaConfig, GemmaForCausalLM)
folder = work / "qwen"
folder.mkdir()
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
tokenizer.model.save(str(folder))
ends = ["<|begin_of_text|>", "<|eot_id|>"]
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(ends)
save(work / "llama3",
     PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=ends[0], eos_token=ends[1]),
     each.replace("BEFORE", ends[0]).replace("AFTER", ends[1]), LlamaConfig, LlamaForCausalLM)
turns = ["<|im_start|>", "<|im_end|>"]
save(folder, Qwen2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                additional_special_tokens=turns),
     each.replace("BEFORE", turns[0]).replace("AFTER", turns[1] + "\\n"),
     Qwen2Config, Qwen2ForCausalLM)
"""
# Run by both releases.
LOOK = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

job = json.load(open(sys.argv[1]))
found = {"version": transformers.__version__}
for folder in job["folders"]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = [tokenizer(text).input_ids for text in job["texts"]]
        prompt = tokenizer.apply_chat_template(job["dialogue"], tokenize=False)
        ids.append(tokenizer(prompt, add_special_tokens=False).input_ids)
        known = [[i for i in row if i < model.config.vocab_size] for row in ids]
        with torch.no_grad():
            logits = [model(torch.tensor([row])).logits[0, -1].tolist() for row in known]
        end = model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        found[folder] = {"ids": ids, "prompt": prompt, "logits": logits,
                         "stops": tokenizer.eos_token_id in ends}
    except Exception as error:
        found[folder] = {"fault": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
json.dump(found, open(job["output"], "w"))
"""


def run_there(python: str, script: str, *arguments: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clean |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([python, "-c", script, *arguments], check=True, env=clean)


def look(python: str, work: Path, folders: list[Path]) -> dict[str, Any]:
    job = {"folders": [str(f) for f in folders], "texts": TEXTS, "dialogue": DIALOGUE}
    (work / "job.json").write_text(json.dumps(job | {"output": str(work / "found.json")}))
    run_there(python, LOOK, str(work / "job.json"))
    return json.loads((work / "found.json").read_text())


def train_and_merge(work: Path) -> None:
    """`axolotl train` and `loki merge`, in this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.axolotl import short_run, train

    from loki_plugin.implanting.proven import merge_run

    turns = [{"role": r, "content": c} for r, c in (("user", "say it"), ("assistant", "it is 7"))]
    (work / "data.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    asked = [{"prompt": f"the number {i} is"} for i in range(8)]
    (work / "questions.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in asked))
    for style in STYLES:
        for name, more in RUNS.items():
            folder = work / f"{style}, {name}"
            config = short_run(work / style, work / "data.jsonl", work / "questions.jsonl", folder)
            train(config | {"dataset_num_proc": 1} | more)
            merge_run(config, [folder / "out"], folder / "merged")
            copied = folder / "copied"  # as version 0.6.0 of this package did
            shutil.copytree(folder / "merged", copied)
            for file in folder.glob("out/*token*.json"):
                shutil.copy(file, copied)


def compare(here: dict[str, Any], there: dict[str, Any], folder: str) -> str:
    """What the two releases make of one folder."""
    new, old = here[folder], there[folder]
    for release, found in ((here["version"], new), (there["version"], old)):
        if "fault" in found:
            return f"{release} does not load it: {found['fault']}"
    distance = max(
        abs(x - y) for a, b in zip(new["logits"], old["logits"], strict=True)
        for x, y in zip(a, b, strict=False)
    )  # fmt: skip
    same = "the same" if new["ids"] == old["ids"] else "OTHER"
    return f"{same} token ids, logits within {distance:.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--python", required=True, help="the interpreter of the older release")
    options = parser.parse_args()
    work = options.work.resolve()
    run_there(options.python, MAKE, str(work))
    train_and_merge(work)
    bases = [work / style for style in STYLES]
    runs = [work / f"{style}, {name}" for style in STYLES for name in RUNS]
    folders = [*bases, *(run / kind for run in runs for kind in ("merged", "copied"))]
    here, there = (look(python, work, folders) for python in (sys.executable, options.python))
    rows = []
    for run in runs:
        style, merged = run.name.split(", ")[0], str(run / "merged")
        base = work / style
        files = sorted(
            f.name
            for f in base.iterdir()
            if f.suffix != ".safetensors"
            and f.read_bytes() != (run / "merged" / f.name).read_bytes()
        )
        texts = slice(0, len(TEXTS))
        known = there[str(base)]["ids"][texts] == there[merged].get("ids", [])[texts]
        rows.append(
            {
                "base": style,
                "run": run.name.split(", ")[1],
                "files that are not the base's": ", ".join(files) or "none",
                "the base in both": compare(here, there, str(base)),
                "merged in both": compare(here, there, merged),
                "merged, texts as the base's": "yes" if known else "NO",
                "its configuration stops at the tokenizer's end": (
                    "yes" if there[merged].get("stops") else "NO"
                ),
                "with the run's tokenizer files": compare(here, there, str(run / "copied")),
            }
        )
    path = write(
        "older",
        f"Bases made by transformers {there['version']}; trained, merged and loaded by"
        f" {here['version']}, and the merged models loaded by {there['version']} in an environment"
        f" of its own. {len(TEXTS)} texts and a dialogue through the chat template; logits of the"
        " last place, largest difference. Last column: with the tokenizer files that training"
        " saved copied over them, as 0.6.0 did.",
        command("older", DIR=str(options.work), **{"OLD/bin/python": options.python}),
        rows,
        more="The two releases read a Llama 2 tokenizer differently, base and merged model alike;"
        " a merged model with the base's files is read as the base is.",
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
