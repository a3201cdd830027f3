"""What a run proves after training: the adapter, the base, the files; and what was forgotten."""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

from .. import ranks
from ..reporting import Verdict, mark, write_report
from ..rows import FILE_NAME
from .files import config_file
from .run import Run
from .telling import about_end, block

LOG = logging.getLogger("loki_plugin")
QUANTISED = "embeddings, norms and biases (quantised weights may be repacked)"


@dataclass
class Proof:
    """The checks of one run, and where their outcome is written."""

    run: Run
    verdict: Verdict = field(default_factory=Verdict)
    forgotten: str = ""  # in words, for the last block
    trained: bool = False  # whether the hook after the training has fired

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
            self._look_back()
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
        if ranks.is_first() and self.run.config.report:
            from ..picturing.card import write_adapter_card

            write_adapter_card(folder)  # Axolotl has written its own by now
        if self.verdict.faults:
            raise RuntimeError(
                f"the adapter was saved to '{folder}', but do not use it:"
                f" {'; '.join(self.verdict.faults)}"
            )
        if ranks.is_first():
            title = "verified" if self.verdict.verified else "saved; not all of it was compared"
            config = shlex.quote(config_file(cfg) or "CONFIG")
            watch = self.run.watch
            stopped = watch.told() if watch and watch.stopped else ""
            told = about_end(self.verdict.what, self.forgotten, folder, config, stopped)
            LOG.info(block(title, told))

    def _look_back(self) -> None:
        """What the evaluations found forgotten, while there still is a trainer."""
        run = self.run
        trainer = run.trainer() if run.trainer else None
        if run.watch and trainer:
            found = run.watch.report(trainer.state.log_history)
            if ranks.is_first():
                from ..evaluating.held_back import keep

                found["texts"] = keep(run.watch.prompts, run.watch.own, run.config)
            run.facts["forgetting_while_training"] = found

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
            others = len(self.run.selection.linears)
            trains = "every lora_B is confined to its rows, nothing else trains, no NaN"
            if others:
                trains = f"the rows and {others} further linears train, nothing else; no NaN"
            what["adapter"] = trains
        except RuntimeError as error:
            what["adapter"] = "checked, with a fault"
            faults.append(str(error))
        if self.run.anchor and self.run.anchor.last is not None:
            self.run.facts["anchor_kl_last_step"] = float(self.run.anchor.last)
        if not can_be_gathered(model):
            what["base"] = "not checksummed: sharded"
            self.verdict.left_out.add("base")
            return faults
        after = fingerprint(model)
        # Training cannot reach packed weights, but evaluation repacks them on some CPUs.
        exact = self.run.base["quantisation"].startswith("none")
        what["base"] = "every byte" if exact else QUANTISED
        if any(after[k] != self.run.base[k] for k in ("identity", "weights")[: 1 + exact]):
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
            grown = model.get_input_embeddings().num_embeddings > self.run.tokens
            check_saved(folder, names, self.run.selection, self.run.config.rank, grown)
            if self.run.directions:
                directions = self.run.directions
                leakage = check_saved_protection(folder, names, directions)
                leakage = leakage[: len(directions.held().basis)]  # those that stand still are last
                self.run.facts["protection"]["leakage_per_layer"] = leakage
                if leakage:
                    what["protection"] = "ΔW·U of every linear of the saved adapter that reads P x"
            others = len(self.run.selection.linears)
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

        if not self.run.measured or is_sharded(model):
            why = "no calibration was read" if self.run.config.report else "`report: false`"
            why = "the model is sharded" if self.run.measured else why
            self.run.facts["forgetting"] = {"not_measured": why}
            self.forgotten = f"not measured: {why}"
            return
        started = time.perf_counter()
        try:
            found = of_an_adapter(model, self.run.measured)
        except (RuntimeError, TypeError) as error:  # no memory, a family without `logits_to_keep`
            LOG.warning("loki: how much was forgotten could not be measured: %s", error)
            self.run.facts["forgetting"] = {"not_measured": str(error)}
            self.forgotten = f"not measured: {error}"
            return
        self.run.facts["forgetting"] = found.to_json() | {
            "calibration": self.run.config.calibration.source,
            "seconds": round(time.perf_counter() - started, 3),
        }
        self.forgotten = f"{found.text()}, of the calibration"

    def _show(self, folder: Path) -> None:
        """The page, from what was published."""
        from ..analysing.scores.cache import cache_folder
        from ..picturing.after import show

        if self.run.config.report:
            trainer = self.run.trainer() if self.run.trainer else None
            cache = cache_folder(self.run.config.cache_dir)
            self.run.facts["page"] = show(folder, self.run.selection, cache, trainer)

    def _publish(self, folder: Path) -> None:
        if not ranks.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        mark(folder, self.verdict)
        if self.run.config.report:
            write_report(folder, self.run.config, self.run.selection, self.run.facts, self.verdict)
