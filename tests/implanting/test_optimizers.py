"""What an optimizer must hold, what a schedule-free one leaves, what goes to a hub on the way."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.families import tiny
from transformers import Trainer, TrainingArguments

from loki_plugin import RowSelection, implant
from loki_plugin.implanting.saved import FAILED_NAME, REPORT_NAME, WEIGHTS
from loki_plugin.implanting.training import prepare_trainer

ROWS = RowSelection([[1, 2, 3]] * 3, 48)


def prepared(folder, kind=Trainer, rank=None, **more) -> Trainer:
    """A trainer of 4 steps that the constraint guards."""
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]] * 4, "labels": [[1, 2, 3]] * 8})
    arguments = TrainingArguments(
        str(folder), max_steps=4, learning_rate=0.02, use_cpu=True, report_to=[], **more
    )
    model = implant(tiny("llama"), ROWS, rank)
    trainer = kind(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    prepare_trainer(trainer, ROWS, 1.0, None)
    return trainer


def test_an_optimizer_that_holds_others_than_those_that_train_is_refused(tmp_path):
    """As q_galore is built of a base that is wrapped later: the adapter would stay at zero."""

    class OfTheBase(Trainer):
        def create_optimizer(self, model=None):
            others = [p for n, p in self.model.named_parameters() if "layers.1.mlp.down" not in n]
            self.optimizer = torch.optim.SGD(others, lr=0.1)
            return self.optimizer

    said = r"SGD holds 2 of the 3 parameters that train; .*layers\.1\..*would stay as it is"
    with pytest.raises(RuntimeError, match=said):
        prepared(tmp_path, OfTheBase).train()


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_a_schedule_free_run_saves_the_average_whether_its_last_step_was_evaluated_or_not(
    tmp_path, best
):
    pytest.importorskip("schedulefree")
    often = {"eval_strategy": "steps", "save_strategy": "steps" if best else "no"}
    often |= {"load_best_model_at_end": best, "metric_for_best_model": "eval_loss"}
    found = []
    for every in (2, 3):  # of 4 steps; the best of the second run is the third
        more = often | {"eval_steps": every, "save_steps": every} if every == 2 or best else {}
        torch.manual_seed(0)
        trainer = prepared(tmp_path / str(every), optim="schedule_free_adamw", **more)
        trainer.train()
        state = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        found.append({n: p for n, p in state.items() if "lora_" in n})
        if best:
            loss = trainer.evaluate()["eval_loss"]  # after it as before: what was loaded
            assert loss == pytest.approx(trainer.state.best_metric, rel=1e-6)
    if not best:  # the last step's own weights are some percent off; batches come in other orders
        for name, parameter in found[0].items():
            torch.testing.assert_close(parameter, found[1][name], rtol=1e-4, atol=1e-6)


def test_what_goes_to_a_hub_on_the_way_has_its_own_rows_and_no_report_of_another_run(
    tmp_path, monkeypatch
):
    implant(tiny("llama"), [[7]] * 3).save_pretrained(tmp_path)
    (tmp_path / REPORT_NAME).write_text('{"verified": true}')
    trainer = prepared(tmp_path, hub_strategy="every_save", hub_always_push=True)
    assert (tmp_path / FAILED_NAME).is_file() and not (tmp_path / REPORT_NAME).exists()
    sent = []

    class Hub:
        def upload_folder(self, folder_path, **_):
            sent.append({p.name for p in tmp_path.iterdir()})

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer.model.save_pretrained(tmp_path / "checkpoint-2")
    trainer.push_in_progress = None
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert sent and FAILED_NAME not in sent[0]
    assert RowSelection.load(tmp_path / "loki_rows.json") == ROWS
    own, there = ((tmp_path / n / WEIGHTS).read_bytes() for n in ("checkpoint-2", "."))
    assert own == there
