"""What may change, and what protects the rest: builders of models to train, and what they may know.

PEFT's own implementation wherever it has one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import LoraConfig, OSFConfig, ShiraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from benchmarks.forgetting import choosing
from benchmarks.forgetting.base import END, USER, Base, encode, padded
from benchmarks.forgetting.world import COVERED
from loki_plugin import attribute, implant, input_directions, select_rows
from loki_plugin.analysing.calibration.prompts import load_texts
from loki_plugin.analysing.calibration.sources import record_of
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting.eigen import leading, soften
from loki_plugin.protecting.installing import folded_delta
from loki_plugin.protecting.own_text import write_texts
from loki_plugin.protecting.reading import ProtectedA

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEARS = [*ATTENTION, *MLP]
Sequences = list[tuple[list[int], int]]
_TEXTS, _WRITTEN = (
    512,
    40,
)  # that the base writes by itself, and their tokens: what is asked is short


@dataclass
class Context:
    """What arms may know of the base: its calibration, and what follows from it.

    Attributes:
        seed: of what is drawn once: random rows, generated replay.
        draw: of what each run draws: how new weights start.
    """

    base: Base
    seed: int
    draw: int = 0

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The calibration prompts, without their answers."""
        coded = [encode(self.base.tokenizer, i) for i in self.base.world.calibration()]
        return [ids[:given] for ids, given in coded]

    @cached_property
    def text(self) -> list[list[int]]:
        """Plain text for protection; the base was trained on it, it is not what is measured."""
        return [self.base.tokenizer(p)["input_ids"][:128] for p in self.base.world.training_text()]

    @cached_property
    def scores(self) -> torch.Tensor:
        """[N, L, H]."""
        model = self.base.model()
        return attribute(model, *padded(self.prompts))

    def directions(
        self, energy: float, of: str = "prompts", soft: bool = False
    ) -> list[torch.Tensor]:
        """Of the calibration's `prompts`, or of others of `texts`."""
        key = (energy, of, soft)
        if key not in self._directions:
            self._directions[key] = input_directions(
                self.base.model(), *padded(self.texts(of)), energy=energy, soft=soft
            )
        return self._directions[key]

    def texts(self, of: str) -> list[list[int]]:
        """What protection may see: the `prompts`, of `people` alone, an `eighth`, with `text` or
        with what the base has `written`.
        """
        if of == "people":
            kinds = [i.kind for i in self.base.world.calibration()]
            return [p for p, k in zip(self.prompts, kinds, strict=True) if k == "people"]
        if of == "eighth":
            return self.prompts[::8]
        return self.prompts + ([] if of == "prompts" else getattr(self, of))

    @cached_property
    def _directions(self) -> dict:
        return {}

    def rows(self, quota: float, strategy: str, magnitude: bool = False) -> list[torch.Tensor]:
        if strategy == "smallest_weight":
            return choosing.smallest_weights(self, quota)
        return select_rows(self.scores, quota, strategy, magnitude=magnitude, seed=self.seed)

    @cached_property
    def pretraining(self) -> Sequences:
        """What the base learned from, for real replay."""
        world, tokenizer = self.base.world, self.base.tokenizer
        found = [encode(tokenizer, i) for k in COVERED for i in world.items[k]]
        found += [(tokenizer(s + END)["input_ids"], 1) for s in world.sentences]
        return found + [(tokenizer(p + END)["input_ids"][:128], 1) for p in world.training_text()]

    @cached_property
    def generated(self) -> Sequences:
        """What the base says by itself, sampled behind a bare user mark: no data is needed."""
        tokenizer, model = self.base.tokenizer, self.base.model().eval()
        torch.manual_seed(self.seed)
        start = torch.tensor([tokenizer(USER)["input_ids"]] * 64)
        said = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=40
        ).tolist()
        end = tokenizer.convert_tokens_to_ids(END)
        # All that follows the mark is the model's own, so all of it is learned again.
        return [(ids[: ids.index(end) + 1] if end in ids else ids, 1) for ids in said]

    @cached_property
    def written(self) -> list[list[int]]:
        """What `protect.text: self` reads: dialogues and plain text that the base writes itself."""
        tokenizer = self.base.tokenizer
        said = write_texts(self.base.model(), tokenizer, _TEXTS, _WRITTEN, seed=self.seed)
        records = [record_of(row, f"text {i}") for i, row in enumerate(said)]
        return [list(ids) for ids in load_texts(tokenizer, records)]

    @cached_property
    def own(self) -> Sequences:
        """The same for replay (SA-SFT): all of it is learned again."""
        return [(ids, 1) for ids in self.written if len(ids) > 1]


def lora(targets=LINEARS, r: int = 16, **more) -> Callable:
    def build(model, context):
        torch.manual_seed(context.draw)
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=targets, **more))

    return build


def loki(
    quota: float = 30,
    strategy: str = "layer_balanced",
    rank: int | None = None,
    magnitude: bool = False,
    protect: float | None = None,
    of: str = "prompts",
    soft: bool = False,
) -> Callable:
    def build(model, context):
        torch.manual_seed(context.draw)
        directions = None if protect is None else context.directions(protect, of, soft)
        return implant(
            model, context.rows(quota, strategy, magnitude), rank=rank, protect=directions
        )

    return build


def rows_of(
    choose: Callable[[Context], list[torch.Tensor]],
    protect: float | None = None,
    soft: bool = False,
) -> Callable:
    """LoKI with rows that are chosen in another way."""

    def build(model, context):
        torch.manual_seed(context.draw)
        directions = None if protect is None else context.directions(protect, soft=soft)
        return implant(model, choose(context), protect=directions)

    return build


def lora_protected(energy: float = 0.99, soft: bool = False, of: str = "prompts") -> Callable:
    """LoRA r16 on all linears, each blind to its own inputs on the calibration prompts."""

    def build(model, context):
        wrapped = lora()(model, context)
        layers = {n: m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
        moments = dict.fromkeys(layers, 0)

        def watch(name):
            def hook(module, inputs):
                x = inputs[0].flatten(0, -2).double()
                moments[name] = moments[name] + x.T @ x

            return hook

        hooks = [m.register_forward_pre_hook(watch(n)) for n, m in layers.items()]
        with torch.no_grad():
            for prompt in context.texts(of):
                wrapped(input_ids=torch.tensor([prompt]), use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            found = leading(moments[name], energy)
            kept = (soften(found) if soft else found.vectors).float()
            module.lora_A["default"] = ProtectedA(module.lora_A["default"].weight, kept)
            module.get_delta_weight = functools.partial(folded_delta, module)
        return wrapped

    return build


def full(model, context):
    return model


def freeze_bottom(model, context):
    """The lower half of the layers and the embeddings stay."""
    model.requires_grad_(False)
    layers = find_anatomy(model).layers
    for layer in layers[len(layers) // 2 :]:
        layer.requires_grad_(True)
    return model


def corda(model, context):
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=LINEARS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )

    def run():
        with torch.no_grad():
            for prompt in [*context.prompts, *context.text]:
                model(input_ids=torch.tensor([prompt]))

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def kappatune(model, context):
    from peft.helpers import find_kappa_target_modules

    found = find_kappa_target_modules(copy.deepcopy(model), top_p=0.2, show_progress=False)
    return lora(found["target_modules"])(model, context)


def osf(model, context):
    return get_peft_model(model, OSFConfig(target_modules=LINEARS))


def shira(model, context):
    return get_peft_model(model, ShiraConfig(r=16, target_modules=LINEARS, random_seed=0))
