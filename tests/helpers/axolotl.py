"""Axolotl's own configuration loading, in this process."""

from __future__ import annotations

import functools
import gc
import json


def load(config: dict):
    cfg, error = load_after(config)
    if error:
        raise error
    return cfg


def load_after(config: dict):
    """(the validated configuration, None), or (the one that was handed in, the error)."""
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(json.loads(json.dumps(config)))
    try:
        return load_cfg(cfg), None
    except ValueError as error:
        return cfg, error


def short_run(base, dataset, questions, folder) -> dict:
    """The YAML of a run of 6 steps as a dict; everything that it writes goes into `folder`."""
    return {
        "base_model": str(base),
        "plugins": ["loki"],
        "adapter": "loki",
        "loki": {
            "quota": 10,
            "protect": "off",  # `auto` lets the model write, in every run
            "calibration": {"source": str(questions)},
            "cache_dir": str(folder / "cache"),
        },
        "datasets": [
            {
                "path": str(dataset),
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
                "message_property_mappings": {"role": "role", "content": "content"},
            }
        ],
        "chat_template": "tokenizer_default",
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": 128,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "learning_rate": 0.02,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "seed": 1,
    }


def train(config: dict):
    """Axolotl's own load_cfg and do_train in this process."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.train import do_train

    cfg = load(config)
    do_train(cfg, TrainerCliArgs())
    _keep_what_a_run_imports()
    return cfg


@functools.cache
def _keep_what_a_run_imports() -> None:
    """Out of sight of the garbage collector, see conftest.py."""
    gc.collect()  # the first run itself
    gc.freeze()
