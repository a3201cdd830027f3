"""How long a text a model with learned positions can read."""

from __future__ import annotations

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.prompts import prompts
from transformers import AutoModelForCausalLM

from benchmarks.standins import published, shrink
from loki_plugin.model.positions import check_lengths, positions_of
from loki_plugin.protecting.finding import Wanted, find_directions


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_where_the_table_of_positions_ends_the_model_ends(family):
    model = tiny(family)
    most = positions_of(model)
    assert most == (64 if family in {"gpt2", "opt", "opt-post-norm"} else None)
    ids = torch.ones(1, 65, dtype=torch.long)
    model(ids[:, :-1])
    if most is None:
        model(ids)
        check_lengths(model, [[1] * 65])
    else:
        with pytest.raises(IndexError):
            model(ids)


@pytest.mark.parametrize("family", ["gptj", "codegen", "ctrl", "roformer", "roberta"])
def test_tables_of_other_kinds_end_too(family):
    with torch.device("meta"):
        small = AutoModelForCausalLM.from_config(shrink(published(family)))
    model = AutoModelForCausalLM.from_config(small.config).eval()
    most = positions_of(model)
    assert most is not None
    ids = torch.full((1, most + 1), 5)
    model(input_ids=ids[:, :-1])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


def test_longer_prompts_are_told_before_any_is_read():
    said = "1 of 2 calibration prompts .* has 64 positions; the longest has 65 tokens"
    with pytest.raises(ValueError, match=f"{said}.*`calibration: {{max_tokens: 64}}`"):
        find_directions(tiny("gpt2"), prompts(lengths=(5, 65)), Wanted(0.9))
