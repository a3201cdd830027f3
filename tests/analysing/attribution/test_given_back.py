"""What an analysis takes it gives back: attention settings, and memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.families import tiny

from loki_plugin.analysing import analysis
from loki_plugin.analysing.analysis import analyse
from loki_plugin.analysing.attribution import engine
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.model.anatomy import find_anatomy

PROMPTS = [Prompt((1, 2, 3, i)) for i in range(5)]
RULE = quadrature("left", 2)


def run(model):
    return analyse(model, find_anatomy(model), PROMPTS, RULE, batch_size=2)


def test_nothing_of_the_engine_outlives_an_analysis(monkeypatch):
    """Not even until a collection: its tensors are free for training when it returns."""
    kept = []

    def remembered(kind):
        def make(*args, **kwargs):
            made = kind(*args, **kwargs)
            kept.append(weakref.ref(made))
            return made

        return make

    for name in ("AttentionState", "Stack"):
        monkeypatch.setattr(engine, name, remembered(getattr(engine, name)))
    model = tiny("llama")
    gc.collect()
    gc.disable()
    try:
        before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
        scores = run(model)
        assert len(kept) >= 8 and not [ref() for ref in kept if ref() is not None]
        left = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
        assert {tuple(t.shape) for t in left if id(t) not in before} <= {tuple(scores.shape)}
    finally:
        gc.enable()


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_the_attention_setting_is_put_back(monkeypatch, attention, raises):
    model = tiny("llama")
    model.config._attn_implementation_internal = attention  # set as where flash-attn is installed
    monkeypatch.setattr(analysis, "check_reproduces", lambda *_: None)
    if raises:
        monkeypatch.setattr(engine, "head_gradient", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model)
    else:
        assert torch.isfinite(run(model)).all()
    assert model.config._attn_implementation == attention
    assert all(m.config._attn_implementation == attention for m in (model, model.model))


def test_flash_attention_without_a_gpu_is_told_as_what_it_is():
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    said = r"attends by 'flash_attention_2'.*`attn_implementation: sdpa`"
    with pytest.raises(ValueError, match=said):
        run(model)
    assert model.config._attn_implementation == "flash_attention_2"
