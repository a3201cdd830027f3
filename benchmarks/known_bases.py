"""Which family a base of the hub is of, by its id: where its own configuration cannot be read.

The first pattern that is found in the id counts, upper and lower case alike. A family is a model
type of transformers; what makes a base another structure than the family's default stands beside
it, as fields of its configuration.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.standins import EXPERTS, INNER, published, shrink

_MOE = {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2}
_GRANITE = {"shared_intermediate_size": INNER, "num_local_experts": EXPERTS}
# pattern, model type, model type of the text in it, changes to the (text) configuration
KNOWN: tuple[tuple[str, str, str | None, dict[str, Any]], ...] = (
    (r"gemma-4-26b-a4b", "gemma4", None, _MOE | {"moe_intermediate_size": INNER}),
    (r"gemma-4-(12b|e2b|31b)", "gemma4", None, {}),
    (r"gemma-3n", "gemma3n", None, {}),
    (r"gemma-3-(1b|270m)", "gemma3_text", None, {}),
    (r"gemma-3-", "gemma3", None, {}),
    (r"gemma-2-", "gemma2", None, {}),
    (r"gemma-7b", "gemma", None, {}),
    (r"llama-4-", "llama4", None, {}),
    (r"llama-3\.2-11b-vision", "mllama", None, {}),
    (r"llava-1\.5", "llava", "llama", {}),
    (r"pixtral", "llava", "mistral", {}),
    (r"internvl", "internvl", "qwen3", {}),
    (r"smolvlm", "smolvlm", "llama", {}),
    (r"paddleocr", "paddleocr_vl", None, {}),
    (r"voxtral", "voxtral", "llama", {}),
    (r"glm-4\.6v", "glm46v", None, {}),
    (r"lfm2-vl", "lfm2_vl", None, {}),
    (r"lfm2-8b-a1b", "lfm2_moe", None, {}),
    (r"lfm2", "lfm2", None, {}),
    (r"qwen2-vl", "qwen2_vl", None, {}),
    (r"qwen2\.5-vl", "qwen2_5_vl", None, {}),
    (r"qwen3\.5-\d+b-a\d", "qwen3_5_moe", None, {}),
    (r"qwen3\.5", "qwen3_5", None, {}),
    (r"qwen3-next", "qwen3_next", None, {}),
    (r"qwen3-30b-a3b", "qwen3_moe", None, {}),
    (r"qwen1\.5-moe", "qwen2_moe", None, {}),
    (r"qwen3|plano", "qwen3", None, {}),
    (r"qwen2|deepcoder|cogito.*qwen", "qwen2", None, {}),
    (r"mixtral", "mixtral", None, {}),
    (r"mistral-small-4", "mistral3", "mistral4", {}),
    (r"mistral-medium-3\.5|ministral-3-|magistral-small-2509", "mistral3", "ministral3", {}),
    (r"mistral-small-3\.1", "mistral3", "mistral", {}),
    (r"mistral-|ministral-8b|magistral|devstral", "mistral", None, {}),
    (r"gpt-oss", "gpt_oss", None, {}),
    (r"glm-4\.7-flash", "glm4_moe_lite", None, {}),
    (r"glm-4\.5-air", "glm4_moe", None, {}),
    (r"glm-5", "glm_moe_dsa", None, {}),
    (r"glm-4-", "glm4", None, {}),
    (r"deepseek-v4", "deepseek_v4", None, {}),
    (r"deepseek-v2", "deepseek_v2", None, {}),
    (r"minimax-m2", "minimax_m2", None, {}),
    (r"trinity", "afmoe", None, {}),
    (r"afm-4", "arcee", None, {}),
    (r"nemotron-3-", "nemotron_h", None, {}),
    (r"nemotron", "nemotron", None, {}),
    (r"granite-4", "granitemoehybrid", None, _GRANITE),
    (r"falcon-h1", "falcon_h1", None, {}),
    (r"falcon-e", "bitnet", None, {}),
    (r"falcon-7b", "falcon", None, {}),
    (r"jamba", "jamba", None, {}),
    (r"hunyuan", "hunyuan_v1_dense", None, {}),
    (r"apertus", "apertus", None, {}),
    (r"seed-oss", "seed_oss", None, {}),
    (r"olmo-3", "olmo3", None, {}),
    (r"command-r7b", "cohere2", None, {}),
    (r"phi-3", "phi3", None, {}),
    (r"phi-[12]", "phi", None, {}),
    (r"stablelm", "stablelm", None, {}),
    (r"starcoder2", "starcoder2", None, {}),
    (r"gpt-j", "gptj", None, {}),
    (r"pythia|redpajama", "gpt_neox", None, {}),
    (r"cerebras-gpt", "gpt2", None, {}),
    (r"mpt-7b", "mpt", None, {}),
    (r"smollm2|orpheus|tinyllama|open_llama|codellama|yi-34b|xgen|llama", "llama", None, {}),
)
# How a base is stored, by its id.
_STORED = {
    r"gptq": "gptq",
    r"nvfp4": "modelopt",
    r"gpt-oss(?!.*dequantized)": "mxfp4",
    r"bnb-nf4": "bitsandbytes",
    r"prequantized": "bitnet",
}


def known(base: str) -> tuple[Any, str | None] | None:
    """A small configuration of the family of a base, and how the base is quantised.

    None where no pattern is found in its id: own code of the checkpoint, say.
    """
    for pattern, family, text, changes in KNOWN:
        if re.search(pattern, base, re.IGNORECASE):
            small = shrink(published(family, text))
            inner = small.get_text_config()
            for name, value in changes.items():
                setattr(inner, name, value)
            stored = [m for p, m in _STORED.items() if re.search(p, base, re.IGNORECASE)]
            return small, stored[0] if stored else None
    return None
