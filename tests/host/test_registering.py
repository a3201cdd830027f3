"""Registering: once or often, undone when the configuration is rejected."""

from __future__ import annotations

import copy
import json

import pytest
from helpers.axolotl import load, load_after

from loki_plugin.host import options, settings

FORMS = {
    "dense": {"adapter": "loki"},
    "dense without adapter": {"adapter": None},
    "rank 3": {"adapter": "loki", "loki": {"rank": 3}},
    "lora_r 3": {"adapter": "lora", "lora_r": 3, "lora_alpha": 16},
    "lora_r 3 on all": {"adapter": "lora", "lora_r": 3, "lora_target_linear": True},
    "dense, lora_r on some": {"adapter": "loki", "lora_r": 3, "lora_target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("four_bit", [False, True], ids=["16-bit", "4-bit"])
def test_registering_again_changes_nothing(form, four_bit):
    config = {"load_in_4bit": four_bit, **copy.deepcopy(FORMS[form])}
    if config["adapter"] == "lora" and four_bit:
        config["adapter"] = "qlora"
    settings.prepare(config)
    once = copy.deepcopy(config)
    assert once["adapter"] == ("qlora" if four_bit else "lora")
    assert once["loki"]["rank"] == (None if "dense" in form else 3)
    targets = {"lora_r 3 on all": "all", "dense, lora_r on some": ["q_proj"]}.get(form, "down")
    assert once["loki"]["targets"] == targets
    assert once["loki"].get("linear_rank") == (None if targets == "down" else 3)
    for _ in range(2):
        assert settings.prepare(config) == []
        assert config == once


@pytest.mark.parametrize("form", ["dense", "lora_r 3"])
def test_a_ray_worker_trains_what_its_driver_registered(run_config, monkeypatch, form):
    """Ray's workers get the validated configuration and register and validate it again."""
    from axolotl.cli import train

    seen = []
    monkeypatch.setattr(train, "do_train", lambda cfg, cli_args: seen.append(cfg))
    run_config["loki"]["quota"] = 12.5
    change = {"load_in_4bit": True, "use_ray": True, **FORMS[form]}
    driver = load(run_config | change | ({"adapter": "qlora"} if form != "dense" else {}))
    train.ray_train_func({"cfg": copy.deepcopy(driver.to_dict()), "cli_args": None})
    (worker,) = seen
    assert worker.loki.to_dict() == driver.loki.to_dict()
    assert worker.adapter == driver.adapter == "qlora"
    assert (worker.loki.rank, worker.loki.form) == ((None, "dense"), (3, "low-rank"))[
        form != "dense"
    ]


def test_a_form_that_contradicts_the_rank_is_refused(run_config):
    run_config["loki"] |= {"form": "dense", "rank": 4}
    with pytest.raises(ValueError, match="form is dense, but rank is 4; leave `form` out"):
        load(run_config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quota": 0.1}, "quota 0.1 % of .* rows is no row at all .* 10 is a tenth of the rows"),
        ({"quota": 20, "rank": 64}, "rank = 64, but .* rows train per layer"),
    ],
)
def test_a_number_of_rows_that_cannot_be_is_refused_before_loading(run_config, settings, message):
    run_config["loki"] = settings
    with pytest.raises(ValueError, match=message):
        load(run_config)


def test_a_rejected_configuration_is_left_as_it_was(run_config):
    """Axolotl tells its plugins when validation fails after they have registered."""
    run_config |= {"lora_dropout": 0.1, "merge_lora": True, "micro_batch_size": "many"}
    from axolotl.cli import merge_lora

    theirs = merge_lora.do_merge_lora
    cfg, error = load_after(run_config)
    assert "micro_batch_size" in str(error)
    assert {k: cfg.to_dict()[k] for k in run_config if k != "datasets"} == {
        k: v for k, v in run_config.items() if k != "datasets"
    }
    assert not {"lora_target_modules", "lora_r", "lora_mlp_kernel"} & cfg.keys()
    assert merge_lora.do_merge_lora is theirs


def test_a_refused_configuration_is_left_as_it_was():
    config = {"adapter": "loki", "loki": {"quota": 5}, "peft_use_dora": True}
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match="peft_use_dora"):
        settings.prepare(config)
    config |= {"peft_use_dora": None, "loki": {"rows": "a.json", "exclude": ["b.json"]}}
    with pytest.raises(ValueError, match="disagree"):
        settings.prepare(config)
    assert config.keys() == before.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_quantization_config": "FineGrainedFP8Config"}, "model_quantization_config: only"),
        ({"use_onebitllms": True}, "use_onebitllms: it rewrites every linear layer"),
        ({"qat": {"weight_dtype": "int8"}}, "qat: it rounds the weights of the base model"),
        ({"fp8": True}, "fp8: it replaces the linear layers"),
        ({"reinit_weights": True}, "reinit_weights: .* random weights"),
        ({"shrink_embeddings": True}, "shrink_embeddings: it cuts tokens off"),
        ({"lisa_step_interval": 5}, "lisa_step_interval: LISA trains layers"),
        ({"spectrum_top_fraction": 0.5}, "spectrum_top_fraction: Spectrum trains layers"),
        (
            {"lora_exclude_modules": ["0"]},
            "lora_exclude_modules: name what trains in `loki.targets`",
        ),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: it spreads the rows"),
        (
            {"context_parallel_size": 2, "val_set_size": 0.1},
            "context_parallel_size: it cuts every text .* remove it, or set `protect: off`",
        ),
        (
            {"context_parallel_size": 2, "loki": {"protect": "auto"}},
            "context_parallel_size: it cuts every text",
        ),
        ({"optimizer": "polora"}, "optimizer: polora works on pairs"),
        ({"nf4_backend": "torchao"}, "nf4_backend: torchao stores .*; take bitsandbytes"),
        ({"flash_attn_fuse_mlp": True}, "flash_attn_fuse_mlp: it replaces the MLPs.*; remove it"),
        (
            {"plugins": ["loki", "axolotl.integrations.diffusion.DiffusionPlugin"]},
            "plugins: axolotl.integrations.diffusion.DiffusionPlugin: .*; take it out",
        ),
        (
            {"model_quantization_config": "Mxfp4Config"},
            "gpt-oss, whose layers have routed experts only; .*16 bits, and `loki: {targets",
        ),
        ({"adapter": "qlora", "lora_r": 8}, "adapter: qlora .*; set `load_in_4bit: true`, or"),
        ({"lr_groups": [1], "loki": {"lr_scale": 2}}, "lr_groups: its rates are absolute"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio: use `loki.lr_scale`; remove it"),
        (
            {"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]},
            "SpectrumPlugin: it trains",
        ),
        (
            {"optimizer": "galore_adamw_layerwise", "loki": {"lr_scale": 2}},
            "optimizer: galore_adamw_layerwise has an optimizer for each parameter",
        ),
        ({"deepspeed": {"optimizer": {"type": "AdamW"}}}, "deepspeed: .* defines an `optimizer`"),
        (
            {"deepspeed": {"scheduler": {"type": "WarmupLR"}}, "loki": {"lr_scale": 2}},
            "deepspeed: .* defines a `scheduler`",
        ),
    ],
)
def test_what_would_train_something_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        settings.prepare({"adapter": "loki"} | change)


