"""The ways to train: what may change, and what protects the rest. PEFT's own where it has one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, ShiraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from benchmarks.forgetting.base import END, USER, Base, encode
from benchmarks.forgetting.world import COVERED
from loki_plugin import attribute, implant, input_directions, select_rows
from loki_plugin.implanting.protection import ProtectedA
from loki_plugin.model.anatomy import find_anatomy

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEARS = [*ATTENTION, *MLP]
Sequences = list[tuple[list[int], int]]


@dataclass
class Context:
    """What arms may know of the base: its calibration, and what follows from it."""

    base: Base
    seed: int

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

    def directions(self, energy: float, text: bool) -> list[torch.Tensor]:
        key = (energy, text)
        if key not in self._directions:
            ids = [*self.prompts, *(self.text if text else [])]
            self._directions[key] = input_directions(self.base.model(), *padded(ids), energy=energy)
        return self._directions[key]

    @cached_property
    def _directions(self) -> dict:
        return {}

    def rows(self, quota: float, strategy: str, magnitude: bool = False) -> list[torch.Tensor]:
        if strategy == "smallest_weight":
            norms = [d.weight.detach().norm(dim=1) for d in find_anatomy(self.base.model()).down]
            return [n.argsort()[: int(quota * len(n) / 100)].sort().values for n in norms]
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


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, real, prompt in zip(ids, mask, prompts, strict=True):
        row[: len(prompt)], real[: len(prompt)] = torch.tensor(prompt), 1
    return ids, mask


@dataclass
class Arm:
    """A way to train.

    Attributes:
        build: (base model, context) -> the model to train, whose trainable parameters train.
        rates: three learning rates, the middle one a good guess.
        decay: AdamW's weight decay.
        replay: (share of the sequences, which of the context's lists) mixed into the task.
        anchor: weight of KL(base || tuned) on calibration prompts in every step.
    """

    build: Callable[[Any, Context], Any]
    rates: tuple[float, float, float] = (1e-3, 3e-3, 1e-2)
    decay: float = 0.0
    replay: tuple[float, str] | None = None
    anchor: float = 0.0


def lora(targets=LINEARS, r: int = 16, **more) -> Callable:
    def build(model, context):
        torch.manual_seed(context.seed)
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=targets, **more))

    return build


def loki(
    quota: float = 30,
    strategy: str = "layer_balanced",
    rank: int | None = None,
    magnitude: bool = False,
    protect: float | None = None,
    text: bool = False,
) -> Callable:
    def build(model, context):
        torch.manual_seed(context.seed)
        directions = None if protect is None else context.directions(protect, text)
        return implant(
            model, context.rows(quota, strategy, magnitude), rank=rank, protect=directions
        )

    return build


def lora_protected(energy: float = 0.99) -> Callable:
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
            for prompt in context.prompts:
                wrapped(input_ids=torch.tensor([prompt]), use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            values, vectors = torch.linalg.eigh(moments[name])
            held = values.flip(0).cumsum(0) / values.sum()
            count = int((held < energy).sum()) + 1
            u = vectors.flip(1)[:, :count].float()
            module.lora_A["default"] = ProtectedA(module.lora_A["default"].weight, u)
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


LOW, HIGH = (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2)
# In the order in which the screening runs them.
ARMS: dict[str, Arm] = {
    "lora_all_r16": Arm(lora()),
    "loki_q30": Arm(loki(), HIGH),
    "loki_protect_q30": Arm(loki(protect=0.99), HIGH),
    "random_q30": Arm(loki(strategy="random"), HIGH),
    "full": Arm(full, LOW),
    "lora_all_r16_wd0.3": Arm(lora(), decay=0.3),
    "lora_attn": Arm(lora(ATTENTION)),
    "lora_gateup": Arm(lora(["gate_proj", "up_proj"])),
    "lora_mlp_r10": Arm(lora(MLP, 10)),
    "loki_magnitude_q30": Arm(loki(magnitude=True), HIGH),
    "random_protect_q30": Arm(loki(strategy="random", protect=0.99), HIGH),
    "loki_protect_text_q30": Arm(loki(protect=0.99, text=True), HIGH),
    "loki_anchor_q30": Arm(loki(), HIGH, anchor=1.0),
    "lora_anchor": Arm(lora(), anchor=1.0),
    "lora_protect": Arm(lora_protected()),
    "lora_replay1": Arm(lora(), replay=(0.01, "pretraining")),
    "lora_replay5": Arm(lora(), replay=(0.05, "pretraining")),
    "lora_selfreplay": Arm(lora(), replay=(0.05, "generated")),
    "loki_protect_anchor_q30": Arm(loki(protect=0.99), HIGH, anchor=1.0),
    "protect_q99": Arm(loki(quota=99, strategy="random", protect=0.99), HIGH),
    "loki_q10": Arm(loki(10), HIGH),
    "highest_q30": Arm(loki(strategy="layer_highest"), HIGH),
    "loki_lowrank": Arm(loki(rank=16), HIGH),
    "smallest_weight_q30": Arm(loki(strategy="smallest_weight"), HIGH),
    "lora_all_r16_wd0.1": Arm(lora(), decay=0.1),
    "dora": Arm(lora(use_dora=True)),
    "freeze_bottom": Arm(freeze_bottom, LOW),
    "pissa": Arm(lora(init_lora_weights="pissa"), LOW),
    "mica": Arm(lora(init_lora_weights="mica")),
    "corda": Arm(corda, LOW),
    "osf": Arm(osf, LOW),
    "shira": Arm(shira),
    "kappatune": Arm(kappatune),
    "loki_q20": Arm(loki(20), HIGH),
    "loki_q5": Arm(loki(5), HIGH),
    "random_q10": Arm(loki(10, "random"), HIGH),
    "highest_q10": Arm(loki(10, "layer_highest"), HIGH),
    "global_lowest_q30": Arm(loki(strategy="global_lowest"), HIGH),
    "global_highest_q30": Arm(loki(strategy="global_highest"), HIGH),
    "smallest_weight_q10": Arm(loki(10, "smallest_weight"), HIGH),
    "loki_protect90_q30": Arm(loki(protect=0.9), HIGH),
    "loki_protect_lowrank": Arm(loki(rank=16, protect=0.99), HIGH),
}


def passes(learned: Sequences, arm: Arm, context: Context, seed: int) -> Iterator[Sequences]:
    """What each pass over the task trains on: the task, and fresh replay where the arm has some."""
    draw = random.Random(f"replay/{seed}")
    while True:
        if arm.replay is None:
            yield learned
            continue
        share, which = arm.replay
        count = max(1, round(share / (1 - share) * len(learned)))
        pool = getattr(context, which)
        yield [*learned, *draw.choices(pool, k=count)]
