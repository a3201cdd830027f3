"""What a training step took on a card (`benchmarks/results/gpu.json`), beside the estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.fake_cuda.models import llama

from loki_plugin.args import LokiConfig
from loki_plugin.estimating.base import Stored
from loki_plugin.estimating.estimate import Estimator
from loki_plugin.estimating.planned import Planned
from loki_plugin.model.anatomy import find_anatomy

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"
# method -> (rows of 4,096, the block)
METHODS = {
    "(a) LoRA r = 16, all linears": (4096, {"quota": 100, "rank": 16, "targets": "all"}),
    "LoKI dense": (409, {"quota": 10}),
    "LoKI* r = 16": (409, {"quota": 10, "rank": 16}),
}


@pytest.mark.parametrize("weights", ["bf16", "NF4"])
@pytest.mark.parametrize("method", METHODS)
def test_an_8b_step_took_what_is_estimated(method, weights):
    rows = json.loads(RESULTS.read_text())["rows"]
    (took,) = (
        r["above the weights (GiB)"]
        for r in rows
        if (r["what"], r["model"]) == (f"training step, {method}", "8B")
        and (r["weights"], r["attention"]) == (weights, "sdpa")
    )
    with torch.device("meta"):
        model = llama(32, 4096, 14336, 8, 128, 128256)
    count, block = METHODS[method]
    config = LokiConfig(**block, protect="off")
    estimator = Estimator(model, find_anatomy(model), config, [count] * 32, [150], analysed=False)
    stored = Stored(torch.bfloat16, 4 if weights == "NF4" else 0)
    run = Planned(stored, 1, 2048, 1, True, "adamw_torch", torch.float32)
    found = estimator.training(run)
    above = (found["bytes"] - found["weights_bytes"]) / 2**30
    assert above == pytest.approx(took, rel=0.01)
