"""What the plugin accepts, overrides and refuses, through Axolotl's own load_cfg."""

from __future__ import annotations

import json
import logging

import pytest
import yaml
from helpers.axolotl import load

from loki_plugin.args import LokiConfig
from loki_plugin.host.preference import preference_faults
from loki_plugin.host.sharding import zero_faults


def test_the_block_has_one_default_for_every_field(run_config):
    del run_config["loki"]
    cfg = load(run_config)
    assert LokiConfig(**cfg.loki.to_dict()) == LokiConfig(form="dense")
    assert cfg.adapter == "lora"


@pytest.mark.parametrize("name", ["loki", "loki_plugin.LokiPlugin"])
@pytest.mark.parametrize(("four_bit", "carrier"), [(False, "lora"), (True, "qlora")])
def test_the_carrier_is_lora_or_qlora(run_config, name, four_bit, carrier):
    run_config |= {"plugins": [name], "load_in_4bit": four_bit}
    cfg = load(run_config)
    assert cfg.adapter == carrier
    assert cfg.lora_dropout == 0 and cfg.lora_target_modules == ["down_proj"]
    for kernel in ("mlp", "qkv", "o", "embedding"):
        assert cfg[f"lora_{kernel}_kernel"] is False


def test_eight_bit_runs_as_lora(run_config):
    assert load(run_config | {"load_in_8bit": True}).adapter == "lora"


def test_a_decimal_quota_survives_the_configuration(run_config):
    run_config["loki"]["quota"] = 2.5
    assert str(LokiConfig(**load(run_config).loki.to_dict()).quota) == "2.5"


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_protect_off_as_a_yaml_has_it(run_config, word):
    run_config["loki"] = yaml.safe_load(f"{{quota: 10, protect: {word}}}")
    found = LokiConfig(**load(run_config).loki.to_dict()).protect
    assert not found.reads and not found.anchor and not found.auto


@pytest.mark.parametrize(
    "block",
    [
        {"protect": {"auto": True, "inputs": None, "soft": False}},
        {"protect": {"auto": True, "inputs": None, "directions": 4}},
        {"protect": {"auto": True, "text": None}},
        {"protect": {"auto": True, "anchor": 0}},
        {"cache_limit": None},
        {"rank": None, "rows": None, "stop_forgetting": None, "calibration": {"max_tokens": None}},
    ],
    ids=lambda block: ", ".join(block),
)
def test_null_stays_null_on_the_way_to_the_run(run_config, block):
    """Axolotl drops nulls; a default or what `auto` stands for must not come in their place."""
    block = run_config["loki"] | block
    cfg = load(run_config | {"loki": block})
    ran = LokiConfig(**cfg.loki.to_dict())
    assert ran == LokiConfig(**block, form="dense")
    given = {k: v for part in block.values() if isinstance(part, dict) for k, v in part.items()}
    told = ran.protect.model_dump() | ran.calibration.model_dump() | ran.model_dump()
    nulls = [k for k, v in (block | given).items() if v is None]
    assert [told[k] for k in nulls] == [None] * len(nulls)


@pytest.mark.parametrize("word", [True, "true", "yes", 1])
def test_auto_is_the_same_however_yes_is_written(run_config, word):
    run_config["loki"]["protect"] = {"auto": word, "anchor_batch": 3}
    found = LokiConfig(**load(run_config).loki.to_dict()).protect
    assert found.soft and found.inputs == 0.99 and found.anchor == 1 and found.text == "self"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("q_proj", ["q_proj"]),
        ("mlp.up_proj", ["mlp.up_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("all", "all"),
    ],
)
def test_targets_are_a_name_names_or_a_regular_expression(run_config, given, taken):
    run_config["loki"]["targets"] = given
    assert load(run_config).loki.targets == taken


def test_paths_begin_at_home_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = LokiConfig(
        rows="~/rows.json",
        exclude=["~/a.json", "b.json"],
        cache_dir="~/cache",
        calibration={"source": "~/c.jsonl"},
        protect={"auto": True, "text": "~/t.txt"},
    )
    assert (found.rows, found.cache_dir) == ("/home/me/rows.json", "/home/me/cache")
    assert found.exclude == ["/home/me/a.json", "b.json"]
    assert found.calibration.source == "/home/me/c.jsonl"
    assert found.protect.text == "/home/me/t.txt"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loki": {1: 2}}, "`loki:` has a field 1, which is no name; known fields: .*quota"),
        ({"lora_target_modules": ["q_proj", 5]}, "loki.targets: 5 is no name; give names of"),
        ({"loki": {"cache_dir": "~nobody-here/x"}}, "'~nobody-here/x' names the home of nobody"),
    ],
)
def test_what_is_no_name_is_told_in_a_sentence(given, said):
    from axolotl.utils.dict import DictDefault

    from loki_plugin.host import settings

    with pytest.raises(ValueError, match=said):
        settings.prepare(DictDefault({"adapter": "loki", "plugins": ["loki"], **given}))


