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
RAGGED = {"batch": 3, "length": 44, "ragged": True, "shared": 20}
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
    assert found["scores"] == [[3, 3, 48], "torch.float32", "cuda:0"]
    own = OWN_WAITS.get(family, "none of its own")
    assert [wait for wait in found["waits"] if own not in wait] == []


def test_a_model_over_two_devices_is_checked_and_attributed_without_waiting(library):
    uniform = {"batch": 3, "length": 44}
    cases = [{"shape": SMALL, "devices": 2, "check": True} | more for more in (RAGGED, uniform)]
    for found in dry_run(library, "llama", *cases):
        assert "error" not in found, found["error"]
        assert found["scores"] == [[3, 4, 512], "torch.float32", "cuda:0"]
        assert found["p"] == [[3, 29], "cuda:0"] and found["waits"] == {}


# kernels, TFLOP over the floor's, peak GiB above the weights: measured, and a little room.
@pytest.mark.parametrize(
    ("case", "kernels", "gibibytes"),
    [
        ({"batch": 16, "length": 150}, 4_100, 7.9),
        ({"batch": 4, "length": 200, "nf4": True, "ragged": True}, 6_200, 2.5),
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
    # Dividing by the floor of the longest prompt, ragged prompts may come out below it.
    assert 0.9 <= 1e12 * found["TFLOP"] / least <= 1.01
