"""Tiny models for images and text, with processors that Axolotl loads and that read images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.standins import published, shrink
from helpers.quantised import widened
from helpers.tokenizers import SPECIAL, make_tokenizer
from loki_plugin.model.building import kinds

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")


def save_llava(folder: Path) -> None:
    """Its tower is deeper than its decoder."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    config = shrink(published("llava"))
    config.vision_config.num_hidden_layers = 6
    tokenizer = make_tokenizer(folder, _CHATML.replace("IMAGE", "<image>"), ["<image>", *SPECIAL])
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    _save(folder, config, tokenizer, processor)


def save_gemma3(folder: Path) -> None:
    """The tokens of an image see each other; widths that NF4's blocks divide."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    config = widened(shrink(published("gemma3")))
    make_tokenizer(folder, _CHATML.replace("IMAGE", _GEMMA[0]), [*_GEMMA, *SPECIAL])
    names = ("boi_token", "image_token", "eoi_token")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder, extra_special_tokens=dict(zip(names, _GEMMA, strict=True))
    )
    for name, token in zip(names, _GEMMA, strict=True):
        setattr(config, f"{name}_index", tokenizer.convert_tokens_to_ids(token))
    config.mm_tokens_per_image = 4
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    template = {"chat_template": tokenizer.chat_template}
    _save(
        folder,
        config,
        tokenizer,
        Gemma3Processor(images, tokenizer, image_seq_length=4, **template),
    )


def _save(folder: Path, config, tokenizer, processor) -> None:
    save_model(folder, config, tokenizer)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, config, tokenizer) -> None:
    """The model of a small configuration, whose vocabulary is the tokenizer's."""
    config.get_text_config().vocab_size = len(tokenizer) + 4
    for each in (config, config.get_text_config()):
        each.bos_token_id, each.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        each.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = kinds(config)[0].loader.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # Gemma 3's way from images to text
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)


def asked_of(image: Path, text: str) -> list[dict]:
    """The messages of a question about an image, as Axolotl and processors read them."""
    parts = [{"type": "image", "path": str(image)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def image_data(folder: Path, count: int = 16) -> Path:
    """A data set of questions about plain images of different colours."""
    from PIL import Image

    file = folder / "images.jsonl"
    with file.open("w") as stream:
        for i in range(count):
            image = folder / f"{i}.png"
            Image.new("RGB", (40, 30), (i * 16, 100, 255 - i * 16)).save(image)
            said = {"role": "assistant", "content": [{"type": "text", "text": f"number {i}"}]}
            messages = [*asked_of(image, f"say {i}"), said]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return file
