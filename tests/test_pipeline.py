"""From model to rows: cache hits, what decides the rows and what does not, several ranks."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.families import tiny
from helpers.runs import configure, model
from helpers.tokenizers import make_tokenizer

from loki_plugin.analysing import analysis, pace
from loki_plugin.cli import loki
from loki_plugin.host.telling import about_rows
from loki_plugin.inputs import Inputs
from loki_plugin.pipeline import choose_rows
from loki_plugin.rows import RowSelection


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "prompts.jsonl", range(90))


def write(path, numbers):
    rows = [{"prompt": f"say the number {'and ' * (i % 7)}{i}"} for i in numbers]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def analysed(monkeypatch):
    """How many prompts were really analysed."""
    seen = []
    real = analysis.attribute_many

    def counting(model, anatomy, prompts, *rest):
        seen.append(len(prompts))
        return real(model, anatomy, prompts, *rest)

    monkeypatch.setattr(analysis, "attribute_many", counting)
    return seen


@pytest.fixture
def logged(monkeypatch):
    """What the package logs, wherever earlier tests have sent it."""
    messages = []
    log = logging.getLogger("loki_plugin")
    probe = logging.Handler(logging.INFO)
    probe.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(log, "handlers", [probe])
    monkeypatch.setattr(log, "filters", [])
    before = log.level
    log.setLevel(logging.INFO)
    yield messages
    log.setLevel(before)


def test_the_second_run_analyses_nothing_and_says_so(tokenizer, source, tmp_path, analysed, logged):
    first = choose_rows(model(), tokenizer, configure(source, tmp_path / "c"))
    assert sum(analysed) == 90 and not any("cache" in m for m in logged)
    logged.clear()
    again = choose_rows(model(), tokenizer, configure(source, tmp_path / "c", quota=10))
    assert sum(analysed) == 90
    hits = [m for m in logged if "found in the cache" in m]
    assert len(hits) == 1 and "h old" in hits[0] and "MiB" in hits[0]
    error = first.made["convergence_error"]
    assert 1e-6 < error < 1 and again.made["convergence_error"] == error
    assert first.made["prompts_analysed"] == 90 and again.made["prompts_analysed"] == 0
    told = [dict(about_rows(s, "analysis")) for s in (first, again)]
    assert all(f"miss {100 * error:.1f} % of the change of p" in t["scores"] for t in told)
    assert "made now in" in told[0]["from"] and told[1]["from"].endswith("taken from the cache")
    for small, large in zip(again.rows, first.rows, strict=True):
        assert len(small) == 4 and len(large) == 9


def test_a_long_analysis_on_a_cpu_beside_a_gpu_says_what_to_do(
    tokenizer, source, tmp_path, logged, monkeypatch
):
    monkeypatch.setattr(pace, "LIMIT", 0.0)
    monkeypatch.setattr(pace, "ENOUGH", 0.0)
    choose_rows(model(), tokenizer, configure(source, tmp_path / "a"))
    assert not any("ahead" in m for m in logged)  # this is all there is
    monkeypatch.setattr(pace, "gpu_is_there", lambda: True)
    choose_rows(model(), tokenizer, configure(source, tmp_path / "b"))
    (told,) = [m for m in logged if "ahead" in m]
    assert "for 90 prompts: the model is on the CPU, though there is a GPU. `loki analyse" in told


def test_other_weights_settings_or_prompts_never_share_an_entry(
    tokenizer, source, tmp_path, analysed
):
    config = configure(source, tmp_path / "c")
    choose_rows(model(), tokenizer, config)
    changed = model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    choose_rows(changed, tokenizer, config)
    steps = configure(source, tmp_path / "c", attribution={"steps": 3})
    choose_rows(model(), tokenizer, steps)
    fewer = configure(write(tmp_path / "fewer.jsonl", range(89)), tmp_path / "c")
    choose_rows(model(), tokenizer, fewer)
    assert sum(analysed) == 90 * 3 + 89
    result = CliRunner().invoke(loki, ["cache", "list", "--dir", str(tmp_path / "c")])
    assert result.output.startswith("4 analyses") and result.output.count("complete") == 4
    key = result.output.splitlines()[1].split()[0]
    CliRunner().invoke(loki, ["cache", "clear", key, "--dir", str(tmp_path / "c")])
    assert len(list((tmp_path / "c").iterdir())) == 3
    result = CliRunner().invoke(loki, ["cache", "clear", "nokey", "--dir", str(tmp_path / "c")])
    assert result.exit_code == 1 and "has no analysis 'nokey'" in result.output
    CliRunner().invoke(loki, ["cache", "clear", "--dir", str(tmp_path / "c")])
    assert list((tmp_path / "c").iterdir()) == []


def test_the_cache_keeps_to_its_limit(tokenizer, source, tmp_path, logged):
    config = configure(source, tmp_path / "c", cache_limit=1e-6)  # GB: less than one analysis
    first = choose_rows(model(), tokenizer, config)
    changed = model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    second = choose_rows(changed, tokenizer, config)
    assert [p.name for p in (tmp_path / "c").iterdir()] == [second.made["analysis"]]
    assert any(f"dropped analysis {first.made['analysis']}" in m for m in logged)


def test_order_of_prompts_and_batch_size_do_not_change_the_rows(tokenizer, source, tmp_path):
    rows = choose_rows(model(), tokenizer, configure(source, tmp_path / "a"))
    shuffled = write(tmp_path / "shuffled.jsonl", [*range(89, -1, -1)])
    assert choose_rows(model(), tokenizer, configure(shuffled, tmp_path / "b")) == rows
    for size in (1, 7):
        config = configure(source, tmp_path / str(size), attribution={"batch_size": size})
        assert choose_rows(model(), tokenizer, config) == rows


def test_the_hand_over_says_how_it_was_made(tokenizer, source, tmp_path):
    earlier = RowSelection([[1, 2], [3], [4]], 48).save(tmp_path / "earlier.json")
    config = configure(source, tmp_path / "c", quota=2.5, exclude=[str(earlier)])
    rows = choose_rows(model(), tokenizer, config)
    made = RowSelection.load(rows.save(tmp_path / "rows.json")).made
    assert made["quota"] == 2.5 and made["strategy"] == "layer_balanced"
    assert made["calibration"]["prompts"] == 90 and made["attribution"]["rule"] == "left"
    for layer, taken in zip(rows.rows, [[1, 2], [3], [4]], strict=True):
        assert len(layer) == 1 and not set(layer.tolist()) & set(taken)


def test_faults_are_found_before_the_first_prompt(tokenizer, source, tmp_path, analysed):
    with pytest.raises(ValueError, match="quota 0.5 % of 48 rows is no row at all"):
        choose_rows(model(), tokenizer, configure(source, tmp_path, quota=0.5))
    with pytest.raises(ValueError, match="rank = 9, but 9 rows train per layer"):
        choose_rows(model(), tokenizer, configure(source, tmp_path, rank=9))
    wrong = str(RowSelection([[1], [2]], 48).save(tmp_path / "wrong.json"))
    with pytest.raises(ValueError, match="2 layers x 48 rows, this model has 3 x 48"):
        choose_rows(model(), tokenizer, configure(source, tmp_path, exclude=[wrong]))
    assert analysed == []


def test_a_mixture_with_routed_experts_only_has_no_rows():
    from transformers import AutoConfig, AutoModelForCausalLM

    from loki_plugin import attribute, implant
    from loki_plugin.model.anatomy import find_anatomy
    from loki_plugin.model.linears import chosen, chosen_down

    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    with torch.device("meta"):
        mixtral = AutoModelForCausalLM.from_config(config)
    anatomy = find_anatomy(mixtral)
    assert not anatomy.down and len(anatomy.layers) == 2
    ids = torch.ones(1, 4, dtype=torch.long)
    for asked in (
        lambda: attribute(mixtral, ids),
        lambda: implant(mixtral, [[1], [2]]),
        lambda: chosen_down(anatomy, "down"),
    ):
        with pytest.raises(ValueError, match="'mixtral': model.layers.0 has routed experts only"):
            asked()
    assert chosen_down(anatomy, "all") == []
    assert len(chosen(mixtral, anatomy, "all")) == 2 * 4


def test_what_is_no_language_model_is_refused():
    from loki_plugin.model.anatomy import find_anatomy

    with pytest.raises(ValueError, match="no integer `hidden_size`"):
        find_anatomy(torch.nn.Linear(2, 2))


RANK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch.distributed as dist
from transformers import AutoTokenizer
from helpers.families import tiny
from helpers.runs import configure, model
from loki_plugin.analysing import analysis
from loki_plugin.pipeline import choose_rows
counted, inner = [], analysis.attribute_many
analysis.attribute_many = lambda *a: counted.append(len(a[2])) or inner(*a)
tokenizer, source, cache, out = sys.argv[1:]
dist.init_process_group("gloo")
cache = cache.format(rank=dist.get_rank())
rows = choose_rows(model(), AutoTokenizer.from_pretrained(tokenizer), configure(source, cache))
rows.save(f"{{out}}-{{dist.get_rank()}}.json")
open(f"{{out}}-{{dist.get_rank()}}.count", "w").write(str(sum(counted)))
"""


