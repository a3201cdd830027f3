"""The memory formulas against dry runs on fake CUDA tensors, and what fits consumer cards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.fake_cuda import build, dry_run
from helpers.fake_cuda.models import llama

import loki_plugin
from loki_plugin.args import LokiConfig
from loki_plugin.estimating.base import Stored
from loki_plugin.estimating.estimate import CONTEXT, Estimator
from loki_plugin.estimating.planned import Planned
from loki_plugin.model.anatomy import find_anatomy

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the CUDA guard is built with g++")
# L, H, I, key heads, head size, vocabulary.
LLAMA_8B = (32, 4096, 14336, 8, 128, 128256)
GROUPED, MULTI = (3, 1024, 2816, 4, 64, 1000), (3, 1024, 2816, 16, 64, 1000)
WORDY = (2, 1024, 2816, 4, 64, 32000)
FAMILY = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1000, "head_dim": 64,
    "max_position_embeddings": 512,
}  # fmt: skip
ANALYSES = {
    "float32": {"shape": GROUPED, "batch": 4, "length": 150, "dtype": "float32"},
    "nf4": {"shape": GROUPED, "batch": 2, "length": 150, "nf4": True},
    "multi-head": {"shape": MULTI, "batch": 8, "length": 150},
    "multi-head-long": {"shape": MULTI, "batch": 2, "length": 2000, "ragged": True},
    "ragged-shared": {
        "shape": GROUPED, "batch": 4, "length": 150, "ragged": True, "shared": 100,
    },
    "long-shared": {"shape": GROUPED, "batch": 4, "length": 2000, "shared": 1500},
    "deep": {"shape": (8, 512, 1408, 2, 64, 1000), "batch": 4, "length": 150},
    "wide-few-steps": {
        "shape": (2, 512, 8192, 2, 64, 1000), "batch": 4, "length": 20, "steps": 30,
    },
    "wordy": {"shape": WORDY, "batch": 16, "length": 150},
}  # fmt: skip
MIXTURES = {
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 1024,
    },
    "granitemoeshared": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024,
    },
    "gemma3": {},
}  # fmt: skip
TRAININGS = {
    "dense-wordy": {"shape": WORDY, "length": 512, "nf4": True},
    "low-rank": {"shape": GROUPED, "length": 512, "rank": 16, "nf4": True},
    "float32-adapter": {
        "shape": GROUPED, "length": 512, "dtype": "float32", "optimizer": "adamw_torch",
    },
    "protected": {"shape": GROUPED, "length": 512, "protect": {"directions": 64}},
    "all-linears": {"shape": GROUPED, "length": 512, "nf4": True, "targets": "all"},
    "all-linears-protected": {
        "shape": GROUPED, "length": 512, "rank": 16, "targets": "all",
        "protect": {"directions": 256},
    },
    "all-linears-kept": {
        "shape": GROUPED, "length": 512, "targets": "all", "checkpointing": False,
    },
    "all-linears-float32-kept": {
        "shape": GROUPED, "length": 512, "targets": "all", "checkpointing": False,
        "dtype": "float32", "optimizer": "adamw_torch",
    },
    "anchored": {"shape": WORDY, "length": 512, "nf4": True, "anchor": 100},
    "anchored-known": {
        "shape": WORDY, "length": 512, "nf4": True, "anchor": 100, "known": True,
    },
    "anchored-all-rows": {"shape": GROUPED, "length": 512, "quota": 100, "anchor": 50},
    "all-linears-auto": {
        "shape": WORDY, "length": 512, "rank": 16, "targets": "all",
        "protect": {"directions": 256},
        "anchor": 160,
    },
    # 10 MB of directions, in 8 bits.
    "all-linears-small": {
        "shape": GROUPED, "length": 512, "rank": 16, "targets": "all",
        "protect": {"inputs": 0.99, "soft": True, "memory": 0.01},
    },
    # Of low-rank updates A stands still.
    "still-rows": {
        "shape": GROUPED, "length": 512, "rank": 16, "quota": 100, "nf4": True,
        "protect": {"directions": 64, "freeze_a": True},
    },
    "still-rows-kept": {
        "shape": GROUPED, "length": 512, "rank": 16, "quota": 100, "checkpointing": False,
        "protect": {"directions": 64, "freeze_a": True},
    },
    "all-linears-still": {
        "shape": WORDY, "length": 512, "rank": 16, "quota": 100, "targets": "all", "anchor": 160,
        "protect": {"directions": 256, "freeze_a": True},
    },
    "all-linears-still-float32-kept": {
        "shape": GROUPED, "length": 512, "rank": 16, "targets": "all", "checkpointing": False,
        "dtype": "float32", "optimizer": "adamw_torch",
        "protect": {"directions": 256, "freeze_a": True},
    },
    "dense-and-still": {
        "shape": GROUPED, "length": 512, "targets": "all", "nf4": True,
        "protect": {"directions": 256, "freeze_a": True},
    },
    "all-kept": {"shape": GROUPED, "length": 512, "checkpointing": False},
}  # fmt: skip
CARDS = {
    "analysis-12": {"what": "auto", "shape": LLAMA_8B, "length": 200, "gigabytes": 12},
    "training-24": {"what": "training", "shape": LLAMA_8B, "nf4": True, "length": 2048},
}  # fmt: skip


def _named(what, cases):
    return {(what, name): {"what": what} | case for name, case in cases.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every dry run found; one process runs them all."""
    families = {
        name: {"family": name, "settings": FAMILY | more, "batch": 4, "length": 12}
        for name, more in MIXTURES.items()
    }
    cases = {
        **_named("llama", ANALYSES),
        **_named("family", families),
        **_named("training", TRAININGS),
        **{("card", name): case for name, case in CARDS.items()},
    }
    results = dry_run(build(tmp_path_factory.mktemp("fake_cuda")), "any", *cases.values())
    for key, result in zip(cases, results, strict=True):
        assert "error" not in result, f"{key}: {result['error']}"
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize(
    "case", [*(("llama", n) for n in ANALYSES), *(("family", n) for n in MIXTURES)], ids="-".join
)
def test_a_batch_of_the_analysis_takes_what_the_formula_says(found, case):
    assert found[case]["predicted"] == pytest.approx(found[case]["peak_bytes"], rel=0.1)