def test_a_deepspeed_file_is_read(tmp_path):
    file = tmp_path / "zero1.json"
    file.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}))
    with pytest.raises(ValueError, match="defines an `optimizer`"):
        settings.prepare({"adapter": "loki", "deepspeed": str(file)})
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    settings.prepare({"adapter": "loki", "deepspeed": str(file)})


def test_every_key_that_is_refused_says_what_to_do():
    config = dict.fromkeys(options.REFUSED, "x") | {"adapter": "loki"}
    with pytest.raises(ValueError, match="each line says what to do:") as raised:
        settings.prepare(config)
    lines = str(raised.value).splitlines()[1:]
    assert len(lines) == len(options.REFUSED)
    assert all(line.endswith("; remove it") or "; take " in line for line in lines)


def test_parameters_of_the_base_do_not_train_though_the_yaml_says_so(run_config, our_log):
    """Gemma 3's own QLoRA examples; Axolotl would freeze and unfreeze behind the adapter."""
    run_config["unfrozen_parameters"] = ["model.embed_tokens.weight"]
    cfg = load(run_config)
    assert not cfg.unfrozen_parameters
    assert (
        "unfrozen_parameters = ['model.embed_tokens.weight']: now None, for param" in our_log.text
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": "2e-4"}, "learning_rate = 0.0002 is kept, a rate of LoRA"),
        ({"learning_rate": 1e-4, "optimizer": "adamw_bnb_8bit"}, "learning_rate = 0.0001 is kept"),
        ({"learning_rate": 1e-5, "loki": {"lr_scale": 20}}, "1e-05 x lr_scale 20 is kept"),
        ({"learning_rate": 1e-5}, None),
        ({"learning_rate": 2e-4, "loki": {"lr_scale": 0.05}}, None),
        ({"learning_rate": 1e-3, "loki": {"protect": "auto"}}, None),
        ({"learning_rate": 1e-5, "loki": {"protect": "auto"}}, "a small model took 1e-3"),
        ({"learning_rate": 1e-5, "loki": {"protect": "auto", "lr_scale": 9}}, None),
        ({"learning_rate": 2e-4, "loki": {"rank": 8}}, None),
        ({"learning_rate": 2e-4, "adapter": "lora", "lora_r": 8}, None),
        ({"learning_rate": 2e-4, "optimizer": "sgd"}, None),
        ({}, None),
    ],
)
def test_a_rate_of_something_else_in_the_dense_form_is_said(change, said):
    config = {"adapter": "loki", "optimizer": "adamw_torch"} | change
    config["loki"] = {"protect": "off"} | config.get("loki", {})
    rate = config.get("learning_rate")
    told = [text for about, text in settings.prepare(config) if about == "rate"]
    assert config.get("learning_rate") == rate
    assert len(told) == (said is not None)
    assert said is None or said in told[0]
    assert settings.prepare(config) == []
