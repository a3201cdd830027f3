"""A lab with a tiny base, for all tests of the benchmark on real bases."""

from __future__ import annotations

import pytest
import torch
from helpers import real_data
from helpers.real_data import FACTS, NAME
from helpers.tokenizers import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.real import probes, tasks
from benchmarks.real.data import Data
from benchmarks.real.lab import Lab
from benchmarks.real.scoring import Asked, loss_of

AMOUNT = probes.Amount(
    facts=2, width=16, own=3, people=2, answer=8, choices=4, tested=6, every=60, written=4, tokens=8
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A lab with a tiny base that has learned a few facts, and data of our own."""
    root = tmp_path_factory.mktemp("real")
    tokenizer = make_tokenizer(root / "bases" / NAME)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    known = [tasks.cloze(tokenizer, *fact) for fact in FACTS]
    known += [Asked(tokenizer(f"Line {i} says {i}.")["input_ids"], 1) for i in range(20)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss_of(model, known).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "bases" / NAME)
    data = Data(real_data.write(root / "data", FACTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOKI_BASES", str(root / "bases"))
        patch.setitem(probes.AMOUNTS, "ci", AMOUNT)
        yield Lab(NAME, data, "ci")
