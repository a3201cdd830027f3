"""Does a LoKI adapter mean elsewhere what it means in PEFT? llama.cpp, vLLM, LLaMA-Factory.

    python -m benchmarks.elsewhere --work DIR --llama-cpp CHECKOUT
    python -m benchmarks.elsewhere --work DIR --vllm PYTHON --llamafactory ANOTHER

CHECKOUT is a folder of llama.cpp's sources (its two converters and gguf-py are read), and
`llama_cpp` (llama-cpp-python) must be importable; PYTHON and ANOTHER are the interpreters of the
environments that hold the tools, which need nothing of this package. Small adapters are trained
with `implant()` and saved; each tool gives the log-probabilities of every token of the vocabulary
at every place of a prompt, and these are compared with those of stock PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sentencepiece
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.writer import command, write
from loki_plugin import implant
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.selected import rows_outside
from loki_plugin.implanting.verify import verify
from loki_plugin.rows import FILE_NAME, RowSelection

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 128, 352, 3, 512
ABOUT = "low-rank: r = 4; protected: 16 random directions; uneven: 12, 0 and 20 rows"
PROMPT = torch.randint(3, VOCABULARY, (48,), generator=torch.Generator().manual_seed(1)).tolist()
# name -> (rows per layer, rank, protected directions per layer)
# Names without commas: LLaMA-Factory would split them.
ADAPTERS: dict[str, tuple[list[int], int | None, int]] = {
    "dense": ([12, 12, 12], None, 0),
    "low-rank": ([12, 12, 12], 4, 0),
    "protected": ([12, 12, 12], None, 16),
    "uneven": ([12, 0, 20], None, 0),
}


def log_probabilities(model) -> torch.Tensor:
    """[T, V] of the prompt."""
    with torch.no_grad():
        return model.eval()(torch.tensor([PROMPT])).logits[0].double().log_softmax(-1)


def prepare(work: Path) -> dict[str, torch.Tensor]:
    """Write base, adapters and merged models; what stock PEFT makes of base and adapters."""
    torch.manual_seed(0)
    base = work / "base"
    make_base().save_pretrained(base)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines() * 20),
        model_prefix=str(base / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    found = {"base": log_probabilities(load(base))}
    for name, (counts, rank, protected) in ADAPTERS.items():
        rows = [torch.randperm(HIDDEN)[:k].sort().values for k in counts]
        protect = [torch.linalg.qr(torch.randn(INTERMEDIATE, protected)).Q for _ in counts]
        model = train(implant(load(base), rows, rank, protect if protected else None))
        model.save_pretrained(work / name)
        rows_file = RowSelection.load(work / name / FILE_NAME)
        merge_adapter(base, work / name, work / f"merged {name}", rows_file, progress=False)
        found[name] = log_probabilities(PeftModel.from_pretrained(load(base), work / name))
    return found


def make_base() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        initializer_range=0.1,  # at 0.02 every token would be as likely as every other
    )
    return LlamaForCausalLM(config)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(model: PeftModel, steps: int = 30) -> PeftModel:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    batch = torch.randint(3, VOCABULARY, (4, 32))
    for _ in range(steps):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def in_llama_cpp(work: Path, checkout: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """What was run -> (the adapter that it stands for, its log-probabilities)."""
    from llama_cpp import GGML_TYPE_F32, Llama

    sys.path.insert(1, str(checkout))

    def convert(script: str, source: Path, target: str, *more: str) -> str:
        # In this process, which has imported all that they need: starting takes most of the time.
        arguments = [script, source, "--outfile", work / target, *more]
        with patch.object(sys, "argv", [str(a) for a in arguments]):
            runpy.run_path(str(checkout / script), run_name="__main__")
        return str(work / target)

    def run(model: str, adapter: str | None = None) -> torch.Tensor:
        # A key-value cache in 16 bits, llama.cpp's default, would be most of the difference.
        llama = Llama(
            model,
            lora_path=adapter,
            n_ctx=64,
            n_threads=1,
            logits_all=True,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            verbose=False,
        )
        llama.eval(PROMPT)
        return torch.from_numpy(llama.scores[: len(PROMPT)].copy()).double().log_softmax(-1)

    def whole(folder: str, dtype: str) -> str:
        target = f"{folder}.{dtype}.gguf"
        return convert("convert_hf_to_gguf.py", work / folder, target, "--outtype", dtype)

    def lora(folder: str) -> str:
        base = ["--base", str(work / "base"), "--outtype", "f32"]
        return convert("convert_lora_to_gguf.py", work / folder, f"{folder}.lora.gguf", *base)

    base = whole("base", "f32")
    found = {"base as GGUF, f32": ("base", run(base))}
    for name in ADAPTERS:
        merged = f"merged {name}"
        found[f"{merged}, f32"] = (name, run(whole(merged, "f32")))
        found[f"{name} as a GGUF LoRA"] = (name, run(base, lora(name)))
    found["base as GGUF, f16"] = ("base", run(whole("base", "f16")))
    found["merged dense, f16"] = ("dense", run(whole("merged dense", "f16")))
    uneven = "uneven"
    alpha_zero(work / uneven, work / f"{uneven}, alpha 0")
    adapter = lora(f"{uneven}, alpha 0")
    found[f"{uneven} as a GGUF LoRA, `lora_alpha` set to 0"] = (uneven, run(base, adapter))
    return found


def alpha_zero(adapter: Path, target: Path) -> None:
    """A copy for llama.cpp's converter, for which alpha 0 means that nothing is scaled."""
    target.mkdir()
    for file in adapter.glob("adapter_*"):
        (target / file.name).write_bytes(file.read_bytes())
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 0}))


