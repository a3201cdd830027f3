"""What a run decides before its training: rows, what is protected, adapter, trainer."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import ranks
from ..analysing.calibration.prompts import Prompt
from ..args import LokiConfig
from ..choices import LINEAR_RANK, SELF
from ..evaluating.watching import Watch
from ..protecting.anchor import Anchor
from ..protecting.directions import Directions
from ..rows import RowSelection
from .base import check_base
from .earlier import take_new_embeddings
from .files import Files, config_file
from .patches import take_over_sharded_saving
from .sharding import check_loaded, is_fsdp2, let_anchor_pass, meet
from .task import let_stand_still, standing_still
from .telling import Line, about_rows, about_training, block
from .tokens import calibration_tokenizer
from .watched import choose_by, watch

LOG = logging.getLogger("loki_plugin")


@dataclass
class Run:
    """One training run: its configuration, its rows, and what is reported about it."""

    config: LokiConfig
    selection: RowSelection
    tokens: int  # of the base's embeddings, before the YAML's are added
    directions: Directions | None = None
    anchor: Anchor | None = None
    watch: Watch | None = None  # of what is forgotten, at every evaluation
    general: list[Sequence[int]] = field(default_factory=list)  # token ids that protection reads
    facts: dict[str, Any] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)  # the base's fingerprint before training
    measured: list[Prompt] = field(default_factory=list)  # asked before and after
    told: list[Line] = field(default_factory=list)  # where the rows are from, what is protected
    trainer: Any = None  # a weak reference: what is trained must not outlive the training

    @classmethod
    def start(cls, cfg, model, files: Files) -> Run:
        """Rows from the adapter to continue, from the rows file, or from the analysis."""
        from ..evaluating.forgetting import load_questions
        from ..implanting.carrier import check_adaptable
        from ..model.anatomy import find_anatomy
        from ..model.linears import chosen, has_routed_experts
        from ..model.loading import is_loaded
        from ..model.positions import check_lengths
        from ..pipeline import choose_rows, is_analysed

        meet()
        let_anchor_pass(cfg, files.config.protect)
        check_loaded(model, sharded=is_fsdp2(cfg))
        if is_fsdp2(cfg):
            take_over_sharded_saving()
        if not Path(cfg.base_model).is_dir():
            check_base(cfg, downloaded=True)
        anatomy, targets = find_anatomy(model), files.config.targets
        check_adaptable(anatomy, model, chosen(model, anatomy, targets))
        made = calibration_tokenizer(cfg, model, files)
        tokenizer, unknown = made.tokenizer, made.unknown
        files = replace(files, inputs=replace(files.inputs, turns=made.turns))
        files = _with_what_it_can_write(files, model, tokenizer)
        source = files.source
        if files.rows is None and not is_analysed(model, files.config):
            source = "no analysis"
        started = time.perf_counter()
        if files.rows is None:
            selection = choose_rows(model, tokenizer, files.config, files.inputs)
        else:
            with ranks.together():
                checked = files.rows.check(model) if is_loaded(model) else None
            selection = ranks.broadcast(checked)
        seconds = time.perf_counter() - started
        selection = _aimed(selection, model, targets, files)
        run = cls(files.config, selection, model.get_input_embeddings().num_embeddings)
        run.facts |= {"base_model": str(cfg.base_model), "config": config_file(cfg)}
        run.facts |= {"rows_from": source, "rows_seconds": round(seconds, 3)}
        run.facts["adapter_fits"] = type(model).__name__  # whose names of modules it has
        run.told = about_rows(selection, source)
        if model.config.get_text_config() is not model.config:
            fits = f"of modules are those of {run.facts['adapter_fits']}, which the adapter fits"
            other = "`loki export --names text` writes the text model's"
            run.told.append(("names", f"{fits}; {other}"))
        if selection.linears and has_routed_experts(anatomy):
            run.told.append(("experts", "routed ones, and what routes to them, stay frozen"))
        run.watch = watch(cfg, model, tokenizer, files.config, files.inputs, unknown)
        run._protect(cfg, model, tokenizer, files, unknown)
        if files.config.report and files.inputs.records:
            calibration = files.config.calibration
            run.measured = load_questions(tokenizer, calibration, files.inputs.records)
        watched = [*run.watch.prompts, *run.watch.own] if run.watch else []
        ids = [*(prompt.ids for prompt in run.measured), *(text.ids for text in watched)]
        check_lengths(model, [*ids, *(run.anchor.prompts if run.anchor else ())])
        LOG.info(block("rows", run.told))
        return run

    def _protect(self, cfg, model, tokenizer, files: Files, unknown: frozenset[int]) -> None:
        """Directions from what training goes on from, or from the calibration; anchor prompts."""
        from ..model.anatomy import find_anatomy
        from ..protecting.preparing import (
            check_trained,
            choose_directions,
            describe,
            earlier_directions,
            report,
        )
        from ..protecting.texts import anchored, own_texts, protecting_prompts, told_of

        settings = self.config.protect
        found = earlier_directions(self.config, cfg.lora_model_dir, _resumed_checkpoint(cfg))
        if found:
            down = find_anatomy(model).names
            pairs = zip(down, self.selection.counts, strict=True)
            check_trained(found, [*self.selection.linears, *(n for n, k in pairs if k)], down)
        texts = held = []
        if settings.anchor or (settings.reads and not found):
            inputs = files.inputs
            if settings.text == SELF:
                inputs = replace(
                    inputs, texts=own_texts(model, tokenizer, self.config, turns=inputs.turns)
                )
                self.told.append(("texts", told_of(inputs.texts)))
            texts = protecting_prompts(tokenizer, self.config, inputs, unknown)
            if self.watch:
                texts = self.watch.without(texts)
            held = anchored(tokenizer, inputs, texts)
        if settings.reads and not found:
            self.general = [text.ids for text in texts]
            still = standing_still(model, self.selection, self.config)
            found = choose_directions(model, self.general, self.config, still)
        if found:
            with ranks.together():
                self.directions = found.check(model, unchanged=True)
            there = found.held()
            self.facts["protection"] = report(there) | {"still": found.still}
            if there.basis:
                self.told.append(("protected", describe(there)))
            elif settings.memory is not None:
                LOG.warning(
                    "loki: `protect.memory` changes nothing here: every update is of a whole"
                    " linear, and with `freeze_a` no directions are held for it"
                )
            if settings.freeze_a and not settings.auto and not found.still:
                LOG.warning(
                    "loki: `protect.freeze_a` changes nothing here: no fresh low-rank update is of"
                    " a whole linear (`targets: all`, or `quota: 100` at a `rank`)"
                )
        if settings.anchor:
            every = settings.anchor_every
            ids, starts = [text.ids for text in held], [text.starts for text in held]
            self.anchor = Anchor(ids, settings.anchor, settings.anchor_batch, every, starts)
            drawn = min(settings.anchor_batch, len(held))
            each = f"{settings.anchor * every:g} x KL(base || tuned) on {drawn}"
            when = "every step" if every == 1 else f"one step of {every}"
            begin = sum(map(len, starts))
            told = f"{when} adds {each} of {len(held)} texts, in which {begin} answers begin"
            self.told.append(("anchor", told))
        if not (settings.anchor or found or is_fsdp2(cfg)):
            told = "nothing, as in the paper; `protect: auto` keeps more of what the model knows"
            self.told.append(("protected", told))

    def apply_to(self, cfg, model) -> None:
        """Set the LoRA keys that Axolotl reads when it builds the adapter."""
        from ..implanting.carrier import lora_settings
        from ..model.anatomy import find_anatomy

        config = self.config
        linear_rank = config.linear_rank or LINEAR_RANK
        anatomy = find_anatomy(model)
        settings = lora_settings(anatomy, model, self.selection, config.rank, linear_rank)
        cfg.lora_r = settings["r"]
        cfg.lora_alpha = settings["lora_alpha"]
        cfg.lora_rank_pattern = settings["rank_pattern"] or None
        cfg.lora_alpha_pattern = settings["alpha_pattern"] or None
        cfg.lora_target_modules = settings["target_modules"]
        cfg.lora_target_parameters = settings["target_parameters"]
        cfg.lora_fan_in_fan_out = settings["fan_in_fan_out"]

    def install(self, cfg, model) -> None:
        from ..implanting.adapter import install
        from ..implanting.fitting import check_fits
        from ..model.fingerprint import fingerprint
        from ..model.loading import is_loaded
        from ..protecting.installing import protect_inputs

        fresh = not cfg.lora_model_dir
        if not fresh:
            check_fits(model, Path(str(cfg.lora_model_dir)))
        install(model, self.selection, self.config.rank, fresh)
        if cfg.revision_of_model:  # so that tools which load the adapter's base load that one
            model.peft_config[model.active_adapter].revision = str(cfg.revision_of_model)
        if self.directions:
            protect_inputs(model, self.directions, fresh, checked=True)
        if not is_fsdp2(cfg):
            take_new_embeddings(model, _resumed_checkpoint(cfg), self.tokens)
        # The base was read when its rows were chosen, and is read again after the training.
        with ranks.together():
            mine = fingerprint(model, unchanged=True) if is_loaded(model) else {}
        self.base = ranks.broadcast(mine) if is_fsdp2(cfg) else mine

    def start_at_zero(self, cfg, model) -> None:
        """A fresh adapter that was drawn anew behind our back starts as the base again."""
        from ..implanting.adapter import start_at_zero

        if not cfg.lora_model_dir:
            start_at_zero(model)

    def prepare_trainer(self, cfg, trainer) -> None:
        from ..implanting.adapter import trainable_share
        from ..implanting.recording import record
        from ..implanting.training import prepare_trainer, save_whole_checkpoints
        from ..protecting.installing import DirectionsBesideCheckpoints
        from .preference import model_of

        if cfg.rl:
            self.install(cfg, model_of(trainer))
        reads: list[Line] = []
        if self.directions:
            goes_on = bool(_resumed_checkpoint(cfg) or cfg.lora_model_dir)
            wanted = self.directions.still, self.general, self.config, goes_on
            reads, found = let_stand_still(trainer, self.selection, *wanted)
            self.facts["protection"] |= found
        trainable, base = trainable_share(trainer.model)
        self.facts.update(trainable_parameters=trainable, base_parameters=base)
        told = about_training(self.selection, self.config.rank, trainable, base)
        LOG.info(block("training", [*told, *reads]))
        prepare_trainer(trainer, self.selection, self.config.lr_scale, _resumed_checkpoint(cfg))
        if is_fsdp2(cfg):
            save_whole_checkpoints(trainer)
        if self.directions:
            trainer.add_callback(DirectionsBesideCheckpoints(self.directions))
        if self.anchor:
            self.anchor.attach(trainer)
        if self.watch:
            self.watch.attach(trainer)
            choose_by(cfg, trainer)
        anchor = self.anchor
        record(trainer, sum(self.selection.counts), lambda: anchor.last if anchor else None)
        self.trainer = weakref.ref(trainer)


def _with_what_it_can_write(files: Files, model, tokenizer) -> Files:
    """What the model cannot write is known before the analysis; `auto` goes on without it."""
    from ..protecting.own_text import Marks, user_turn

    protect = files.config.protect
    if protect.text != SELF:
        return files
    try:
        Marks.of(model, tokenizer)
        user_turn(model, tokenizer)
    except ValueError as error:
        if not protect.auto:
            raise
        LOG.warning("loki: `protect: auto` looks at calibration prompts only: %s", error)
        less = protect.model_copy(update={"text": None})
        return replace(files, config=files.config.model_copy(update={"protect": less}))
    return files


def _aimed(selection: RowSelection, model, targets, files: Files) -> RowSelection:
    """The rows with the further linears that `targets` names, which must be those of an adapter
    that goes on; a rows file may name none, but no rows or linears that would not train."""
    from ..implanting.adapter import aimed
    from ..model.anatomy import find_anatomy

    found = aimed(selection, model, find_anatomy(model), targets)
    fewer = found.counts != selection.counts or {*selection.linears} - {*found.linears}
    if files.rows is not None and selection != found and (files.goes_on or fewer):
        raise ValueError(
            f"{files.source} trains {_kinds(selection)}, `loki.targets: {targets}` asks"
            f" for {_kinds(found)}; give the targets that it was trained with, or start afresh"
        )
    return found


def _kinds(selection: RowSelection) -> str:
    rows = ["rows of the down-projections"] if any(selection.counts) else []
    return " and ".join([*rows, *sorted({name.rpartition(".")[2] for name in selection.linears})])


def leave_alone(cfg, model) -> None:
    """`inference` and `evaluate` load a saved adapter as the plain LoRA that it is.

    Without `lora_model_dir` Axolotl makes a fresh LoRA, which changes nothing: the base answers.
    """
    from ..model.anatomy import find_anatomy

    if cfg.lora_model_dir:
        LOG.info("loki: reads the adapter %s; nothing is analysed", cfg.lora_model_dir)
        return
    LOG.warning("loki: no lora_model_dir is given, so the base model answers; nothing is analysed")
    cfg.lora_target_modules = find_anatomy(model).names


def _resumed_checkpoint(cfg) -> str | None:
    from axolotl.utils.train import determine_last_checkpoint

    return determine_last_checkpoint(cfg)
