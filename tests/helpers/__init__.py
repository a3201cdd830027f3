"""What tests share: the slow truth, tiny models, tokenizers, prompts."""
