"""The pictures, and what was measured after training, in the places that the trainer reports to."""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer

from .drawing.style import to_pixels
from .pictures import Picture

LOG = logging.getLogger("loki_plugin")
# They end their run with the training, and would begin another one.
_ENDED = ("MLflowCallback", "TrackioCallback", "DVCLiveCallback")


def track(trainer: Trainer, drawn: list[Picture], report: dict[str, Any]) -> None:
    """Hand the figures of the end to every tracker of `trainer`, and the pictures to those it can.

    Figures go through the trainer's own callbacks, so that any tracker gets them. For pictures
    they have no way; TensorBoard and W&B are asked themselves.

    Args:
        report: what `loki_report.json` holds.
    """
    measured, handler = _measured(report), trainer.callback_handler
    every = handler.callbacks
    for callback in every:
        name = type(callback).__name__
        if name in _ENDED:
            LOG.info("loki: %s has ended its run; the last figures are in the report", name)
            continue
        try:
            if measured:
                handler.callbacks = [callback]
                handler.on_log(trainer.args, trainer.state, trainer.control, measured)
            if name == "TensorBoardCallback" and callback.logging_dir:
                _to_tensorboard(callback.logging_dir, drawn, trainer.state.global_step)
            elif name == "WandbCallback":
                _to_wandb(drawn)
        except Exception as error:  # a tracker must not cost the training, nor the report
            LOG.warning("loki: %s did not take the last figures: %r", name, error)
        finally:
            handler.callbacks = every


def _measured(report: dict[str, Any]) -> dict[str, float]:
    """What is only known when the training is over."""
    forgetting = report.get("forgetting") or {}
    names = {"kl": "loki/forgotten_kl", "same_answer": "loki/same_answer"}
    names |= {"accuracy_before": "loki/accuracy_before", "accuracy_after": "loki/accuracy_after"}
    found = {ours: forgetting.get(k) for k, ours in names.items()}
    found["loki/trainable_percent"] = report.get("trainable_percent")
    return {k: float(v) for k, v in found.items() if v is not None}


def _to_tensorboard(folder: str, drawn: list[Picture], step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=folder) as writer:
        for picture in drawn:
            pixels = to_pixels(picture.figure)
            writer.add_image(f"loki/{picture.name}", pixels, step, dataformats="HWC")


def _to_wandb(drawn: list[Picture]) -> None:
    import wandb

    if wandb.run is not None:
        images = {f"loki/{p.name}": wandb.Image(to_pixels(p.figure)) for p in drawn}
        wandb.run.log(images)
