"""What lies on disk: the rows beside the adapter, and the adapter read back."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import tiny
from helpers.room import little_room
from safetensors.torch import load_file, save_file

from loki_plugin import RowSelection, implant
from loki_plugin.implanting.saved import WEIGHTS, check_saved, embeddings_grew
from loki_plugin.implanting.training import KeepDtypes
from loki_plugin.model.anatomy import find_anatomy

ROWS = RowSelection([[3, 1, 40], [], [7, 8, 9]], 48)
NAMES = find_anatomy(tiny("llama")).names
KEY = f"base_model.model.{NAMES[0]}.lora_%s.weight"
FORMS = pytest.mark.parametrize("rank", [None, 2], ids=["dense", "rank2"])


def saved(tmp_path, rank, **change):
    model = implant(tiny("llama"), ROWS, rank)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for x, values in change.items():
        if values is None:
            del tensors[KEY % x]
        else:
            tensors[KEY % x] = values(tensors[KEY % x])
    save_file(tensors, tmp_path / WEIGHTS)


@FORMS
def test_a_good_adapter_passes(tmp_path, rank):
    saved(tmp_path, rank)
    check_saved(tmp_path, NAMES, ROWS, rank)


def poke(value, place=(30, 1)):
    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": poke(float("nan"))}, "layer 0: the saved adapter holds NaN or Inf"),
        ({"B": poke(float("inf"))}, "layer 0: the saved adapter holds NaN or Inf"),
        ({"B": poke(1e-30)}, "layer 0: the saved lora_B .*30"),
        ({"B": None}, "layer 0: the saved adapter lacks .*lora_B.weight"),
        ({"B": lambda b: b[:47]}, r"lora_B has shape \[47, .\], expected \[48"),
    ],
)
@FORMS
def test_a_bad_adapter_is_named(tmp_path, rank, change, message):
    change = {k: v for k, v in change.items()}
    if "A" in change:
        change["A"] = poke(float("nan"), (0, 5))
    saved(tmp_path, rank, **change)
    with pytest.raises(ValueError, match=message):
        check_saved(tmp_path, NAMES, ROWS, rank)


def test_the_page_of_an_adapter_that_is_overwritten_goes(tmp_path):
    for name in ("loki_report.html", "loki_figures.json"):
        (tmp_path / name).write_text("of an earlier run")
    implant(tiny("llama"), ROWS).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.glob("loki_*")} == {"loki_rows.json"}


def test_new_embeddings_are_saved_also_where_the_hub_cannot_be_asked(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    tiny("llama").config.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for grown in (False, True):
        base = tiny("llama")
        base.config._name_or_path = base.name_or_path = "org/name"
        if grown:
            base.resize_token_embeddings(97 + 3, mean_resizing=False)
        model, out = implant(base, ROWS, 2), tmp_path / f"out-{grown}"
        assert embeddings_grew(model) == grown
        model.save_pretrained(out)
        stored = load_file(out / WEIGHTS)
        assert any(k.endswith("embed_tokens.weight") for k in stored) == grown
        check_saved(out, NAMES, ROWS, 2, grown)
    save_file({k: v for k, v in stored.items() if ".lora_" in k}, out / WEIGHTS)
    with pytest.raises(ValueError, match="lacks the embeddings of the tokens that were added"):
        check_saved(out, NAMES, ROWS, 2, True)


@FORMS
def test_what_a_checkpoint_brings_keeps_the_dtype_of_the_run(tmp_path, rank):
    model = implant(tiny("llama", dtype=torch.bfloat16), ROWS, rank)
    for parameter in model.parameters():  # `peft_autocast_adapter_dtype: false`
        parameter.data = parameter.data.bfloat16()
    kept = KeepDtypes(model)
    assert set(kept.dtypes.values()) == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)  # as a trainer does to resume

    def trained():
        return {p.dtype for p in model.parameters() if p.requires_grad}

    assert trained() == {torch.float32}  # else PEFT does what is right, and this class may go
    kept.restore(model)
    assert trained() == {torch.bfloat16}


def test_other_rows_beside_it_and_foreign_layers_are_named(tmp_path):
    saved(tmp_path, None)
    with pytest.raises(ValueError, match="holds other rows than those that trained"):
        check_saved(tmp_path, NAMES, RowSelection([[3, 1, 41], [], [7, 8, 9]], 48), None)
    fewer = RowSelection([ROWS.rows[0], [], []], 48)
    fewer.save(tmp_path / "loki_rows.json")
    with pytest.raises(ValueError, match="layers.2.*which no row selects"):
        check_saved(tmp_path, NAMES, fewer, None)


def test_the_rows_are_saved_with_the_adapter_and_by_copies_of_the_model(tmp_path):
    model = implant(tiny("llama"), ROWS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_A" in name:
                parameter.fill_(2)
    twin.save_pretrained(tmp_path / "twin")
    assert RowSelection.load(tmp_path / "twin" / "loki_rows.json") == ROWS
    assert (load_file(tmp_path / "twin" / WEIGHTS)[KEY % "A"] == 2).all()  # its own weights
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "loki_rows.json").exists()


def adapters_in(folder):
    """The names of the adapters that lie in a folder, as PEFT files them."""
    return {"default" if p.parent == folder else p.parent.name for p in folder.rglob(WEIGHTS)}


@FORMS
def test_of_several_adapters_only_the_reference_of_trl_is_not_saved(tmp_path, rank):
    model = implant(tiny("llama"), ROWS, rank)
    own = model.peft_config["default"]
    for name in ("second", "ref"):
        model.add_adapter(name, own)
    for each in (model, copy.deepcopy(model)):
        folder = tmp_path / f"{id(each)}"
        each.save_pretrained(folder)
        assert adapters_in(folder) == {"default", "second"}
    asked = {"default", "ref"}
    model.save_pretrained(tmp_path / "asked", selected_adapters=sorted(asked))
    assert adapters_in(tmp_path / "asked") == asked
    model.set_adapter("ref")  # now it is the one that trains
    model.save_pretrained(tmp_path / "active")
    assert adapters_in(tmp_path / "active") == {"default", "second", "ref"}


@pytest.mark.parametrize("copied_before", [False, True])
def test_an_adapter_of_ones_own_may_be_called_ref(tmp_path, copied_before):
    model = implant(tiny("llama"), ROWS)
    own = model.peft_config["default"]
    if copied_before:
        model.add_adapter("ref", own)
        model.delete_adapter("ref")
    model.add_adapter("ref", copy.deepcopy(own))
    model.save_pretrained(tmp_path)
    assert adapters_in(tmp_path) == {"default", "ref"}
    model.load_adapter(tmp_path / "ref", "ref")


def test_a_full_disk_keeps_the_files_that_are_there(tmp_path):
    model = implant(tiny("llama"), ROWS)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "loki_rows.json").read_bytes()
    with little_room(1000), pytest.raises(OSError, match="could not be saved.*make room"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "loki_rows.json").read_bytes() == before
    many = RowSelection([range(500)] * 3)
    with little_room(1000), pytest.raises(OSError):
        many.save(tmp_path / "loki_rows.json")
    assert (tmp_path / "loki_rows.json").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_save_withdraws_the_report_that_vouched_for_the_old_one(tmp_path):
    model = implant(tiny("llama"), ROWS)
    report = tmp_path / "loki_report.json"
    for verified, stays in (("true", False), ("false", True)):
        report.write_text(f'{{\n  "verified": {verified}\n}}')
        model.save_pretrained(tmp_path)
        assert report.exists() == stays
