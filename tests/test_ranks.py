"""Several ranks: what they tell each other, and that none waits for one that has failed."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.families import tiny
from helpers.runs import model
from helpers.tokenizers import make_tokenizer
from helpers.torchrun import two_ranks

from loki_plugin import ranks
from loki_plugin.model.loading import is_loaded, is_sharded

SCRIPT = """
import logging, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from helpers.runs import configure
from loki_plugin.analysing import pace
from loki_plugin.host.sharding import check_loaded
from loki_plugin.model.loading import is_loaded
from loki_plugin.pipeline import choose_rows
base, good, bad, out = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
model = AutoModelForCausalLM.from_pretrained(base)
if rank and "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ:  # as transformers 5.17 leaves it
    for parameter in model.parameters():
        parameter.data.zero_()
pace.LIMIT = pace.ENOUGH = 0.0
said = [f"zeros: {not model.model.embed_tokens.weight.any()}", f"loaded: {is_loaded(model)}"]
try:
    check_loaded(model)
except (ValueError, RuntimeError) as error:
    said.append(f"check: {error}")
tokenizer = AutoTokenizer.from_pretrained(base)
probe = logging.Handler(logging.WARNING)
probe.emit = lambda record: said.append(record.getMessage())
logging.getLogger("loki_plugin").addHandler(probe)
choose_rows(model, tokenizer, configure(good, f"{out}/{rank}")).save(f"{out}/rows-{rank}.json")
try:
    choose_rows(model, tokenizer, configure(good if rank else bad, f"{out}/{rank}"))
except (ValueError, RuntimeError) as error:
    said.append(f"fault: {type(error).__name__}: {error}")
Path(f"{out}/said-{rank}").write_text("\\n".join(said))
"""


def test_one_process_needs_no_exchange():
    assert ranks.gather(3) == [3] and ranks.broadcast("x") == "x"
    with ranks.together():
        pass
    with pytest.raises(KeyError), ranks.together():
        raise KeyError("mine")


def test_what_counts_as_loaded():
    llama = tiny("llama")
    assert is_loaded(llama) and not is_sharded(llama)
    meta = tiny("llama").to("meta")
    assert not is_loaded(meta) and is_sharded(meta)
    with torch.no_grad():
        llama.model.embed_tokens.weight.zero_()
    assert not is_loaded(llama)


@pytest.fixture
def files(tmp_path):
    model().save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(6)))
    bad.write_text("{\n")
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    return script, tmp_path / "base", good, bad, tmp_path


@pytest.mark.slow
def test_a_rank_of_zeros_takes_the_rows_of_the_rank_with_weights(files, tmp_path):
    """Up to 5.17 transformers fills the other ranks with zeros on the CPU; they analysed those.

    From 5.24 on every rank holds the weights; the script makes the zeros there itself.
    """
    two_ranks(*files, ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    first, second = ((tmp_path / f"said-{r}").read_text().splitlines() for r in range(2))
    assert first[:2] == ["zeros: False", "loaded: True"]
    assert second[:2] == ["zeros: True", "loaded: False"]
    assert second[2].startswith("check: rank 1 holds none of the base's weights")
    assert first[2].startswith("check: rank 1 ended with ValueError: rank 1 holds none")
    told = [s for s in first if "the run is sharded, so one rank analyses on the CPU" in s]
    assert len(told) >= 1 and "`loki analyse CONFIG`" in told[0]
    assert not any("sharded" in s for s in second)
    rows = [(tmp_path / f"rows-{r}.json").read_bytes() for r in range(2)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_an_error_on_one_rank_ends_both_with_its_message(files, tmp_path):
    two_ranks(*files)
    first, second = ((tmp_path / f"said-{r}").read_text().splitlines() for r in range(2))
    assert first[1] == second[1] == "loaded: True"
    assert "fault: ValueError" in first[2] and "bad.jsonl:1: not JSON" in first[2]
    assert "fault: RuntimeError: rank 0 ended with ValueError" in second[2]
    assert "bad.jsonl:1: not JSON" in second[2]
