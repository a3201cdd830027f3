"""What becomes of rows of routed experts in one family: trained, loaded, merged, in 4 bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import PeftModel
from transformers import AutoConfig, BitsAndBytesConfig

from benchmarks.routed.adapting import (
    AGREE,
    IDS,
    adapt,
    answers,
    by_rows,
    check,
    check_rows,
    confine,
    experts_of,
    load,
    parts_of,
    patch,
    row_dim,
    train,
    wrappers,
)
from benchmarks.standins import shrink
from benchmarks.trial import save_standin
from loki_plugin.implanting.checkpoint import tensors

# NF4 on a CPU needs widths that its block of 64 divides.
WIDTHS = {"intermediate_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 64}
WIDTHS |= {"kv_lora_rank": 64, "qk_rope_head_dim": 64, "qk_head_dim": 80}
OTHER_PEFT = """
import sys, torch, peft, transformers
print("version", peft.__version__)
for folder in sys.argv[1:]:
    base = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    ids, expected = torch.load(f"{folder}/answers.pt")
    try:
        model = peft.PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
        with torch.no_grad():
            found = model(input_ids=ids).logits
        print(folder, float((found - expected).abs().max() / expected.abs().max()), sep="|")
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(folder, f"no: {type(error).__name__}: {lines[-1].rpartition(': ')[2]}", sep="|")
"""


class Trial:
    """One family, one kind of rows: what works, in words, and why not where it does not."""

    def __init__(self, family: str, own: bool, work: Path):
        self.own, self.work, self.base = own, work, work / "base"
        config = shrink(AutoConfig.for_model(family))
        for name, size in WIDTHS.items():
            if getattr(config, name, None):
                setattr(config, name, size)
        if getattr(config, "qk_rope_head_dim", None):
            config.head_dim = config.qk_rope_head_dim
        save_standin(config, self.base)
        model = load(self.base)
        self.names = experts_of(model)
        experts = model.get_submodule(self.names[0].rpartition(".")[0])
        keys = {k for k, _ in parts_of(model, tensors(self.base), self.names)[self.names[0]]}
        self.found = {
            "family": family,
            "rows": "each expert its own" if own else "the same for all",
            "parameter": "[E, I, H]" if row_dim(experts) else "[E, H, I]",
            "on disk": "a tensor per expert" if len(keys) > 1 else "one tensor",
        }

    def run(self) -> dict[str, str]:
        for what, step in (
            ("trains, ΔW in the rows", self.trains),
            ("stock PEFT loads it", self.loads),
            ("`merge_and_unload`", self.merges),
            ("bytes patched, all compared", self.patches),
            ("`load_in_4bit`: trains, loads", lambda: self.quantised(experts=False)),
            ("experts in 4 bits too", lambda: self.quantised(experts=True)),
            ("and merged there", self.merges_quantised),
        ):
            try:
                self.found[what] = step() or "yes"
            except Exception as error:  # whatever it says is the result
                line = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                self.found[what] = f"no: {kind}{line}"
        return self.found

    def trains(self) -> None:
        self.tuned = adapt(load(self.base), self.names)
        self.chosen = confine(self.tuned, self.own)
        train(self.tuned)
        for module, rows in zip(wrappers(self.tuned), self.chosen, strict=True):
            delta = by_rows(module, module.get_delta_weight("default").detach())
            check_rows("ΔW", (delta != 0).any(2), rows)
        self.after = answers(self.tuned)
        self.tuned.save_pretrained(self.work / "adapter")
        torch.save((IDS, self.after), self.work / "answers.pt")  # for `other_peft`

    def loads(self) -> None:
        stock = PeftModel.from_pretrained(load(self.base), self.work / "adapter")
        check("loaded", answers(stock), self.after)

    def merges(self) -> None:
        base = load(self.base)
        merged = PeftModel.from_pretrained(load(self.base), self.work / "adapter")
        merged = merged.merge_and_unload()
        check("merged", answers(merged), self.after)
        rows = dict(zip(self.names, self.chosen, strict=True))
        for name, was in base.named_parameters():
            now = merged.get_parameter(name)
            if name in rows:
                module = base.get_submodule(name.rpartition(".")[0])
                check_rows("merged", by_rows(module, now != was).any(2), rows[name])
            elif not torch.equal(now, was):
                raise ValueError(f"merged: {name} differs")

    def patches(self) -> None:
        patch(self.base, self.work / "patched", self.tuned, self.chosen)
        check("patched", answers(load(self.work / "patched")), self.after)

    def in_4_bit(self, experts: bool) -> Any:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = load(self.base, quantization_config=settings)
        if experts:  # as Axolotl's `quantize_moe_experts` does while it loads, on CUDA only
            for name in self.names:
                module, _, kind = name.rpartition(".")
                replace_parameter_4bit(model.get_submodule(module), kind, quant_type="nf4")
        return model

    def quantised(self, experts: bool) -> str:
        model, folder = self.in_4_bit(experts), self.work / f"experts in 4 bits {experts}"
        module, _, kind = self.names[0].rpartition(".")
        own = dict(model.get_submodule(module).named_parameters())
        held = own[f"parametrizations.{kind}.original" if experts else kind].dtype
        tuned = adapt(model, self.names)
        confine(tuned, self.own)
        train(tuned)
        after = answers(tuned)
        tuned.save_pretrained(folder)
        check("loaded", answers(PeftModel.from_pretrained(self.in_4_bit(experts), folder)), after)
        return f"yes; experts held as {str(held).removeprefix('torch.')}"

    def merges_quantised(self) -> None:
        base = self.in_4_bit(True)
        before = answers(base)
        loaded = PeftModel.from_pretrained(base, self.work / "experts in 4 bits True")
        after, merged = answers(loaded), answers(loaded.merge_and_unload())
        if torch.equal(merged, before):
            raise ValueError("without a word it answers as the base again")
        check("merged", merged, after)


def other_peft(folder: Path, works: list[Path]) -> dict[str, str]:
    """What another PEFT, installed in `folder`, makes of the adapters that trials left."""
    ran = subprocess.run(
        [sys.executable, "-c", OTHER_PEFT, *works],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = {"PEFT": next(s for s in ran.stdout.splitlines() if s.startswith("version"))[8:]}
    for work, said in (s.split("|", 1) for s in ran.stdout.splitlines() if "|" in s):
        if not said.startswith("no"):
            said = "yes" if float(said) < AGREE else f"no: logits differ by {float(said):.2g}"
        found[Path(work).name] = said
    return found