def run_two_ranks(tmp_path, tokenizer, source, cache):
    """The rows files of two ranks; `{rank}` in `cache` gives each a disk of its own."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "29611", str(script), str(tmp_path / "tokenizer"), source]
    subprocess.run([*command, cache, str(tmp_path / "rows")], check=True, timeout=300)
    return [tmp_path / f"rows-{r}.json" for r in range(2)]


@pytest.mark.slow
def test_two_ranks_share_the_work_and_agree_with_one(tokenizer, source, tmp_path):
    files = run_two_ranks(tmp_path, tokenizer, source, str(tmp_path / "shared"))
    assert files[0].read_bytes() == files[1].read_bytes()
    alone = choose_rows(model(), tokenizer, configure(source, tmp_path / "alone"))
    assert RowSelection.load(tmp_path / "rows-0.json") == alone
    (one,), (two,) = ((tmp_path / c).iterdir() for c in ("alone", "shared"))
    shards = sorted(p.name for p in one.glob("*.safetensors"))
    assert len(shards) == 2
    for name in shards:
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.slow
def test_two_ranks_without_a_common_disk_agree(tokenizer, source, tmp_path):
    files = run_two_ranks(tmp_path, tokenizer, source, str(tmp_path / "disk-{rank}"))
    assert files[0].read_bytes() == files[1].read_bytes()
    alone = choose_rows(model(), tokenizer, configure(source, tmp_path / "alone"))
    assert RowSelection.load(files[1]) == alone
    shards = [len(list((tmp_path / f"disk-{r}").glob("*/*.safetensors"))) for r in range(2)]
    assert shards == [2, 1]
    # Each prompt was analysed once: the second rank sent its shard.
    assert [int(f.with_suffix(".count").read_text()) for f in files] == [64, 26]


def test_stability_and_selection_from_the_cache_need_no_model(tokenizer, source, tmp_path):
    cache, out = str(tmp_path / "c"), tmp_path / "rows.json"
    rows = choose_rows(model(), tokenizer, configure(source, cache))
    runner = CliRunner()

    def run(*arguments):
        return runner.invoke(loki, [*arguments, "--dir", cache])

    result = run("select", "--quota", "20", "--output", str(out))
    assert result.exit_code == 0, result.output
    assert RowSelection.load(out).check(model()) == rows
    assert json.loads(out.read_text())["made"]["quota"] == rows.made["quota"] == 20
    key = rows.made["analysis"]
    result = run("select", key, "--quota", "20", "--positions", "--output", str(out))
    assert json.loads(out.read_text()) == [r.tolist() for r in rows.rows]
    result = run("stability", key, "--quota", "20", "--plot", str(tmp_path / "s.png"))
    assert result.exit_code == 0, result.output
    assert "overlap with the selection from all 90" in result.output and "enough" in result.output
    assert (tmp_path / "s.png").stat().st_size > 0
    result = run("stability", "nokey")
    assert result.exit_code == 1 and "has no analysis 'nokey'" in result.output
    next((tmp_path / "c" / key).glob("*.safetensors")).unlink()
    result = run("select", key)
    assert result.exit_code == 1 and "lacks 1 of 2 shards" in result.output


def test_memory_is_given_back_when_the_rows_are_chosen(tokenizer, source, tmp_path, monkeypatch):
    """After the last batch; also when an analysis breaks off."""
    told = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("given back"))
    batch = analysis.KERNELS["token"]

    def telling(*args):
        told.append("batch")
        return batch(*args)

    monkeypatch.setitem(analysis.KERNELS, "token", telling)
    choose_rows(model(), tokenizer, configure(source, tmp_path / "cache"))
    assert told[-2:] == ["batch", "given back"] and told.count("given back") == 1
    monkeypatch.setitem(analysis.KERNELS, "token", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        choose_rows(model(), tokenizer, configure(source, tmp_path / "another"))
    assert told.count("given back") == 2


@pytest.mark.parametrize("block", [{"strategy": "random"}, {"quota": 100}], ids=str)
def test_rows_that_no_score_decides_need_no_analysis(tmp_path, monkeypatch, block):
    """Drawn rows are those of an analysis, whose scores they do not depend on."""
    from loki_plugin import pipeline
    from loki_plugin.selecting.select import select_rows

    monkeypatch.setattr(pipeline, "analyse", lambda *a: pytest.fail("analysed"))
    config = configure("no/such/file.jsonl", tmp_path, **block, protect="off")
    rows = choose_rows(model(), None, config, Inputs.read(config, analysed=config.needs_scores))
    expected = select_rows(torch.randn(2, 3, 48), config.quota, config.strategy)
    assert [r.tolist() for r in rows.rows] == [r.tolist() for r in expected]
    assert rows.fingerprint and rows.made["strategy"] == config.strategy
    excluded = str(RowSelection([list(range(40))] * 3, 48).save(tmp_path / "taken.json"))
    config = configure("builtin", tmp_path, **block, exclude=[excluded])
    with pytest.raises(ValueError, match="has only 8 rows left"):
        choose_rows(model(), None, config, Inputs.read(config, analysed=False))


def test_too_few_rows_beside_the_excluded_ones_are_told_before_the_analysis(
    source, tokenizer, tmp_path, monkeypatch
):
    from loki_plugin import pipeline

    monkeypatch.setattr(pipeline, "load_prompts", lambda *a, **k: pytest.fail("analysed"))
    taken = str(RowSelection([list(range(48))] * 3, 48).save(tmp_path / "taken.json"))
    config = configure(source, tmp_path, exclude=[taken])
    with pytest.raises(ValueError, match=r"layer 0 has only 0 rows left .* the quota takes \d+"):
        choose_rows(model(), tokenizer, config)


def test_prompts_beyond_the_positions_that_a_model_has_learned_are_told_first(
    tokenizer, tmp_path, analysed
):
    rows = [{"prompt": "say the number"}, {"prompt": "and " * 100}]
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    gpt2, config = tiny("gpt2", vocab_size=400), configure(str(source), tmp_path / "c")
    with pytest.raises(ValueError, match="1 of 2 calibration prompts are too long"):
        choose_rows(gpt2, tokenizer, config)
    assert not analysed
    short = config.calibration.model_copy(update={"max_tokens": 64})
    choose_rows(gpt2, tokenizer, config.model_copy(update={"calibration": short}))
    assert analysed == [1]
