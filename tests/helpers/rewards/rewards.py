"""What a GRPO run needs: questions, and a reward that differs from answer to answer.

Axolotl takes these from a module of no package, so this folder is put on the path.
"""


def questions(cfg, **kwargs):
    def transform(example, tokenizer=None):
        return {"prompt": [{"role": "user", "content": example["prompt"]}]}

    return transform, {"remove_columns": ["chosen", "rejected"]}


def even_letters(completions, **kwargs) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 7) for text in texts]
