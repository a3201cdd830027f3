"""The row constraint on LoRA: laws, through real PEFT and real optimizers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.laws import assert_equal, base_tensors
from helpers.quantised import in_4_bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora

from loki_plugin import RowSelection, implant
from loki_plugin.implanting import adapter
from loki_plugin.implanting.training import check_resume, prepare_trainer
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.fingerprint import fingerprint

ROWS = [[3, 1, 40], [0, 47, 5], [7, 8, 9]]
IDS = torch.arange(1, 13).view(2, 6)


def step(model, optimizer, times=3):
    for _ in range(times):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


MOE = ("qwen2_moe", "granitemoeshared", "llama4")
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "falcon", "gpt_neox", *MOE])
def test_training_and_merging_change_the_selected_rows_only(family, rank, optimizer):
    base = tiny(family)
    before = {n: p.clone() for n, p in base.named_parameters()}
    names, dims = find_anatomy(base).names, find_anatomy(base).row_dims
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
    model = implant(base, ROWS, rank)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain)  # starts as the base
    step(model, OPTIMIZERS[optimizer](trainable(model)))
    adapter.check(model)
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, tuned, atol=1e-4, rtol=1e-4)
    for name, parameter in merged.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(parameter, before[name]), name
            continue
        layer = names.index(name.removesuffix(".weight"))
        old, new = before[name], parameter
        if dims[layer] == 1:
            old, new = old.T, new.T
        changed = (old != new).any(1).nonzero()[:, 0].tolist()
        assert changed == sorted(ROWS[layer]), name


def test_a_dense_step_is_an_unrestricted_step_on_those_rows():
    """Plain SGD on A moves the rows exactly as SGD on the full weight would."""
    full, base = tiny("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    model = implant(base, ROWS)
    step(model, torch.optim.SGD(trainable(model), lr=0.1), times=1)
    for parameter in full.parameters():
        parameter.requires_grad_(False)
    down = find_anatomy(full).down
    for module in down:
        module.weight.requires_grad_(True)
    full(input_ids=IDS, labels=IDS).loss.backward()
    merged = find_anatomy(model.merge_and_unload()).down
    for module, new, rows in zip(down, merged, ROWS, strict=True):
        rows = sorted(rows)
        wanted = module.weight[rows] - 0.1 * module.weight.grad[rows]
        # PEFT holds the adapter in float32.
        assert torch.allclose(new.weight[rows].double(), wanted, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_parameter_counts(rank):
    model = implant(tiny("llama"), ROWS, rank)
    size = 3 * 3 * 80 if rank is None else 3 * 2 * (80 + 3)
    assert adapter.trainable_share(model)[0] == size
    assert sum(p.numel() for p in trainable(model)) == size  # nothing else is there to train
    assert adapter.trainable_share(model)[1] == sum(p.numel() for p in tiny("llama").parameters())


# PEFT takes every `down_proj` of these for the routed experts' weights.
CONVERTED = {"deepseek_v3", "glm4_moe", "hunyuan_moe", "afmoe", "qwen3_next"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_be_wrapped(family):
    model = implant(tiny(family), ROWS)
    adapter.check(model)
    assert sum(1 for _ in adapter.constrained_modules(model)) == 3
    named = model.peft_config["default"].target_parameters
    assert bool(named) == (family in CONVERTED)


@pytest.fixture
def stock_peft(monkeypatch):
    """PEFT as it is where this package is not."""
    from peft.utils import transformers_weight_conversion as conversion

    from loki_plugin.implanting import naming

    return lambda: monkeypatch.setattr(
        conversion, "convert_peft_config_for_transformers", naming._original()
    )


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("family", sorted(CONVERTED))
def test_where_peft_takes_names_for_experts_stock_peft_loads_and_merges(
    tmp_path, stock_peft, family, rank
):
    rows = [[1, 2], [0, 40], [5, 6, 7]]
    model = implant(tiny(family), rows, rank)
    assert all(isinstance(m, lora.Linear) for m in model.modules() if hasattr(m, "lora_B"))
    step(model, torch.optim.AdamW(trainable(model), lr=0.05))
    model.save_pretrained(tmp_path)
    ids, model = IDS, model.eval()
    going_on = PeftModel.from_pretrained(tiny(family), tmp_path, is_trainable=True)
    adapter.install(going_on, RowSelection(rows, 48), rank, fresh=False)
    assert all(isinstance(m, lora.Linear) for m in going_on.modules() if hasattr(m, "lora_B"))
    stock_peft()
    stock = PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert not torch.allclose(tiny(family)(input_ids=ids).logits, expected, atol=1e-3)
        torch.testing.assert_close(stock(input_ids=ids).logits, expected)
        torch.testing.assert_close(going_on.eval()(input_ids=ids).logits, expected)
        torch.testing.assert_close(stock.merge_and_unload()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("family", sorted(CONVERTED))
def test_all_linears_of_such_a_family_train_but_its_experts(tmp_path, stock_peft, family):
    model = implant(tiny(family), ROWS, 2, targets="all", linear_rank=2)
    step(model, torch.optim.AdamW(trainable(model), lr=0.05))
    model.save_pretrained(tmp_path)
    assert not any("experts.0" in n or ".gate.lora" in n for n, _ in model.named_parameters())
    stock_peft()
    stock = PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("rank", [None, 1])
def test_layers_may_have_different_counts_and_none(tmp_path, rank):
    rows = [[1, 2], [], [5, 6, 7]]
    model = implant(tiny("llama"), rows, rank)
    step(model, torch.optim.AdamW(trainable(model), lr=0.05))
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    model.eval()
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-6)
    config = model.peft_config["default"]
    assert config.r == config.lora_alpha or rank is None
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_B")} == {1.0}
    merged = model.merge_and_unload()
    unchanged = tiny("llama").model.layers[1].mlp.down_proj.weight
    assert torch.equal(merged.model.layers[1].mlp.down_proj.weight, unchanged)


def test_the_saved_adapter_is_small_and_ordinary(tmp_path):
    from safetensors.torch import load_file

    implant(tiny("llama"), ROWS).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {name.split(".", 7)[-1] for name in tensors}
    assert kinds == {"lora_A.weight", "lora_B.weight"}
    one_hot = tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    assert one_hot.nonzero().tolist() == [[1, 0], [3, 1], [40, 2]]


def test_continuing_keeps_the_update_and_freezes_the_selector_again(tmp_path):
    model = implant(tiny("llama"), ROWS)
    step(model, torch.optim.AdamW(trainable(model), lr=0.05))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    assert any(p.requires_grad for n, p in again.named_parameters() if "lora_B" in n)
    adapter.install(again, RowSelection(ROWS), None, fresh=False)
    assert not any("lora_B" in n for n, _ in again.named_parameters())
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    other = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="layer 0: lora_B is not the one-hot.*other rows"):
        adapter.install(other, RowSelection([[3, 1, 41], *ROWS[1:]]), None, fresh=False)
    with pytest.raises(ValueError, match="r = 3 and scaling 1.*expected r = 2"):
        adapter.install(other, RowSelection(ROWS), 2, fresh=False)


@pytest.mark.parametrize(
    ("rows", "rank", "message"),
    [
        (ROWS, 0, "rank = 0, but 3 rows train per layer"),
        (ROWS, 3, "1 <= rank < 3"),
        ([[1], [2]], None, "2 layers x unknown rows, this model has 3 x 48"),
        ([[1], [2], [48]], None, r"layer 2: row index 48 is outside \[0, 48\)"),
        ([[1, 1], [2], [3]], None, "layer 0: row 1 is listed twice"),
    ],
)
def test_bad_arguments_are_named(rows, rank, message):
    with pytest.raises(ValueError, match=message):
        implant(tiny("llama"), rows, rank)


def test_a_wrapped_model_is_refused():
    model = implant(tiny("llama"), ROWS)
    with pytest.raises(ValueError, match="got a PeftModel"):
        implant(model, ROWS)


def test_foreign_lora_beside_ours_is_refused():
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["down_proj", "q_proj"])
    model = get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match="6 modules carry LoRA, expected only the 3"):
        adapter.install(model, RowSelection(ROWS), None)


@pytest.mark.parametrize("rank", [None, 2])
def test_check_sees_every_violation(rank):
    model = implant(tiny("llama"), ROWS, rank)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.lora_B["default"] = torch.nn.Linear(rank or 3, 48, bias=False)
    with pytest.raises(RuntimeError, match="layers.0.mlp.down_proj: .*'default' is not confined"):
        adapter.check(model)
    model = implant(tiny("llama"), ROWS, rank)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="norm.weight is trainable"):
        adapter.check(model)
    with pytest.raises(RuntimeError, match="no row constraint"):
        adapter.check(tiny("llama"))


def test_resuming_with_other_rows_is_refused(tmp_path):
    selection = RowSelection(ROWS, 48)
    check_resume(None, selection)
    with pytest.raises(ValueError, match="has no loki_rows.json"):
        check_resume(str(tmp_path), selection)
    selection.save(tmp_path / "loki_rows.json")
    check_resume(str(tmp_path), selection)
    with pytest.raises(ValueError, match="other rows .1 of 3 layers have other rows"):
        check_resume(str(tmp_path), RowSelection([*ROWS[:2], [7, 8, 10]], 48))
    with pytest.raises(ValueError, match="trained on other linears: q_proj trained there"):
        check_resume(str(tmp_path), RowSelection(ROWS, 48, linears=["layers.0.q_proj"]))


def test_resuming_on_another_base_is_refused(tmp_path):
    """Where all rows train, or random ones, the rows of two bases are the same."""
    one, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.add_(1)
    marks = [fingerprint(model) for model in (one, other)]
    RowSelection(ROWS, 48, marks[0]).save(tmp_path / "loki_rows.json")
    check_resume(str(tmp_path), RowSelection(ROWS, 48, marks[0]))
    check_resume(str(tmp_path), RowSelection(ROWS, 48))  # nothing is known of it
    with pytest.raises(ValueError, match="another base: its weights have other values"):
        check_resume(str(tmp_path), RowSelection(ROWS, 48, marks[1]))


@pytest.mark.parametrize(("had", "own"), [(2, 1), (2, None), (None, 2)])
def test_resuming_with_another_rank_names_both(tmp_path, had, own):
    implant(tiny("llama"), ROWS, had).save_pretrained(tmp_path)
    trainer = SimpleNamespace(model=implant(tiny("llama"), ROWS, own))
    ranks = had or len(ROWS[0]), own or len(ROWS[0])
    said = f"has rank {ranks[0]} in model.layers.0.mlp.down_proj, and this run {ranks[1]}"
    with pytest.raises(ValueError, match=said):
        prepare_trainer(trainer, RowSelection(ROWS, 48), 1.0, str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi: with biases
def test_an_evaluation_in_4_bits_changes_neither_the_base_nor_what_trains(tmp_path, family):
    """bitsandbytes packs weights for evaluation on some CPUs; a packed one gives no gradient."""
    model = implant(in_4_bit(family, tmp_path), ROWS).train()
    before, gradients = base_tensors(model), []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for p in trainable(model)])
        with torch.no_grad():
            model.eval()(input_ids=IDS)
        model.train()
    assert all(map(torch.equal, *gradients)) and all(g.abs().max() > 0 for g in gradients[0])
    assert_equal(before, base_tensors(model))


def test_the_decay_of_adamc_follows_the_scaled_rate(tmp_path):
    """It decays by lr² / max_lr, which it notes when it is made."""
    from axolotl.utils.optimizers.adamc import AdamC
    from transformers import Trainer, TrainingArguments

    class WithAdamC(Trainer):
        def create_optimizer(self, model=None):
            trained = [p for p in self.model.parameters() if p.requires_grad]
            rate = self.args.learning_rate
            self.optimizer = AdamC([{"params": trained, "lr": rate}], lr=rate, weight_decay=0.1)
            return self.optimizer

    found = []
    for rate, scale in ((0.01, 1.0), (0.001, 10.0)):
        model = implant(tiny("llama"), ROWS)
        arguments = TrainingArguments(str(tmp_path), learning_rate=rate, use_cpu=True, report_to=[])
        trainer = WithAdamC(model=model, args=arguments)
        prepare_trainer(trainer, RowSelection(ROWS, 48), scale, None)
        optimizer = trainer.create_optimizer()
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.data.fill_(1)
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        found.append(float(optimizer.param_groups[0]["params"][0].flatten()[0]))
    assert found[0] < 1 and found[1] == pytest.approx(found[0], rel=1e-6)


def test_the_trainer_scales_the_learning_rate_once_and_saves_rows(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = implant(tiny("llama"), ROWS)
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[1, 2, 3]] * 4})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    prepare_trainer(trainer, RowSelection(ROWS, 48), 0.5, None)
    model.base_model.model.lm_head.weight.requires_grad_(True)  # someone thaws a weight
    head = model.base_model.model.lm_head.weight.clone()
    trainer.train()
    assert {g["lr"] for g in trainer.optimizer.param_groups} == {0.005}
    assert torch.equal(model.base_model.model.lm_head.weight, head)
    assert RowSelection.load(tmp_path / "checkpoint-2" / "loki_rows.json").counts == [3, 3, 3]