@pytest.mark.parametrize("case", TRAININGS)
def test_a_training_step_takes_what_the_formula_says(found, case):
    result, predicted = found["training", case], found["training", case]["predicted"]
    above = max(predicted["activations_bytes"].values())
    assert above == pytest.approx(result["peak_bytes"], rel=0.1)
    # What is resident is no estimate.
    assert predicted["weights_bytes"] == pytest.approx(result["base_bytes"], rel=1e-3)
    assert predicted["adapter_bytes"] == result["adapter_bytes"]
    assert predicted["optimizer_bytes"] == result["state_bytes"]
    # Of directions in 8 bits a sixteenth, rounded down, has 16.
    assert predicted["directions_bytes"] == pytest.approx(result["directions_bytes"], rel=2e-3)


@pytest.mark.parametrize("case", TRAININGS)
def test_operations_of_a_training_step_are_those_that_run(found, case):
    result = found["training", case]
    assert result["predicted"]["TFLOP"] == pytest.approx(result["TFLOP"], rel=0.1)


def test_our_modules_never_wait_in_a_training_step(found):
    ours = {path.name for path in Path(loki_plugin.__file__).parent.rglob("*.py")}
    for case, settings in TRAININGS.items():
        waits = found["training", case]["waits"]
        files = {w.split(" at ")[1].split(":")[0] for w in waits} & ours
        # The anchor hands the device its texts, and what the base said of them. In its first step
        # it asks once whether the model looks ahead.
        may = {"anchor.py", "causal.py"} if "anchor" in settings else set()
        assert files <= may, (case, waits)


def test_auto_keeps_the_analysis_of_an_8b_model_in_4_bits_within_12_gb(found):
    result = found["card", "analysis-12"]
    assert result["batch"] >= 4
    assert result["resident_bytes"] + result["peak_bytes"] < 12e9


def test_an_8b_model_in_4_bits_trains_within_24_gb(found):
    """Quota 10, 2,048 tokens, a bf16 adapter, 8-bit optimizer states, gradient checkpoints."""
    result = found["card", "training-24"]
    held = sum(result[k] for k in ("base_bytes", "adapter_bytes", "state_bytes"))
    assert held + result["peak_bytes"] < 24e9
    assert result["predicted"]["bytes"] == pytest.approx(held + result["peak_bytes"], rel=0.1)


@pytest.mark.parametrize("rank", [None, 32])
@pytest.mark.parametrize(("bits", "gigabytes"), [(4, 12), (0, 24)])
def test_an_8b_model_trains_on_the_card_that_its_form_asks_for(rank, bits, gigabytes):
    """By the formula, which the tests above hold to dry runs of both forms."""
    with torch.device("meta"):
        model = llama(*LLAMA_8B)
    counts, config = [409] * 32, LokiConfig(quota=10, rank=rank, protect="off")
    estimator = Estimator(model, find_anatomy(model), config, counts, [200], analysed=False)
    stored, optimizer = Stored(torch.bfloat16, bits), "adamw_bnb_8bit"
    run = Planned(stored, 1, 2048, 1, True, optimizer, torch.bfloat16)
    assert estimator.training(run)["bytes"] + CONTEXT < 1e9 * gigabytes
