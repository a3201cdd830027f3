"""On fake CUDA tensors: no tensor on the wrong device, no wait for it, and what a batch costs."""

from __future__ import annotations

import shutil

import pytest
from helpers.fake_cuda import build, dry_run
from helpers.families import FAMILIES

from benchmarks.floor import flops

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the CUDA guard is built with g++")
# Shapes of Llama-3.1-8B: L, H, I, key heads, head size, vocabulary.
LLAMA_8B = (32, 4096, 14336, 8, 128, 128256)
SMALL = (4, 512, 1408, 2, 64, 1000)
# Eleven prompts that save 200 tokens by sharing 20, so that those run once.
RAGGED = {"batch": 11, "length": 60, "ragged": True, "shared": 20}
# Falcon's own code picks its keys with a Python list, which PyTorch copies to the device.
OWN_WAITS = {"falcon": "modeling_falcon.py", "falcon-new": "modeling_falcon.py"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture(scope="module")
def by_family(library):
    cases = [{"family": family} | RAGGED for family in FAMILIES]
    return dict(zip(FAMILIES, dry_run(library, "family", *cases), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_mixes_devices_or_makes_the_host_wait(by_family, family):
    found = by_family[family]
    assert "error" not in found, found["error"]
    assert found["scores"] == [[11, 3, 48], "torch.float32", "cuda:0"]
    own = OWN_WAITS.get(family, "none of its own")
    assert [wait for wait in found["waits"] if own not in wait] == []


def test_a_model_over_two_devices_is_checked_and_attributed_without_waiting(library):
    uniform = {"batch": 11, "length": 44}
    cases = [{"shape": SMALL, "devices": 2, "check": True} | more for more in (RAGGED, uniform)]
    for found in dry_run(library, "llama", *cases):
        assert "error" not in found, found["error"]
        assert found["scores"] == [[11, 4, 512], "torch.float32", "cuda:0"]
        assert found["p"] == [[11, 29], "cuda:0"] and found["waits"] == {}


def test_what_prompts_share_runs_apart_where_that_saves_enough(library):
    """200 tokens over the batch in bf16, 400 in NF4: less does not pay for its kernels."""
    plans = [(20, 11, False), (20, 10, False), (20, 21, True), (20, 20, True), (0, 4, True)]
    cases = [
        {"shape": SMALL, "length": 60, "shared": shared, "batch": batch, "nf4": nf4}
        for shared, batch, nf4 in plans
    ]
    found = dry_run(library, "llama", *cases)
    assert not [f["error"] for f in found if "error" in f]
    kernels = [f["kernels"]["prefix"] for f in found]
    apart, together, apart_nf4, together_nf4, nothing_nf4 = kernels
    assert apart > 1.5 * together and apart_nf4 > 1.5 * together_nf4
    assert together_nf4 == nothing_nf4


# kernels, TFLOP over the floor's, peak GiB above the weights: measured, and a little room.
@pytest.mark.parametrize(
    ("case", "kernels", "gibibytes"),
    [
        ({"batch": 16, "length": 150}, 3_800, 7.9),
        ({"batch": 4, "length": 200, "nf4": True, "ragged": True}, 6_100, 2.5),
    ],
    ids=["bf16", "nf4"],
)
def test_what_a_batch_of_an_8b_model_costs(library, case, kernels, gibibytes):
    (found,) = dry_run(library, "llama", {"shape": LLAMA_8B} | case)
    assert "error" not in found, found["error"]
    assert found["waits"] == {}
    assert sum(found["kernels"].values()) <= kernels
    assert found["peak_bytes"] <= gibibytes * 2**30
    least = case["batch"] * flops(*LLAMA_8B, length=case["length"], steps=7)
    if case.get("nf4"):
        # Every weight is made whole once in each pass; the last layer answers from its keys on.
        done = found["operations"]
        weights = 7 * LLAMA_8B[0]
        assert done["prefix: gemm_4bit"] == weights - 4 and done["stack: gemm_4bit"] == weights
        assert done["backward: dequantize_4bit"] == weights - 7
        of_weights = [n for n in done if n.endswith(("gemm_4bit", "dequantize_4bit"))]
        assert len(of_weights) == 3
    # Dividing by the floor of the longest prompt, ragged prompts may come out below it.
    assert 0.9 <= 1e12 * found["TFLOP"] / least <= 1.01
