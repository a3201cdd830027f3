"""The optimizer phase: what the trainer may touch, resuming, and the rows beside checkpoints."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainerCallback

from .. import ranks
from ..model.fingerprint import same_model
from ..model.linears import PREFIX, kind_of
from ..rows import FILE_NAME, RowSelection
from . import adapter
from .checkpoint import open_tensors
from .saved import WEIGHTS, accompany, announce, save_sharded
from .selected import RowFactor

LOG = logging.getLogger("loki_plugin")
_ADAFACTOR_ROWS = "exp_avg_sq_row"  # one number per row


def prepare_trainer(
    trainer: Trainer, selection: RowSelection, lr_scale: float, resume_from: str | None
) -> None:
    """Guard a trainer whose model carries the row constraint.

    Wraps `create_optimizer`: before it, everything but our parameters is frozen again and checked;
    after it, every group's learning rate is multiplied by `lr_scale`. Wraps `create_scheduler`, so
    that every scheduler follows: some take the rate from the groups, some (one-cycle, Rex) from
    the arguments. What a checkpoint brings gets the dtype that it had before. Each checkpoint gets
    the rows file. Training stops when NaN reaches a weight. Of a schedule-free optimizer the
    averaged weights are saved, which evaluations measure too.

    Raises:
        ValueError: `resume_from` is a checkpoint of other rows, other linears, another base or
            another rank.
        RuntimeError: a parameter that is not ours is trainable; or, when the optimizer is made, it
            does not hold all that is.
    """
    check_resume(resume_from, selection)
    if resume_from:
        _check_ranks(Path(resume_from), trainer.model)
    create, schedule = trainer.create_optimizer, trainer.create_scheduler
    dtypes = KeepDtypes(trainer.model)

    def create_optimizer(*args, **kwargs):
        dtypes.restore(trainer.model)
        adapter.freeze(trainer.model)
        adapter.check(trainer.model)
        known = trainer.optimizer is not None
        optimizer = create(*args, **kwargs)
        check_holds(optimizer, trainer.model)
        if not known:
            accept_whole_states(optimizer, trainer.model)
            for group in optimizer.param_groups:
                for key in ("lr", "max_lr"):  # the latter is AdamC's, of which it takes its decay
                    if isinstance(group.get(key), int | float):
                        group[key] *= lr_scale
        return optimizer

    def create_scheduler(*args, **kwargs):
        given = trainer.args.learning_rate
        trainer.args.learning_rate = given * lr_scale
        try:
            return schedule(*args, **kwargs)
        finally:
            trainer.args.learning_rate = given

    adapter.check(trainer.model)
    if ranks.is_first():
        announce(Path(trainer.args.output_dir))
    trainer.create_optimizer = create_optimizer
    trainer.create_scheduler = create_scheduler
    trainer.add_callback(RowsBesideCheckpoints(selection))
    trainer.add_callback(StopAtNaN())
    trainer.add_callback(dtypes)
    trainer.add_callback(EndAveraged())


def check_holds(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Check that an optimizer holds every parameter that trains.

    Raises:
        RuntimeError: it was made of others, so that some would stay at zero.
    """
    each = [optimizer, *getattr(optimizer, "optimizer_dict", {}).values()]  # layer-wise: one each
    held = {id(p) for one in each for group in one.param_groups for p in group["params"]}
    trains = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, known in trains.items() if known not in held]
    if missing:
        raise RuntimeError(
            f"{type(optimizer).__name__} holds {len(trains) - len(missing)} of the {len(trains)}"
            f" parameters that train; {missing[0]} would stay as it is. Take another `optimizer`,"
            " such as adamw_torch"
        )


