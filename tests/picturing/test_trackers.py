"""What becomes of the last figures where a tracker has ended, or fails."""

from __future__ import annotations

from types import SimpleNamespace

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from loki_plugin.picturing.trackers import track


def test_an_ended_tracker_gets_nothing_and_a_failing_one_costs_nothing(our_log):
    told = []

    class Notes(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append((type(self).__name__, logs))

    class MLflowCallback(Notes):
        pass

    class Fails(Notes):
        def on_log(self, *args, **kwargs):
            raise ConnectionError("the tracker has gone")

    every = [MLflowCallback(), Fails(), Notes()]
    handler = CallbackHandler(every, None, None, None, None)
    trainer = SimpleNamespace(
        callback_handler=handler, args=None, state=TrainerState(), control=TrainerControl()
    )
    track(trainer, [], {"forgetting": {"kl": 0.25}})
    assert told == [("Notes", {"loki/forgotten_kl": 0.25})]
    assert "Fails did not take the last figures: ConnectionError" in our_log.text
    assert [c for c in handler.callbacks if c in every] == every
