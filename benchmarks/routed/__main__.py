"""Can rows of routed experts train as a standard adapter, and what does it cost?

    python -m benchmarks.routed                           # a few minutes
    python -m benchmarks.routed --peft FOLDER FOLDER      # of `pip install --target`

transformers holds the routed experts of a layer as one parameter, `down_proj` [E, H, I] (gpt-oss:
[E, I, H]); PEFT adapts it by `target_parameters`, A [r E, I] and B [H, r E]. Confined to rows: the
rows of B outside the selection are zero, the same for all experts, or for each its own. A tiny
model of each family's real class is trained so, saved, loaded by stock PEFT, merged by PEFT and
into its checkpoint's bytes, and tried on a base in 4 bits. What a training step takes besides is
measured on a wider model, and computed for published ones.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

from benchmarks.routed.adapting import RANK, ROWS
from benchmarks.routed.cost import costs, published
from benchmarks.routed.trial import Trial, other_peft
from benchmarks.writer import command, table, write

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3")
ABOUT = """Every `yes` is checked: ΔW is zero outside the rows, exactly; loaded and merged models
answer as the trained one to 0.0001 of the largest logit; every byte of the patched checkpoint
outside the rows is the base's. The experts of a 4-bit base are 16 or 32 bits wide unless they are
quantised too, as Axolotl's `quantize_moe_experts` does on CUDA; here bitsandbytes'
`replace_parameter_4bit` did, which that option calls."""
OTHERS = """0.18 takes the sides of [E, H, I] the other way round; 0.19 does not go with this
transformers where a family's checkpoint is converted, whatever the adapter."""
STEP = """PEFT makes ΔW of all experts in each forward pass. In units of n = E·H·I weights of a
layer, the most that lives at once; E = 32, H = I = 512. Predicted: ΔW beside W + ΔW, 2 (4 where B·A
is float32 beside 16 bits), and W + ΔW of L - 1 layers where activations are not checkpointed."""
PUBLISHED = "By these formulas, at quota 10, with a float32 adapter and no autocast."
PROTECTION = """What an expert's down-projection reads is the input of no module: it is made and
used inside the experts' fused forward pass. So nothing that protects inputs sees it, and each
expert reads its own: directions for every expert take the last column's memory where they span a
sixth of I."""
SERVERS = """Servers, read and not run: vLLM takes PEFT's layout for the families that it holds as
three dimensions, for others where it is told so (`--enable-mixed-moe-lora-format`,
`is_3d_lora_weight`: [#42242](https://github.com/vllm-project/vllm/pull/42242)), but stops at an
adapter of the down-projection alone, by an assertion that asks for gate and up
([#48460](https://github.com/vllm-project/vllm/pull/48460), open). SGLang: a loader for this layout
([#25528](https://github.com/sgl-project/sglang/pull/25528)) was closed. llama.cpp's
`convert_lora_to_gguf.py` takes the two matrices for a weight `experts.weight`: its model classes
stack experts that are named one by one, or know `experts.down_proj`. A merged model has the base's
tensors, and is served as the base is."""


def section(title: str, text: str, rows: list[dict]) -> str:
    parts = [f"## {title}" if title else "", " ".join(text.split()), table(rows) if rows else ""]
    return "\n\n".join(part for part in parts if part)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peft", type=Path, nargs="*", default=[], help="folders of other PEFTs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows, works = [], []
        for family in FAMILIES:
            for own in (False, True):
                work = Path(folder) / (f"{family}, own" if own else family)
                rows.append(Trial(family, own, work).run())
                print(rows[-1], flush=True)
                works += [] if own else [work]
        others = [other_peft(one.resolve(), works) for one in options.peft]
    more: list[tuple[str, str, list[dict]]] = [("", ABOUT, [])]
    if others:
        more.append(("Other versions of PEFT load the adapter of shared rows", OTHERS, others))
    more.append(("What a training step takes", STEP, costs()))
    more.append(("The same for published models", PUBLISHED, published()))
    more += [("What stands in the way", PROTECTION, []), ("", SERVERS, [])]
    names = {str(path): f"PEFT{i}" for i, path in enumerate(options.peft)}
    path = write(
        "routed",
        f"PEFT {version('peft')}, bitsandbytes {version('bitsandbytes')}. Tiny models of each"
        f" family's real class, float32, E = 4; r = {RANK} for each expert, {ROWS} rows of 64; 4"
        " steps of AdamW.",
        command("routed", **{name: path for path, name in names.items()}),
        rows,
        more="\n\n".join(section(*each) for each in more),
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