def accept_whole_states(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let `optimizer` load states of 0.1.1, which had the moments of all H rows of lora_B.

    Raises (when such a state is loaded):
        ValueError: its moments are 8-bit blocks that run across rows.
    """
    load = optimizer.load_state_dict

    def load_state_dict(saved: dict) -> None:
        # Only now: FSDP2 puts other parameters into model and optimizer.
        factors = {
            id(m.values): (name, m)
            for name, m in adapter.constrained_modules(model)
            if isinstance(m, RowFactor)
        }
        states = dict(saved["state"])
        for group, stored in zip(optimizer.param_groups, saved["param_groups"], strict=False):
            for parameter, key in zip(group["params"], stored["params"], strict=False):
                if id(parameter) in factors and key in states:
                    states[key] = _of_rows(states[key], *factors[id(parameter)])
        return load({**saved, "state": states})

    optimizer.load_state_dict = load_state_dict


def _of_rows(state: dict, name: str, module: RowFactor) -> dict:
    """The part of one parameter's optimizer state that belongs to the rows of `module`."""
    whole = module.out_features, module.in_features
    if len(module.rows) == module.out_features:
        return state
    fitting = {}
    for key, value in state.items():
        if isinstance(value, dict):  # bitsandbytes nests its tensors
            fitting[key] = _of_rows(value, name, module)
        elif not isinstance(value, torch.Tensor):
            continue
        elif value.dtype == torch.uint8 and value.shape == whole:
            raise ValueError(
                f"{name}: the checkpoint holds 8-bit optimizer states of all {whole[0]} rows, as"
                " version 0.1.1 wrote them; their blocks run across rows and cannot be taken"
                " apart. Give its folder as `lora_model_dir` to go on from its weights with a new"
                " optimizer"
            )
        elif value.shape == whole or (key == _ADAFACTOR_ROWS and len(value) == whole[0]):
            fitting[key] = value[module.rows.to(value.device)]
    return {**state, **fitting}


def save_whole_checkpoints(trainer: Trainer) -> None:
    """Let a trainer whose model FSDP2 shards save checkpoints that hold ordinary adapters."""

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or trainer.args.output_dir
        save_sharded(trainer.model, lambda state: trainer._save(folder, state_dict=state))

    trainer.save_model = save_model


class StopAtNaN(TrainerCallback):
    """A NaN that reached the weights never leaves them: say where it came, and train no further."""

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        norm = (logs or {}).get("grad_norm")
        if norm is None or math.isfinite(norm):
            return
        LOG.warning("loki: step %d: the gradient holds NaN or Inf", state.global_step)
        try:
            adapter.check(model, finite=True)
        except RuntimeError as error:
            LOG.error("loki: step %d: training stops, %s", state.global_step, error)
            control.should_training_stop = True


class KeepDtypes(TrainerCallback):
    """Resuming, and loading the best checkpoint, go through PEFT, which makes adapters float32."""

    def __init__(self, model: nn.Module):
        self.dtypes = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}

    def restore(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.dtypes and parameter.dtype != self.dtypes[name]:
                parameter.data = parameter.data.to(self.dtypes[name])

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.restore(model)


class EndAveraged(TrainerCallback):
    """A schedule-free optimizer trains one set of weights and answers with another, the average.

    Evaluations set the average, and the next step takes it back; so what is saved at the end would
    be the one or the other, by whether the last step was evaluated.
    """

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        best = args.load_best_model_at_end and state.best_model_checkpoint  # was loaded just now
        if not best and any("train_mode" in group for group in getattr(inner, "param_groups", [])):
            inner.eval()


class RowsBesideCheckpoints(TrainerCallback):
    """A checkpoint without its rows could be resumed with others."""

    def __init__(self, selection: RowSelection):
        self.selection = selection

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if ranks.is_first() and folder.is_dir():
            self.selection.save(folder / FILE_NAME)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        """The checkpoint's adapter is about to be copied into the output folder and sent off."""
        if ranks.is_first():
            accompany(model, Path(args.output_dir))


def _check_same_base(checkpoint: str, earlier: dict[str, str], now: dict[str, str]) -> None:
    found = same_model(earlier, now)
    if found:
        raise ValueError(
            f"checkpoint '{checkpoint}' was trained on another base: {found}. Give the `base_model`"
            " (and `revision_of_model`) of its run, or another `output_dir` and start afresh"
        )


def _check_ranks(checkpoint: Path, model: nn.Module) -> None:
    """Check that a checkpoint's adapter has the rank of the run in every module.

    Raises:
        ValueError: it has another one.
    """
    if not (checkpoint / WEIGHTS).is_file():
        return
    with open_tensors(checkpoint / WEIGHTS) as stored:
        had = {k: stored.get_slice(k).get_shape()[0] for k in stored.keys() if ".lora_A." in k}
    for name, module in model.named_modules():
        rank = had.get(f"{name}.lora_A.weight")
        if rank is None or not isinstance(module, LoraLayer):
            continue
        own = module.r[model.active_adapter]
        if rank != own:
            raise ValueError(
                f"checkpoint '{checkpoint}' has rank {rank} in {name.removeprefix(PREFIX)}, and"
                f" this run {own}; an adapter keeps its form: give the ranks of its run (`lora_r`,"
                " or `rank` and `linear_rank` in the `loki:` block), or start afresh"
            )


def check_resume(checkpoint: str | None, selection: RowSelection) -> None:
    """Refuse to mix two selections in one adapter, or to put it onto another base."""
    if not checkpoint:
        return
    file = Path(checkpoint) / FILE_NAME
    if not file.exists():
        raise ValueError(
            f"checkpoint '{checkpoint}' has no {FILE_NAME}, so it cannot be told whether it was"
            " trained on the same rows; copy the rows file of its run there, or start afresh"
        )
    earlier = RowSelection.load(file)
    if earlier == selection:
        if earlier.fingerprint and selection.fingerprint:
            _check_same_base(checkpoint, earlier.fingerprint, selection.fingerprint)
        return
    others = sorted({*earlier.linears} ^ {*selection.linears})
    if others:
        kinds = ", ".join(dict.fromkeys(map(kind_of, others)))
        raise ValueError(
            f"checkpoint '{checkpoint}' was trained on other linears: {kinds} trained there and"
            " would not train now, or the other way round. Give the `loki.targets` of its run, or"
            " start afresh"
        )
    if earlier.num_layers != selection.num_layers:
        detail = f"{earlier.num_layers} layers instead of {selection.num_layers}"
    else:
        pairs = zip(earlier.rows, selection.rows, strict=True)
        differ = sum(a.tolist() != b.tolist() for a, b in pairs)
        detail = f"{differ} of {selection.num_layers} layers have other rows"
    raise ValueError(
        f"checkpoint '{checkpoint}' was trained on other rows ({detail}); resuming would mix two"
        f" selections. Set `loki.rows: {file}` to go on with its rows, or start afresh"
    )
