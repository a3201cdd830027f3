"""A model's own answers as a chat data set, to be mixed into a fine-tune that should not forget.

    python example_configs/self_replay.py Qwen/Qwen2.5-7B-Instruct self_replay.jsonl --load-in-4bit

The questions are the first turns of a data set of conversations (a hub name, or a .jsonl file with
`messages`); what other people answered there is not used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def questions(source: str, count: int, seed: int) -> list[str]:
    """`count` first turns of users, drawn from the data set."""
    given = {"path": "json", "data_files": source} if Path(source).is_file() else {"path": source}
    conversations = load_dataset(**given, split="train").shuffle(seed=seed)
    asked = []
    for messages in conversations["messages"]:
        first = next((m["content"] for m in messages if m["role"] == "user"), None)
        if first and len(asked) < count:
            asked.append(first)
    return asked


@torch.inference_mode()
def answers(model, tokenizer, asked: list[str], tokens: int) -> list[str | None]:
    """The model's answers, sampled as its own generation settings say; None: not ended in time."""
    chats = [[{"role": "user", "content": question}] for question in asked]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    written = model.generate(**batch, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
    written = written[:, batch["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    found = []
    for row in written.tolist():
        length = next((i for i, token in enumerate(row) if token in ends), None)
        text = None if length is None else tokenizer.decode(row[:length], skip_special_tokens=True)
        found.append(text and text.strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a hub name or a folder: the base of the fine-tune")
    parser.add_argument("output", type=Path, help="the .jsonl file to write")
    parser.add_argument("--questions", default="trl-lib/Capybara", help="data set of conversations")
    parser.add_argument("--count", type=int, default=1000, help="how many questions are asked")
    parser.add_argument("--tokens", type=int, default=1024, help="longest answer")
    parser.add_argument("--batch", type=int, default=16, help="questions at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the answers")
    parser.add_argument("--load-in-4bit", action="store_true", help="as in the YAML")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    nf4 = BitsAndBytesConfig(  # as Axolotl loads it
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype="auto",
        device_map="auto",
        quantization_config=nf4 if options.load_in_4bit else None,
    ).eval()
    asked = questions(options.questions, options.count, options.seed)
    kept = 0
    with options.output.open("w", encoding="utf-8") as file:
        for i in tqdm(range(0, len(asked), options.batch), desc="asking", unit="batch"):
            some = asked[i : i + options.batch]
            replies = answers(model, tokenizer, some, options.tokens)
            for question, answer in zip(some, replies, strict=True):
                if answer:  # one that was cut off would teach to stop in the middle
                    messages = [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                    kept += 1
    print(f"{kept} of {len(asked)} answers stand in {options.output}; the others were not finished")


if __name__ == "__main__":
    main()