ENVIRONMENTS = (
    "The environments of vLLM and LLaMA-Factory hold a CPU build of torch, beside which the"
    " package index's torchvision, torchaudio and torchcodec do not load; they were removed, and"
    " LLaMA-Factory, which imports torchaudio for text too, was given an empty module of that name."
)
# Run by the interpreter of the tool's own environment.
VLLM = """
import json, sys, torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

job = json.load(open(sys.argv[1]))
llm = LLM(job["base"], enable_lora=True, max_lora_rank=32, dtype="float32", enforce_eager=True,
          skip_tokenizer_init=True, max_logprobs=-1, max_model_len=64, max_num_seqs=1)
sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
found = {}
for i, (name, folder) in enumerate(job["adapters"].items()):
    lora = LoRARequest(name, i + 1, folder) if folder else None
    (answer,) = llm.generate([{"prompt_token_ids": job["prompt"]}], sampling, lora_request=lora)
    rows = [[row[t].logprob for t in sorted(row)] for row in answer.prompt_logprobs[1:]]
    found[name] = torch.tensor(rows, dtype=torch.float64)
torch.save(found, job["output"])
"""
LLAMA_FACTORY = """
import json, sys
from llamafactory.train.tuner import export_model, run_exp

for kind, arguments in json.load(open(sys.argv[1])):
    {"export": export_model, "train": run_exp}[kind](arguments)
"""


def run_there(work: Path, python: str, script: str, job: Any, **environment: str) -> None:
    (work / "there.py").write_text(script)
    (work / "job.json").write_text(json.dumps(job))
    lines = [python, str(work / "there.py"), str(work / "job.json")]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(lines, check=True, env=clean | environment)


def in_vllm(work: Path, python: str) -> dict[str, tuple[str, torch.Tensor]]:
    """As `in_llama_cpp`; vLLM gives no distribution behind the last token of a prompt."""
    adapters = {name: str(work / name) for name in ADAPTERS}
    output = work / "vllm.pt"
    job = {"base": str(work / "base"), "adapters": {"base": None} | adapters, "prompt": PROMPT}
    # In one process, so that the script needs no guard against being imported by a second one.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    run_there(work, python, VLLM, job | {"output": str(output)}, **environment)
    found = torch.load(output)
    return {f"{name}{' as an adapter' * (name != 'base')}": (name, found[name]) for name in found}


def in_llama_factory(work: Path, python: str) -> dict[str, tuple[str, torch.Tensor]]:
    """Exported by LLaMA-Factory, loaded by transformers; then one adapter trained on there."""
    common = {
        "model_name_or_path": str(work / "base"),
        "template": "default",
        "finetuning_type": "lora",
        "infer_dtype": "float32",  # or a float32 model is exported in 16 bits
    }
    exports = {name: work / f"exported {name}" for name in ADAPTERS}
    jobs = [
        ["export", common | {"adapter_name_or_path": str(work / name), "export_dir": str(folder)}]
        for name, folder in exports.items()
    ]
    data = work / "data"
    data.mkdir()
    few = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(8)]
    (data / "few.json").write_text(json.dumps(few))
    (data / "dataset_info.json").write_text(json.dumps({"few": {"file_name": "few.json"}}))
    training = {
        "stage": "sft",
        "do_train": True,
        "adapter_name_or_path": str(work / "dense"),
        "dataset": "few",
        "dataset_dir": str(data),
        "cutoff_len": 64,
        "output_dir": str(work / "continued"),
        "max_steps": 3,
        "learning_rate": 0.001,
        "use_cpu": True,
        "report_to": "none",
    }
    run_there(work, python, LLAMA_FACTORY, [*jobs, ["train", common | training]])
    return {
        f"{name}, exported": (name, log_probabilities(load(folder)))
        for name, folder in exports.items()
    }


