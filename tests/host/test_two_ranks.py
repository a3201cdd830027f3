"""DDP through Axolotl: two CPU ranks train one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.torchrun import two_ranks
from safetensors.torch import load_file

from loki_plugin.protecting.directions import FILE_NAME, Directions
from loki_plugin.protecting.reading import outside

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys
import torch
from safetensors.torch import save_file
from loki_plugin.plugin import LokiPlugin

create, finish = LokiPlugin.post_trainer_create, LokiPlugin.post_train

def post_trainer_create(self, cfg, trainer):
    create(self, cfg, trainer)
    with open(f"{sys.argv[2]}/world-{os.environ['RANK']}", "w") as file:
        file.write(f"{trainer.args.world_size} {trainer.accelerator.distributed_type}")

def post_train(self, cfg, model):
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    save_file(tensors, f"{sys.argv[2]}/rank-{os.environ['RANK']}.safetensors")
    finish(self, cfg, model)

LokiPlugin.post_trainer_create, LokiPlugin.post_train = post_trainer_create, post_train

if __name__ == "__main__":  # data sets are tokenised in processes that import this file
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    do_train(load_cfg(sys.argv[1]), TrainerCliArgs())
"""


CHECKPOINTS = {"gradient_checkpointing": True}  # reentrant, where nothing else is said


@pytest.mark.parametrize(
    ("rank", "protect"),
    [
        (None, {}),
        (2, {"inputs": 0.9, "anchor": 0.5, "anchor_batch": 2}),
        (None, {"inputs": 0.9, "soft": True, "text": "self"}),
    ],
    ids=["dense", "rank2-protected", "dense-soft-self"],
)
def test_two_ranks_train_one_model_as_one_rank_with_the_doubled_batch(
    run_config, train, tmp_path, rank, protect
):
    """SGD, so that the update is linear in the gradient that the ranks average."""
    run_config["loki"] |= {"rank": rank, "protect": protect or "off"}
    if "anchor" in protect:  # a second pass through the checkpoints, which are made to bear it
        run_config |= CHECKPOINTS
    run_config |= {"optimizer": "sgd", "learning_rate": 1.0, "max_steps": 4, "weight_decay": 0.1}
    (tmp_path / "rank.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(json.dumps(run_config))
    said = two_ranks(tmp_path / "rank.py", tmp_path / "config.yaml", tmp_path)
    assert ("use_reentrant is now False" in said) == ("anchor" in protect)
    for r in range(2):
        assert (tmp_path / f"world-{r}").read_text() == "2 DistributedType.MULTI_CPU"
    one, two = (load_file(tmp_path / f"rank-{r}.safetensors") for r in range(2))
    assert one.keys() == two.keys() and len(one) == (3 if rank is None else 6)
    if protect:  # rank 0 has saved, and so folded what it reads into A
        for layer, u in enumerate(
            Directions.load(Path(run_config["output_dir"]) / FILE_NAME).basis
        ):
            name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_A.default.weight"
            a, b = one.pop(name), two.pop(name)
            assert (outside(a, u) - outside(b, u)).norm() < 1e-6 * a.norm()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    report = json.loads((Path(run_config["output_dir"]) / "loki_report.json").read_text())
    assert report["verified"] is True and report["verified_what"]["base"] == "every byte"

    if rank is not None:
        assert abs(report["anchor_kl_last_step"]) < 0.1  # was drawn; SGD has hardly moved
        assert max(report["protection"]["leakage_per_layer"]) < 1e-6
        return  # A starts from random numbers, which one rank draws differently
    together = load_file(Path(run_config["output_dir"]) / "adapter_model.safetensors")
    alone_dir = tmp_path / "alone"
    train(run_config | {"micro_batch_size": 8, "output_dir": str(alone_dir)})
    alone = load_file(alone_dir / "adapter_model.safetensors")
    for name, tensor in alone.items():
        assert tensor.abs().max() > 1e-3
        # Axolotl averages the ranks' mean losses, whose numbers of tokens differ by one or two.
        assert (together[name] - tensor).norm() < 5e-3 * tensor.norm(), name


@pytest.mark.parametrize(
    ("rank", "protect"),
    [(None, "auto"), (2, {"inputs": 0.9})],
    ids=["dense-auto", "rank-hard"],
)
def test_two_ranks_train_the_same_linears(run_config, tmp_path, rank, protect):
    """Each rank sees other texts and draws other numbers, and both hold one adapter."""
    run_config["loki"] |= {"targets": "all", "rank": rank, "protect": protect}
    (tmp_path / "rank.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(json.dumps(run_config | {"max_steps": 4}))
    two_ranks(tmp_path / "rank.py", tmp_path / "config.yaml", tmp_path)
    for r in range(2):
        assert (tmp_path / f"world-{r}").read_text() == "2 DistributedType.MULTI_CPU"
    one, two = (load_file(tmp_path / f"rank-{r}.safetensors") for r in range(2))
    assert one.keys() == two.keys() and len(one) == 36 + (3 if rank is None else 6)
    out = Path(run_config["output_dir"])
    directions = Directions.load(out / FILE_NAME).by_module([])
    assert len(directions) == 21
    for name, tensor in one.items():
        if ".lora_A." in name:  # rank 0 has saved, and so folded what it reads into A
            u = directions[name.partition(".lora_A.")[0].removeprefix("base_model.model.")]
            differ = outside(tensor, u) - outside(two[name], u)
            assert differ.norm() < 1e-6 * tensor.norm(), name
        else:
            assert torch.equal(tensor, two[name]), name
    report = json.loads((out / "loki_report.json").read_text())
    assert report["verified"] is True and report["verified_what"]["base"] == "every byte"
    assert len(report["linears"]) == 18
    inputs = 3 if protect == "auto" else 12  # of the others A stands still
    assert len(report["protection"]["leakage_per_layer"]) == inputs
