"""Axolotl's options that change a module's forward: analysis, directions, anchor and training.

A run with the option against one without: the same scores, the same directions, and, where the
option promises the same training, the same adapter up to rounding.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.axolotl import load, short_run
from safetensors.torch import load_file

from loki_plugin.protecting.directions import FILE_NAME, Directions
from loki_plugin.rows import RowSelection

ADAPTER = "adapter_model.safetensors"
# The same training, up to rounding.
SAME = {
    "tiled_mlp, one shard": {"tiled_mlp": True, "tiled_mlp_num_shards": 1},
    "tiled_mlp, three shards": {"tiled_mlp": True, "tiled_mlp_num_shards": 3},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "selective_checkpointing": {"gradient_checkpointing": True, "selective_checkpointing": True},
    "chunked_cross_entropy": {"chunked_cross_entropy": True},
    "layer_offloading": {"layer_offloading": True},
    "lora_*_kernel": {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True},
    "use_kernels": {"use_kernels": True},
    "eager_attention": {"eager_attention": True},
    "sdp_attention": {"sdp_attention": True},
}
# Another training on the same analysis.
OTHER = {"neftune_noise_alpha": {"neftune_noise_alpha": 5}}
# Refused by name.
WRONG = {
    "scaling_softmax": (
        {"scaling_softmax": True, "attn_implementation": "flex_attention"},
        "scaling_softmax: it changes attention in this training alone",
    ),
    "tiled_mlp of several sequences": (
        {"tiled_mlp": True, "tiled_mlp_num_shards": 3, "micro_batch_size": 2},
        "tiled_mlp: .*set `micro_batch_size: 1`",
    ),
    "tiled_mlp of long sequences": (
        {"tiled_mlp": True, "sequence_len": 40_000, "micro_batch_size": 2},
        "tiled_mlp: .*set `micro_batch_size: 1`",
    ),
}


@pytest.fixture
def deepspeed(monkeypatch):
    """Axolotl's tiling imports a name of DeepSpeed, which it uses under DeepSpeed only."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        path = "deepspeed.runtime.sequence_parallel.ulysses_sp"
        parts = path.split(".")
        for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules[path].TiledMLP = None


@pytest.fixture(autouse=True)
def classes_put_back():
    """Axolotl patches classes for the process."""
    from transformers.models.llama import modeling_llama as llama

    kinds = (llama.LlamaMLP, llama.LlamaAttention, llama.LlamaDecoderLayer, llama.LlamaForCausalLM)
    saved = [(kind, dict(vars(kind))) for kind in kinds]
    yield
    for kind, before in saved:
        for name in set(vars(kind)) - set(before):
            delattr(kind, name)
        for name, value in before.items():
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)


def run(base, dataset, questions, folder, train, **options):
    folder.mkdir()
    config = (
        short_run(base, dataset, questions, folder)
        | {"max_steps": 2, "micro_batch_size": 1}
        | options
    )
    config["loki"]["protect"] = {"directions": 5, "anchor": 1.0}
    train(config)
    out = Path(config["output_dir"])
    report = json.loads((out / "loki_report.json").read_text())
    assert report["verified"], report
    return (
        RowSelection.load(out / "loki_rows.json"),
        Directions.load(out / FILE_NAME),
        load_file(out / ADAPTER),
    )


@pytest.fixture(scope="module")
def plain(base, dataset, questions, tmp_path_factory):
    from helpers.axolotl import train

    return run(base, dataset, questions, tmp_path_factory.mktemp("plain") / "run", train)


@pytest.mark.parametrize("option", WRONG)
def test_what_cannot_work_is_refused_by_name(option, run_config):
    options, message = WRONG[option]
    with pytest.raises(ValueError, match=message):
        load(run_config | options)


def test_the_docs_list_what_was_run():
    page = (Path(__file__).parents[2] / "docs" / "ways.md").read_text(encoding="utf-8")
    table = page.split("## Options that change a module's forward")[1].split("\n## ")[0]
    for option in (*SAME, *OTHER, *WRONG):
        assert f"`{option.split(',')[0].split(' ')[0]}`" in table, option


@pytest.mark.slow
@pytest.mark.parametrize("option", [*SAME, *OTHER])
def test_a_run_with_it(option, plain, base, dataset, questions, tmp_path, train, request):
    if option.startswith("tiled_mlp"):
        request.getfixturevalue("deepspeed")
    options = (SAME | OTHER)[option]
    folder = tmp_path / "run"
    rows, directions, adapter = run(base, dataset, questions, folder, train, **options)
    expected_rows, expected_directions, expected = plain
    assert [r.tolist() for r in rows.rows] == [r.tolist() for r in expected_rows.rows]
    for found, wanted in zip(directions.basis, expected_directions.basis, strict=True):
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=0, atol=1e-4)
    assert adapter.keys() == expected.keys()
    if option in SAME:
        for name, tensor in adapter.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
