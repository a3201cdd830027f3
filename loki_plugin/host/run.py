"""The life of one training run: its rows, its adapter, its trainer, its report."""

from __future__ import annotations

import logging
import time
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import ranks
from ..analysing.calibration.prompts import Prompt
from ..args import LokiConfig
from ..choices import LINEAR_RANK, SELF
from ..protecting.anchor import Anchor
from ..protecting.directions import Directions
from ..reporting import Verdict, mark, write_report
from ..rows import FILE_NAME, RowSelection
from .base import check_base
from .files import Files, config_file
from .patches import take_over_sharded_saving
from .sharding import check_anchor, check_loaded, is_fsdp2, meet
from .telling import Line, about_end, about_rows, about_training, block
from .tokens import calibration_tokenizer

LOG = logging.getLogger("loki_plugin")
QUANTISED = "embeddings, norms and biases (quantised weights may be repacked)"


@dataclass
class Run:
    """One training run: its configuration, its rows, and what is reported about it."""

    config: LokiConfig
    selection: RowSelection
    tokens: int  # of the base's embeddings, before the YAML's are added
    directions: Directions | None = None
    anchor: Anchor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)  # the base's fingerprint before training
    measured: list[Prompt] = field(default_factory=list)  # asked before and after
    verdict: Verdict = field(default_factory=Verdict)
    told: list[Line] = field(default_factory=list)  # where the rows are from, what is protected
    forgotten: str = ""  # in words, for the last block
    trainer: Any = None  # a weak reference: what is trained must not outlive the training
    trained: bool = False  # whether the hook after the training has fired

    @classmethod
    def start(cls, cfg, model, files: Files) -> Run:
        """Rows from the adapter to continue, from the rows file, or from the analysis."""
        from ..evaluating.forgetting import load_questions
        from ..implanting.adapter import check_adaptable
        from ..model.anatomy import find_anatomy
        from ..model.linears import chosen, has_routed_experts
        from ..model.loading import is_loaded
        from ..pipeline import choose_rows, is_analysed

        meet()
        check_anchor(cfg, files.config.protect)
        check_loaded(model, sharded=is_fsdp2(cfg))
        if is_fsdp2(cfg):
            take_over_sharded_saving()
        if not Path(cfg.base_model).is_dir():
            check_base(cfg, downloaded=True)
        anatomy, targets = find_anatomy(model), files.config.targets
        check_adaptable(anatomy, model, chosen(model, anatomy, targets))
        tokenizer, unknown = calibration_tokenizer(cfg, model, files)
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
        if selection.linears and has_routed_experts(anatomy):
            run.told.append(("experts", "routed ones, and what routes to them, stay frozen"))
        run._protect(cfg, model, tokenizer, files, unknown)
        if files.config.report and files.inputs.records:
            calibration = files.config.calibration
            run.measured = load_questions(tokenizer, calibration, files.inputs.records)
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
            own_texts,
            protecting_prompts,
            report,
            told_of,
        )

        settings = self.config.protect
        found = earlier_directions(self.config, cfg.lora_model_dir, _resumed_checkpoint(cfg))
        if found:
            down = find_anatomy(model).names
            pairs = zip(down, self.selection.counts, strict=True)
            check_trained(found, [*self.selection.linears, *(n for n, k in pairs if k)], down)
        texts = []
        if settings.anchor or (settings.reads and not found):
            inputs = files.inputs
            if settings.text == SELF:
                inputs = replace(inputs, texts=own_texts(model, tokenizer, self.config))
                self.told.append(("texts", told_of(inputs.texts)))
            texts = protecting_prompts(tokenizer, self.config, inputs, unknown)
        if settings.reads and not found:
            found = choose_directions(model, [text.ids for text in texts], self.config)
        if found:
            with ranks.together():
                self.directions = found.check(model, unchanged=True)
            self.facts["protection"] = report(found)
            self.told.append(("protected", describe(found)))
        if settings.anchor:
            every = settings.anchor_every
            ids, starts = [text.ids for text in texts], [text.starts for text in texts]
            self.anchor = Anchor(ids, settings.anchor, settings.anchor_batch, every, starts)
            each = f"{settings.anchor:g} x KL(base || tuned) on {settings.anchor_batch}"
            when = "every step" if every == 1 else f"every {every}th step"
            self.told.append(("anchor", f"{when} adds {each} of {len(texts)} texts"))

    def apply_to(self, cfg, model) -> None:
        """Set the LoRA keys that Axolotl reads when it builds the adapter."""
        from ..implanting.adapter import lora_settings
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
        from ..implanting.adapter import install, trainable_share
        from ..model.fingerprint import fingerprint
        from ..model.loading import is_loaded
        from ..protecting.reading import protect_inputs

        fresh = not cfg.lora_model_dir
        install(model, self.selection, self.config.rank, fresh)
        if self.directions:
            protect_inputs(model, self.directions, fresh, checked=True)
        # The base was read when its rows were chosen, and is read again after the training.
        with ranks.together():
            mine = fingerprint(model, unchanged=True) if is_loaded(model) else {}
        self.base = ranks.broadcast(mine) if is_fsdp2(cfg) else mine
        trainable, base = trainable_share(model)
        self.facts.update(trainable_parameters=trainable, base_parameters=base)
        told = about_training(self.selection, self.config.rank, trainable, base)
        LOG.info(block("training", told))

    def prepare_trainer(self, cfg, trainer) -> None:
        from ..implanting.recording import record
        from ..implanting.training import prepare_trainer, save_whole_checkpoints
        from ..protecting.reading import DirectionsBesideCheckpoints
        from .preference import model_of

        if cfg.rl:
            self.install(cfg, model_of(trainer))
        prepare_trainer(trainer, self.selection, self.config.lr_scale, _resumed_checkpoint(cfg))
        if is_fsdp2(cfg):
            save_whole_checkpoints(trainer)
        if self.directions:
            trainer.add_callback(DirectionsBesideCheckpoints(self.directions))
        if self.anchor:
            self.anchor.attach(trainer)
        anchor = self.anchor
        record(trainer, sum(self.selection.counts), lambda: anchor.last if anchor else None)
        self.trainer = weakref.ref(trainer)

    def finish(self, cfg, model) -> None:
        """Axolotl's last hook, which fires before it saves and once more after it has saved.

        Before: look at the model, and raise nothing, for the adapter is not yet on disk. After:
        read the adapter back. Each time the verdict goes into `loki_report.json` and, where there
        is a fault, into `LOKI_FAILED.txt` beside the adapter.

        Raises:
            RuntimeError: after the save, all faults that were found.
        """
        folder = Path(cfg.output_dir)
        if not self.trained:
            self.trained = True
            self.verdict.what["saved"] = "not yet"
            self.verdict.left_out.add("saved")
            self._look_at(model)
            try:
                self._publish(folder)
            except OSError as error:  # raised later: what was trained must be saved first
                LOG.exception("loki: the report cannot be written")
                self.verdict.faults.append(f"the report cannot be written ({error})")
            return
        if ranks.is_first():
            self._read_back(folder, model)
            self._publish(folder)
            self._measure_forgetting(model)
            self._publish(folder)
            self._show(folder)
        self._publish(folder)
        if ranks.is_first() and self.config.report:
            from ..picturing.card import write_adapter_card

            write_adapter_card(folder)  # Axolotl has written its own by now
        if self.verdict.faults:
            raise RuntimeError(
                f"the adapter was saved to '{folder}', but do not use it:"
                f" {'; '.join(self.verdict.faults)}"
            )
        if ranks.is_first():
            title = "verified" if self.verdict.verified else "saved; not all of it was compared"
            config = str(cfg.axolotl_config_path or "CONFIG")
            LOG.info(block(title, about_end(self.verdict.what, self.forgotten, folder, config)))

    def _look_at(self, model) -> None:
        """The trained model in memory, on every rank; faults of any rank are everybody's."""
        try:
            mine = self._faults_in_memory(model)
        except Exception as error:  # raised later: what was trained must be saved first
            LOG.exception("loki: checking the trained model failed")
            mine = [f"the check itself failed ({error!r})"]
        for rank, found in enumerate(ranks.gather(mine)):
            for fault in found:
                if fault not in self.verdict.faults:
                    self.verdict.faults.append(fault if not rank else f"rank {rank}: {fault}")

    def _faults_in_memory(self, model) -> list[str]:
        from ..implanting.adapter import check
        from ..model.fingerprint import fingerprint
        from ..model.loading import can_be_gathered

        what, faults = self.verdict.what, []
        try:
            check(model, finite=True)
            others = len(self.selection.linears)
            trains = "every lora_B is confined to its rows, nothing else trains, no NaN"
            if others:
                trains = f"the rows and {others} further linears train, nothing else; no NaN"
            what["adapter"] = trains
        except RuntimeError as error:
            what["adapter"] = "checked, with a fault"
            faults.append(str(error))
        if self.anchor and self.anchor.last is not None:
            self.facts["anchor_kl_last_step"] = float(self.anchor.last)
        if not can_be_gathered(model):
            what["base"] = "not checksummed: sharded"
            self.verdict.left_out.add("base")
            return faults
        after = fingerprint(model)
        # Training cannot reach packed weights, but evaluation repacks them on some CPUs.
        exact = self.base["quantisation"].startswith("none")
        what["base"] = "every byte" if exact else QUANTISED
        if any(after[k] != self.base[k] for k in ("identity", "weights")[: 1 + exact]):
            faults.append(
                "weights of the base model have changed during training; the adapter belongs"
                " to a base that no longer exists"
            )
        return faults

    def _read_back(self, folder: Path, model) -> None:
        """The adapter on disk."""
        from safetensors import SafetensorError

        from ..implanting.saved import WEIGHTS, check_saved, check_saved_protection
        from ..model.anatomy import find_anatomy

        what = self.verdict.what
        if not (folder / WEIGHTS).is_file():
            what["saved"] = f"not read back: '{folder}' has no {WEIGHTS}"
            self.verdict.left_out.add("saved")
            return
        self.verdict.left_out.discard("saved")
        what["saved"] = "read back, with a fault"
        try:
            names = find_anatomy(model).names
            grown = model.get_input_embeddings().num_embeddings > self.tokens
            check_saved(folder, names, self.selection, self.config.rank, grown)
            if self.directions:
                leakage = check_saved_protection(folder, names, self.directions)
                self.facts["protection"]["leakage_per_layer"] = leakage
                what["protection"] = "ΔW·U of every linear of the saved adapter"
            others = len(self.selection.linears)
            every = f"every layer, B against {FILE_NAME}" + (
                f", {others} further linears" if others else ""
            )
            what["saved"] = f"{WEIGHTS}: {every}, no NaN"
        except (ValueError, OSError, SafetensorError) as error:
            self.verdict.faults.append(str(error))

    def _measure_forgetting(self, model) -> None:
        """How much did the run forget? On the calibration prompts, which take a minute."""
        from ..evaluating.forgetting import of_an_adapter
        from ..model.loading import is_sharded

        if not self.measured or is_sharded(model):
            why = "the model is sharded" if self.measured else "no calibration was read"
            self.facts["forgetting"] = {"not_measured": why}
            self.forgotten = f"not measured: {why}"
            return
        started = time.perf_counter()
        try:
            found = of_an_adapter(model, self.measured)
        except (RuntimeError, TypeError) as error:  # no memory, a family without `logits_to_keep`
            LOG.warning("loki: how much was forgotten could not be measured: %s", error)
            self.facts["forgetting"] = {"not_measured": str(error)}
            self.forgotten = f"not measured: {error}"
            return
        self.facts["forgetting"] = found.to_json() | {
            "calibration": self.config.calibration.source,
            "seconds": round(time.perf_counter() - started, 3),
        }
        self.forgotten = f"{found.text()}, of the calibration"

    def _show(self, folder: Path) -> None:
        """The page, from what was published."""
        from ..analysing.scores.cache import cache_folder
        from ..picturing.after import show

        if self.config.report:
            trainer = self.trainer() if self.trainer else None
            cache = cache_folder(self.config.cache_dir)
            self.facts["page"] = show(folder, self.selection, cache, trainer)

    def _publish(self, folder: Path) -> None:
        if not ranks.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        mark(folder, self.verdict)
        if self.config.report:
            write_report(folder, self.config, self.selection, self.facts, self.verdict)


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
