"""`loki write`: texts that a model writes by itself."""

from __future__ import annotations

from pathlib import Path

import click

from ..choices import TEXT_BATCH, TEXT_COUNT, TEXT_KINDS, TEXT_TOKENS
from .shared import Answer, Command, make_room


@click.command(
    "write",
    cls=Command,
    example="loki write Qwen/Qwen2.5-0.5B-Instruct --output own.jsonl\n"
    "loki write ./base --output replay.jsonl --kind dialogues --tokens 1024",
)
@click.argument("model")
@click.option("--output", required=True, type=click.Path(dir_okay=False), help="a .jsonl file")
@click.option("--kind", default="both", show_default=True, type=click.Choice(TEXT_KINDS))
@click.option(
    "--count",
    default=TEXT_COUNT,
    show_default=True,
    type=click.IntRange(min=1),
    help="dialogues and texts together",
)
@click.option(
    "--tokens",
    default=TEXT_TOKENS,
    show_default=True,
    type=click.IntRange(min=1),
    help="at most so many in a text, in a user's words, and in an answer",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--batch-size",
    default=TEXT_BATCH,
    show_default=True,
    type=click.IntRange(min=1),
    help="how many are written at once; halved where memory runs out",
)
@click.option("--device", help="default: the GPU where there is one")
@click.option("--dtype", default="auto", show_default=True)
def write_command(model, output, kind, count, tokens, seed, batch_size, device, dtype):
    """Let MODEL write dialogues and plain text, like what it has learned from; no data is needed.

    MODEL is a folder or a hub id. The file is for `protect.text` (where `self` does the same inside
    a run, with the run's own quantised base), for `calibration.source`, or, of `--kind dialogues`,
    an Axolotl data set of `type: chat_template` that replays what the model knew: there dialogues
    that are not finished within --tokens are left out.
    """
    from transformers import AutoTokenizer

    from ..evaluating.forgetting import load_model
    from ..model.writing import write_text
    from ..protecting.own_text import lines, write_texts

    file = Path(output)
    if file.suffix != ".jsonl":
        raise ValueError(f"--output '{file}' must be a .jsonl file")
    make_room(output)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = load_model(model, None, device, dtype)
    learned = kind == "dialogues"
    found = write_texts(loaded, tokenizer, count, tokens, kind, seed, batch_size, finished=learned)
    write_text(file, lines(found))
    dialogues = sum("messages" in row for row in found)
    told = f"{dialogues} dialogues and {len(found) - dialogues} texts in {file}"
    return Answer(
        told, {"file": str(file), "dialogues": dialogues, "texts": len(found) - dialogues}
    )
