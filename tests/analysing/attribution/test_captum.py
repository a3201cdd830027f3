"""Parity with captum itself, for both paths."""

from __future__ import annotations

import pytest
import torch
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from helpers.families import tiny
from helpers.prompts import error, pad, prompts

from loki_plugin import attribute
from loki_plugin.model.anatomy import find_anatomy

METHODS = {
    "left": "riemann_left",
    "right": "riemann_right",
    "midpoint": "riemann_middle",
    "gauss-legendre": "gausslegendre",
}


@pytest.mark.parametrize("rule", METHODS)
def test_the_token_path_is_captums_integrated_gradients_of_p_in_z(rule):
    model = tiny("llama", dtype=torch.float64)
    ids = prompts()[0]
    down = find_anatomy(model).down
    y = int(model(input_ids=ids[None]).logits[0, -1].argmax())
    scores = attribute(model, ids[None], n_steps=6, rule=rule)[0]
    for layer, module in enumerate(down):
        seen = {}
        handle = module.register_forward_hook(lambda m, a, out, seen=seen: seen.update(z=out))
        model(input_ids=ids[None])
        handle.remove()

        def p_of(z, module=module):
            def replace(m, args, output):
                return torch.cat([output[:, :-1], z[:, None]], 1)

            handle = module.register_forward_hook(replace)
            logits = model(input_ids=ids.expand(len(z), -1)).logits[:, -1]
            handle.remove()
            return logits.softmax(-1)[:, y]

        z = seen["z"][:, -1].detach()
        theirs = IntegratedGradients(p_of).attribute(z, 0 * z, n_steps=6, method=METHODS[rule])
        # captum rounds its step weights to float32, and transformers its norms.
        assert error(scores[layer][None], theirs) <= 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "gpt_neox", "qwen2_moe"])
@pytest.mark.parametrize("rule", ["left", "gauss-legendre"])
def test_the_sequence_path_is_captums_layer_integrated_gradients(family, rule):
    model = tiny(family, dtype=torch.float64)
    ids = prompts()
    ours = attribute(model, *pad(ids, "left"), n_steps=5, rule=rule, path="sequence")
    for b, prompt in enumerate(ids):
        y = int(model(input_ids=prompt[None]).logits[0, -1].argmax())

        def p_of(x, y=y):
            return model(input_ids=x).logits[:, -1].softmax(-1)[:, y]

        for layer, module in enumerate(find_anatomy(model).down):
            theirs = LayerIntegratedGradients(p_of, module).attribute(
                prompt[None], 0 * prompt[None], n_steps=5, method=METHODS[rule]
            )
            theirs = theirs.view(len(prompt), -1)[-1:]
            assert error(ours[b, layer][None], theirs) <= 1e-6


def test_the_sequence_path_refuses_layers_that_share_keys():
    with pytest.raises(ValueError, match="Gemma4TextDecoderLayer hands keys on.*path: token"):
        attribute(tiny("gemma4"), prompts()[0][None], path="sequence")
