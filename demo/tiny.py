"""`python -m demo.tiny FOLDER`: a Llama of random weights, made in seconds, to try an installation.

It knows nothing; `python -m demo --toy` trains one that does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from . import base, corpus


def make(folder: Path) -> None:
    """Write a model of 3 layers x 64 rows and its tokenizer to `folder`."""
    torch.manual_seed(0)
    tokenizer = base.make_tokenizer([*corpus.paragraphs(), base.prompt("")])
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    folder = parser.parse_args().folder
    make(folder)
    print(f"a model of random weights stands in {folder}")


if __name__ == "__main__":
    main()
