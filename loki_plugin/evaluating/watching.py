"""Forgetting while it trains: how far the tuned model is from its base, at every evaluation.

    eval_loki_kl    KL(base ‖ tuned), nats per token, over the whole vocabulary
    eval_loki_kept  share of prompts whose likeliest next token is still the base's

on a few texts that nothing trains on and nothing protects. They stand in the evaluation's metrics,
so that a trainer's own ways (trackers, best checkpoint, early stopping) have them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from .. import ranks
from ..analysing.attribution.devices import give_back, out_of_memory
from ..analysing.calibration.prompts import Text
from ..choices import WATCH_KEPT, WATCH_KL
from ..model.causal import looks_ahead
from ..model.loading import is_sharded
from ..model.quantised import evaluating
from ..protecting.anchor import adapter_off
from .held_back import affordable, evaluations, row_length, within

LOG = logging.getLogger("loki_plugin")
_TOKENS = 1024  # of texts that run at once
_ROWS = 128  # of these, tokens whose probabilities stand in memory at once


@dataclass(frozen=True)
class Distance:
    """How far a tuned model is from its base; `kept` is None where no prompt was asked."""

    kl: float
    kept: float | None


def measure(
    model: nn.Module, prompts: Sequence[Text], own: Sequence[Text] = (), at_once: int = _TOKENS
) -> Distance:
    """The active adapter of `model` against the base, which is the same model with it off.

    KL(base ‖ tuned) = Σ_v p_base(v) · log(p_base(v) / p_tuned(v)), its mean over all tokens of all
    texts, in float32 or wider.

    Args:
        prompts: whose last token asks for something; they count for `kept`.
        own: other texts.
        at_once: tokens of texts that run at once; a longer text runs alone.
    """
    texts, total, kept = [*prompts, *own], 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in _batches(texts, at_once, looks_ahead(model)):
            with adapter_off(model):
                base = _logits(model, [texts[i] for i in batch])
            tuned = _logits(model, [texts[i] for i in batch])
            for n, i in enumerate(batch):
                length = len(texts[i].ids)
                total += _divergence(base[n, :length], tuned[n, :length])
                last = length - 1
                kept += i < len(prompts) and bool(base[n, last].argmax() == tuned[n, last].argmax())
    tokens = sum(len(text.ids) for text in texts)
    return Distance(total / tokens, kept / len(prompts) if prompts else None)


def _batches(texts: Sequence[Text], tokens: int, alike: bool) -> Iterator[list[int]]:
    """Indices of texts that run together, of neighbouring lengths, or of the same."""
    batch: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i].ids)):
        longer = batch and len(texts[i].ids) > len(texts[batch[0]].ids)
        if batch and ((len(batch) + 1) * len(texts[i].ids) > tokens or (alike and longer)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _logits(model: nn.Module, texts: Sequence[Text]) -> torch.Tensor:
    """[B, T, V] as the model gives them; padding stands on the right, where nothing looks."""
    device = model.get_input_embeddings().weight.device
    ids = nn.utils.rnn.pad_sequence([torch.tensor(t.ids) for t in texts], batch_first=True)
    return model(input_ids=ids.to(device), use_cache=False).logits


def _divergence(base: torch.Tensor, tuned: torch.Tensor) -> float:
    """Sum over tokens of the KL between logits [T, V]."""
    found = 0.0
    dtype = torch.promote_types(base.dtype, torch.float32)
    for p, q in zip(base.split(_ROWS), tuned.split(_ROWS), strict=True):
        p, q = p.to(dtype).log_softmax(-1), q.to(dtype).log_softmax(-1)
        found += float((p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0).sum())
    return found


class Watch(TrainerCallback):
    """Measures at every evaluation of a trainer, and stops the training where that is asked for.

    Attributes:
        prompts, own: texts that are held back; see `measure`.
        stop: nats at which the training stops, or None.
        needed: whether the run goes by the figures, so that it cannot do without them.
        row: tokens of a row of the data where rows are packed; None: as long as they are.
        cost: on how many texts it measured, and how long that took.
        stopped: where and why the training was stopped; None where it was not.
    """

    def __init__(
        self,
        prompts: Sequence[Text],
        own: Sequence[Text],
        stop: float | None = None,
        needed: bool = False,
        row: float | None = None,
    ):
        self.prompts, self.own = list(prompts), list(own)
        self.stop, self.needed, self.row = stop, needed, row
        self.cost: dict[str, Any] = {}
        self.stopped: dict[str, Any] | None = None
        self._off = False
        self._began = self._seconds = 0.0
        self._evaluations = 0

    def without(self, texts: Sequence[Text]) -> list[Text]:
        """Those of the texts that are not held back."""
        ours = {text.ids for text in self.prompts + self.own}
        return [text for text in texts if text.ids not in ours]

    def attach(self, trainer: Trainer) -> None:
        """Let the evaluations of `trainer` have the figures."""
        loop = trainer.evaluation_loop

        def evaluation_loop(*args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            output = loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            # Of several named data sets each evaluation has another prefix; ours is of none.
            if metric_key_prefix.startswith("eval") and not self._off:
                output.metrics.update(self._figures(trainer))
            return output

        self.row = self.row or row_length(trainer.train_dataset)
        trainer.evaluation_loop = evaluation_loop
        trainer.add_callback(self)

    def _figures(self, trainer: Trainer) -> dict[str, float]:
        started = time.perf_counter()
        # All ranks go by the first's, so that all stop together.
        every = ranks.gather(self._measured(trainer.model))
        self._seconds += time.perf_counter() - started
        self._evaluations += 1
        why = next((found for found in every if isinstance(found, str)), None)
        if why is not None:
            self._off = True
            if self.needed:
                raise RuntimeError(
                    f"what is forgotten cannot be measured ({why}), and this run stops or chooses"
                    " its checkpoint by it; take `loki.stop_forgetting` and"
                    " `metric_for_best_model` out, or, for memory, lower `micro_batch_size`"
                )
            LOG.warning("loki: what is forgotten is not measured while it trains: %s", why)
            return {}
        found = every[0]
        kept = {} if found.kept is None else {WATCH_KEPT: found.kept}
        return {WATCH_KL: found.kl, **kept}

    def _measured(self, model: nn.Module) -> Distance | str:
        """The figures, or why there are none: they must not cost a training that needs none."""
        why = ""
        for tokens in (_TOKENS, 1):
            try:
                return measure(model, self.prompts, self.own, tokens)
            except (RuntimeError, TypeError) as error:
                if is_sharded(model):  # whose ranks go together
                    raise
                why, again = str(error), out_of_memory(error)
            if not again:
                break
            give_back()
        return why

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep as many texts as the run can pay for: as many again where it is resumed."""
        self._began = time.perf_counter()
        paid = 0.0
        if self.row:
            tokens = self.row * args.per_device_train_batch_size * args.gradient_accumulation_steps
            paid = affordable(tokens * state.max_steps, evaluations(args, state))
        self.prompts, self.own = ranks.broadcast(within(self.prompts, self.own, paid))
        self.cost = {
            "prompts": len(self.prompts),
            "own_texts": len(self.own),
            "tokens": sum(len(t.ids) for t in self.prompts + self.own),
        }
        if ranks.is_first():
            LOG.info(
                "loki: each evaluation measures what is forgotten on %d prompts and %d texts of the"
                " model, %d tokens",
                *self.cost.values(),
            )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Stop where more is forgotten than was allowed."""
        kl = metrics.get(WATCH_KL)
        if self.stop is None or self.stopped or kl is None or kl <= self.stop:
            return
        control.should_training_stop, control.should_save = True, False
        args.save_strategy = SaveStrategy.NO  # what is over the threshold is no checkpoint
        under = ranks.broadcast(under_limit(self.stop, state.log_history, Path(args.output_dir)))
        saved = max(under, key=_step, default=None)
        best = args.load_best_model_at_end and state.best_model_checkpoint
        if best and _step(Path(best)) in map(_step, under):
            saved = Path(best)
        elif saved:  # the trainer itself loads its best checkpoint, and never drops it
            state.best_model_checkpoint, args.load_best_model_at_end = str(saved), True
        self.stopped = {
            "step": state.global_step,
            "kl": kl,
            "threshold": self.stop,
            "saved": saved and saved.name,
            "saved_kl": saved and _logged(state.log_history).get(_step(saved)),
        }
        if ranks.is_first():
            LOG.warning("loki: %s", self.told())

    def told(self) -> str:
        """That the run was stopped, in one sentence."""
        found = self.stopped or {}
        said = (
            f"stopped at step {found['step']}: {WATCH_KL} is {found['kl']:.4f} nats, more than"
            f" stop_forgetting: {found['threshold']:g}; "
        )
        if found["saved"]:
            return said + f"what is saved is {found['saved']}, with {found['saved_kl']:.4f}"
        return said + (
            "no checkpoint under it was kept, so what is saved is over it; set `save_steps` to a"
            " multiple of `eval_steps`"
        )

    def report(self, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What `loki_report.json` says: on what, at what cost, and every evaluation."""
        return {**self.cost, "path": path(history), "stopped": self.stopped}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What it has cost."""
        whole = time.perf_counter() - self._began
        share = 100 * self._seconds / max(whole, 1e-9)
        self.cost |= {
            "evaluations": self._evaluations,
            "seconds": round(self._seconds, 3),
            "percent_of_training": round(share, 2),
        }
        if ranks.is_first():
            LOG.info(
                "loki: measuring what is forgotten took %.1f s in %d evaluations, %.1f %% of the"
                " training",
                self._seconds,
                self._evaluations,
                share,
            )


def path(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Step, KL, share kept and loss of every evaluation that a trainer has logged; None for NaN.

    A run that resumes evaluates its checkpoint once more: the first time counts, which the
    checkpoint has too.
    """
    found: dict[int, dict[str, Any]] = {}
    for e in history:
        if WATCH_KL in e:
            one = {"step": e["step"], "kl": _finite(e[WATCH_KL]), "kept": e.get(WATCH_KEPT)}
            found.setdefault(e["step"], one | {"loss": _finite(e.get("eval_loss"))})
    return list(found.values())


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def under_limit(limit: float, history: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """The checkpoints in `folder` of steps at which an evaluation found at most `limit`.

    Each keeps what the trainer had logged, which tells those of this run from others' that lie
    there still.
    """
    found = []
    for step, kl in _logged(history).items():
        state = folder / f"checkpoint-{step}" / TRAINER_STATE_NAME
        if kl is not None and kl <= limit and state.is_file():
            theirs = json.loads(state.read_text(encoding="utf-8"))["log_history"]
            found += [state.parent] * (_logged(theirs).get(step) == kl)
    return found


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _logged(history: Sequence[dict[str, Any]]) -> dict[int, float | None]:
    return {e["step"]: e["kl"] for e in path(history)}