def test_contradicting_lora_settings_are_overridden_in_one_visible_block(run_config, monkeypatch):
    seen = []
    monkeypatch.setattr(
        logging.getLogger("axolotl"), "handle", lambda record: seen.append(record.getMessage())
    )
    run_config |= {
        "lora_target_modules": ["q_proj"],
        "lora_dropout": 0.1,
        "lora_alpha": 32,
    }
    run_config["loki"]["targets"] = "down"
    cfg = load(run_config)
    assert cfg.lora_target_modules == ["down_proj"] and cfg.loki.targets == "down"
    blocks = [text for text in seen if "overrides" in text]
    assert len(blocks) == 1
    for part in (
        "lora_target_modules = ['q_proj']: `loki.targets: down`",
        "lora_dropout = 0.1: now 0.0",
        "lora_alpha = 32: set from the rows",
    ):
        assert part in blocks[0]


@pytest.mark.parametrize(
    ("keys", "targets"),
    [
        ({"lora_target_linear": True}, "all"),
        ({"lora_target_modules": "all-linear"}, "all"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({"lora_target_linear": True, "lora_target_modules": ["o_proj"]}, ["o_proj"]),
        ({"lora_target_modules": r".*\.(q|down)_proj"}, r".*\.(q|down)_proj"),
    ],
)
def test_loras_own_targets_are_taken_and_said_once(run_config, keys, targets, our_log):
    cfg = load(run_config | keys)
    assert cfg.loki.targets == targets and cfg.loki.linear_rank == 16
    assert cfg.lora_target_modules == ["down_proj"] and not cfg.lora_target_linear
    assert f"is taken as `loki.targets: {targets}`" in our_log.text
    dropped = "lora_target_linear" in keys and "lora_target_modules" in keys
    assert ("  overrides   lora_target" in our_log.text) == dropped


@pytest.mark.parametrize(
    ("modules", "block", "trains"),
    [
        (["q_proj", "v_proj"], {}, "['q_proj', 'v_proj']"),
        (["q_proj"], {"targets": ["v_proj"]}, "['v_proj']"),
        (["q_proj"], {"targets": "down"}, "down"),
        (["q_proj"], {"targets": "all"}, None),
        ("all-linear", {}, None),
    ],
)
def test_all_linears_beside_named_ones_are_not_trained_and_that_is_said(
    run_config, modules, block, trains, our_log
):
    """Axolotl trains the union; here the names say what trains."""
    run_config["loki"] |= block
    load(run_config | {"lora_target_linear": True, "lora_target_modules": modules})
    said = "overrides   lora_target_linear = True: not followed, what trains is `loki.targets: "
    assert (said in our_log.text) == (trains is not None)
    assert trains is None or f"{said}{trains}`; for every linear write" in our_log.text
    # The log's handlers may tell one block twice, and each says the line once.
    blocks = [r.getMessage() for r in our_log.records if "loki: settings" in r.getMessage()]
    assert blocks and all(text.count("lora_target_linear = ") <= 1 for text in blocks)


def test_names_of_lora_targets_that_the_base_lacks_are_left_out_and_said(run_config, our_log):
    """As PEFT does: one list is written for several families."""
    names = ["q_proj", "vision_adapter.mlp.fc1", "gate_up_proj", "down_proj"]
    cfg = load(run_config | {"lora_target_modules": names})
    assert cfg.loki.targets == ["q_proj", "down_proj"]
    said = "of the decoder layers no linear that can train is called vision_adapter.mlp.fc1, gate_"
    assert said in our_log.text
    with pytest.raises(ValueError, match="is called gate_up_proj; there are down_proj, gate_proj"):
        load(run_config | {"loki": run_config["loki"] | {"targets": names[2:]}})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"qouta": 10},
            r"no such field, did you mean quota\? \(got 10\); known .*exclude, linear_r",
        ),
        ({"threshold": 10}, r"loki.threshold: there is no such field \(got 10\); known fields: "),
        ({"protect": True}, "loki.protect: expected `auto`, `off`, or a block of .*got True"),
        ({"protect": "full"}, r"loki.protect: got 'full', expected `auto`, .* settings$"),
        ({"calibration": {"sauce": 1}}, "loki.calibration.sauce: .*known fields: .*source"),
        (
            {"calibration": "my.jsonl"},
            "loki.calibration: expected a block of .*source.*my.json",
        ),
        (
            {"protect": {}},
            "loki: got protect: {}, which protects nothing; .*`auto: true` .*`protect: off`$",
        ),
        (
            {"protect": {"anchor_batch": 2}},
            "got protect: {'anchor_batch': 2}, which protects nothing",
        ),
        ({"protect": {"memory": 1}}, "`memory` limits .* set `auto: true` or `inputs` too"),
        ({"protect": {"auto": "perhaps"}}, "loki.protect.auto: .*perhaps"),
        ({"targets": "["}, r"loki.targets: .*'\[' is no regular expression"),
        ({"targets": ["all"]}, "loki.targets: .*`all` stands by itself: write `targets: all`"),
        ({"targets": ["q_proj", ""]}, "loki.targets: .*one of the names is empty"),
        ({"targets": "q_proj|v_proj"}, "a text is a regular expression for whole names, as in"),
        ({"quota": 0}, "loki.quota: .*greater than 0"),
        ({"quota": 101}, "loki.quota: .*less than or equal to 100"),
        ({"quota": "ten"}, "loki.quota"),
        ({"quota": True}, "loki.quota: .*got True, expected a number of percent"),
        ({"rank": 0}, "loki.rank: .*greater than or equal to 1"),
        ({"strategy": "best"}, "loki.strategy: .*layer_balanced"),
        ({"attribution": {"steps": 0}}, "loki.attribution.steps"),
        ({"attribution": {"steps": 1, "rule": "trapezoid"}}, "`rule: trapezoid` needs `steps` of"),
        ({"protect": {"anchor": True}}, "loki.protect.anchor: .*got True, expected a number"),
        ({"protect": {"anchor": float("inf")}}, "loki.protect.anchor: .*finite number"),
        ({"lr_scale": float("inf")}, "loki.lr_scale: .*finite number"),
        ({"cache_limit": True}, "loki.cache_limit: .*got True, expected a number"),
        ({"attribution": {"rule": "simpson"}}, "loki.attribution.rule"),
        ({"rows": "a.json", "exclude": ["b.json"]}, "loki.rows and loki.exclude disagree"),
        ({"rows": ""}, "loki.rows: the path is empty; give one, or leave it out"),
        ([1], "`loki:` must be a block of settings"),
    ],
)
def test_a_faulty_block_is_refused_before_anything_is_loaded(run_config, block, message):
    run_config["loki"] = block
    with pytest.raises(ValueError, match=message):
        load(run_config)