def verified(work: Path) -> str:
    """That what LLaMA-Factory exported is the base outside the rows, byte by byte."""
    for name in ADAPTERS:
        rows = RowSelection.load(work / name / FILE_NAME)
        report = verify(work / "base", work / f"exported {name}", rows, progress=False)
        if not report.ok:
            raise RuntimeError(f"{name}: {report.text()}")
    return "`loki verify` accepts every model that LLaMA-Factory exported."


def continued(work: Path) -> str:
    """What training on in LLaMA-Factory did to the rows of the dense adapter."""
    rows = RowSelection.load(work / "dense" / FILE_NAME)
    rows.save(work / "continued" / FILE_NAME)
    weights = load_file(work / "continued" / "adapter_model.safetensors")
    keys = sorted(key for key in weights if "lora_B" in key)  # fewer than ten layers
    moved = [rows_outside(weights[k], r) for k, r in zip(keys, rows.rows, strict=True)]
    try:
        merge_adapter(work / "base", work / "continued", work / "refused", rows, progress=False)
    except ValueError as error:
        refused = f"`loki merge` refuses it: {error}"
    else:
        raise RuntimeError("an adapter that changes rows outside its selection was merged")
    return (
        f"LLaMA-Factory trained the dense adapter on for 3 steps: {sum(map(len, moved))} of"
        f" {LAYERS * HIDDEN - sum(rows.counts)} rows outside the selection changed, since lora_B"
        f" trains there. {refused}."
    )


def versions(python: str, *packages: str) -> str:
    code = "import sys; from importlib.metadata import version as v; print(*map(v, sys.argv[1:]))"
    lines = [python, "-c", code, *packages]
    found = subprocess.run(lines, check=True, capture_output=True, text=True).stdout.split()
    return ", ".join(f"{p} {v}" for p, v in zip(packages, found, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--llama-cpp", help="llama.cpp's sources")
    parser.add_argument("--vllm", help="the interpreter of vLLM's environment")
    parser.add_argument("--llamafactory", help="the interpreter of LLaMA-Factory's environment")
    options = parser.parse_args()
    reference = prepare(options.work)
    tools, more = {}, []
    if options.llama_cpp:
        tools["llama.cpp"] = in_llama_cpp(options.work, Path(options.llama_cpp))
        more.append(
            f"llama.cpp: of llama-cpp-python {version('llama-cpp-python')}, whose source"
            " distribution holds the converters too (`vendor/llama.cpp`); key-value cache in f32."
            " The tokenizer is a SentencePiece one made for this, since the converter knows"
            " byte-level ones only by a list of published models; the prompt goes in as ids."
        )
    if options.vllm:
        tools["vLLM"] = in_vllm(options.work, options.vllm)
        packages = ("vllm-cpu", "torch", "transformers")
        more.append(f"vLLM: {versions(options.vllm, *packages)}; on a CPU.")
    if options.llamafactory:
        tools["LLaMA-Factory"] = in_llama_factory(options.work, options.llamafactory)
        packages = ("llamafactory", "torch", "transformers", "peft", "trl")
        more += [f"{versions(options.llamafactory, *packages)}.", verified(options.work)]
        more += [continued(options.work)]
    if options.vllm or options.llamafactory:
        more.append(ENVIRONMENTS)
    rows = []
    for tool, found in tools.items():
        for what, (name, there) in found.items():
            here, base = reference[name][: len(there)], reference["base"][: len(there)]
            rows.append(
                {
                    "tool": tool,
                    "what": what,
                    "largest difference": f"{float((there - here).abs().max()):.2g}",
                    "what the adapter changes": f"{float((here - base).abs().max()):.2g}",
                }
            )
    names = {"PYTHON": options.vllm, "ANOTHER": options.llamafactory}
    path = write(
        "elsewhere",
        f"PEFT {version('peft')}. Llama of {LAYERS} layers, H = {HIDDEN}, I = {INTERMEDIATE},"
        f" float32; adapters of 30 steps on 12 rows per layer ({ABOUT}). Largest absolute"
        f" difference to stock PEFT's log-probabilities, over {len(PROMPT)} places and"
        f" {VOCABULARY} tokens; beside it, how far the adapter moves them from the base's.",
        command("elsewhere", DIR=str(options.work), CHECKOUT=options.llama_cpp, **names),
        rows,
        more="\n\n".join(more),
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