def test_vllm_may_be_sent_the_adapter_itself():
    sent = {"use_vllm": True, "vllm_lora_sync": True}
    assert preference_faults({"rl": "grpo", "trl": sent | {"async_prefetch": True}}) == []
    (fault,) = preference_faults({"rl": "grpo", "trl": sent})  # which the plain trainer ignores
    assert "trl.use_vllm" in fault


def test_all_faults_are_shown_at_once(run_config):
    run_config["loki"] = {"quota": 0, "rank": -1, "colour": "red"}
    with pytest.raises(ValueError) as error:
        load(run_config)
    assert all(f"loki.{key}:" in str(error.value) for key in ("quota", "rank", "colour"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": "ebft"}, "rl: ebft: loki trains preferences with dpo, ipo, kto"),
        ({"rl": "dpo", "lora_model_dir": "x"}, "lora_model_dir with rl: dpo: .* merge the earlier"),
        ({"rl": "grpo", "trl": {"use_vllm": True}}, "trl.use_vllm: .*which rounds the base"),
        ({"rl": "kto", "rl_adapter_ref_model": True}, "rl_adapter_ref_model: the base with the"),
        ({"peft_use_dora": True}, "peft_use_dora: DoRA rescales every row"),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "loftq_config"),
        (
            {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}},
            "fsdp_config: FSDP1 hides what trains; .*or DDP .several",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "ZeRO-3 .*use ZeRO-1 or 2"),
        ({"adapter": "llama-adapter"}, "adapter: llama-adapter cannot be combined"),
        ({"adapter": "lora"}, "needs `lora_r`"),
        ({"adapter": "lora", "lora_r": 4, "loki": {"rank": 8}}, "lora_r = 4 and loki.rank = 8"),
    ],
)
def test_what_contradicts_loki_is_refused(run_config, change, message):
    with pytest.raises(ValueError, match=message):
        load(run_config | change)


def test_a_deepspeed_file_is_read_for_its_stage(run_config, tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ValueError, match="deepspeed: ZeRO-3 shards the base; use ZeRO-1 or 2"):
        load(run_config | {"deepspeed": str(file)})
    assert zero_faults({"zero_optimization": {"stage": 2}}) == zero_faults({}) == []


def test_without_the_plugin_the_adapter_is_refused(run_config):
    """A plugin that did not load must never silently become plain LoRA."""
    from axolotl.integrations.base import PluginManager

    known = PluginManager.get_instance().plugins
    kept = dict(known)
    known.clear()
    try:
        with pytest.raises(ValueError, match="Adapter 'loki' is not built in"):
            load({k: v for k, v in run_config.items() if k not in ("plugins", "loki")})
    finally:
        known.update(kept)


def test_another_run_in_the_same_process_is_left_alone(run_config):
    load(run_config)
    plain = {k: v for k, v in run_config.items() if k not in ("plugins", "loki")}
    cfg = load(plain | {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1})
    assert cfg.lora_r == 4 and cfg.lora_dropout == 0.1 and cfg.loki is None


def test_an_unknown_short_name_is_refused(run_config):
    with pytest.raises(ValueError, match="plugin 'lokii' is unknown.*installed short names.*loki"):
        load(run_config | {"plugins": ["lokii"]})
