"""From the results files to figures and words: `docs/evidence.md`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.forgetting import overlap
from benchmarks.forgetting.matching import (
    MATCHED,
    SCREENED,
    Runs,
    against,
    matched,
    noise_floor,
    noise_share,
    r_squared,
    read,
    targets,
    tried,
)
from benchmarks.forgetting.picture import plot
from benchmarks.forgetting.sweep import about, results
from benchmarks.real import front
from benchmarks.writer import command, table

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence.md"
_RIVAL = "lora_all_r16"
# The main arms as a reader knows them.
_WORDS = {
    "loki_soft99_q90": "LoKI, quota 90, `protect: {inputs: 0.99, soft: true}`",
    "loki_soft99_written_anchor_q90": "the same and `anchor: 1.0, text: self`",
    "loki_written_anchor_q90": "LoKI, quota 90, `protect: {anchor: 1.0, text: self}`",
    "loki_soft99_anchor_q90": "LoKI, quota 90, soft inputs, anchor on calibration prompts only",
    "random_soft99_q90": "random rows, 90 %, soft inputs",
    "loki_soft99_q30": "LoKI, quota 30, soft inputs",
    "loki_soft99_lowrank_q90": "LoKI, quota 90, `rank: 16`, soft inputs",
    "loki_written_anchor_lowrank_q90": "LoKI, quota 90, `rank: 16`, anchor on own text",
    "lora_written_anchor": "LoRA r16, all linears, anchor on own text",
    "lora_soft99_written_anchor": "LoRA r16, all linears, soft inputs, anchor on own text",
    "lora_soft99": "LoRA r16, all linears, soft inputs",
    "lora_anchor": "LoRA r16, all linears, anchor on calibration prompts",
    "osf": "OSF",
    "freeze_bottom": "freezing the lower layers",
    "full": "full fine-tuning at a low rate",
    "loki_q30": "LoKI, quota 30: the paper's",
    "random_q30": "random rows, 30 %",
    "lora_replay1": "LoRA r16, 1 % real replay",
}
_NOISE = (
    "The same arm with another order of the data and another start of what is new, at the matched"
    " score. Leads smaller than the largest of these on any base, as a share of what was forgotten,"
    " or than the spread of seeds, count as none."
)


def write(folder: Path, evidence: Path = EVIDENCE) -> None:
    """`docs/evidence.md` and the plot, from what is in the results folder."""
    screen, final = (read(folder / results(stage)) for stage in ("screen", "final"))
    if not screen and not final:
        raise SystemExit(f"'{folder}' has no results yet; run `screen` first")
    first = about(folder / results("final" if final else "screen"))
    own = {folder / results("final")}
    files = [f for s in ("final", "reported") for f in sorted(folder.glob(f"forgetting_{s}*.csv"))]
    others = [(about(f), read(f)) for f in files if f not in own]
    bases = [(_title(first), final or screen), *((_title(kept), runs) for kept, runs in others)]
    parts = [_head(first) + _written(read(folder / overlap.FILE))]
    columns = {
        f"{title}: {task}": [r for r in runs if r["task"] == task]
        for title, runs in bases
        for task in MATCHED
        if any(r["task"] == task for r in runs)
    }
    plot(columns, folder / "forgetting_pareto.png")
    parts += _in_short(columns)
    noise = noise_floor(final)
    share = noise_share([x for _, runs in bases for x in noise_floor(runs)])
    stages = (("Finalists", final, MATCHED), ("Screening", screen, SCREENED))
    for title, runs, scores in stages:
        if runs:
            shown = [_shown(x) for x in matched(runs, scores)]
            parts += [f"## {title}", _about(runs, scores), table(shown)]
    parts += [_other(*other, share) for other in others]
    for title, runs, scores in stages:
        aims = targets(matched(runs, scores), share)
        parts += [f"## What was aimed at: {title.lower()}", table(aims)] if aims else []
    if noise:
        parts += ["## How much is noise", _NOISE, table([_shown(x) for x in noise])]
    parts += _tries(bases if final else [])
    parts += _through(folder)
    everything = screen + final
    parts += ["## What predicts forgetting", _predictors(everything)]
    silenced = read(folder / "suppress.csv")
    if silenced:
        parts += [
            "## Do the scores tell what matters?",
            "The lowest, highest and random rows of every layer are silenced in the base (no"
            " training): share of the known answers that stay right, and rise of cross-entropy.",
            table([{k: str(v).replace("|", "\\|") for k, v in x.items()} for x in silenced]),
        ]
    parts += [_limits()]
    evidence.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"written: {evidence}")


def _in_short(columns: dict[str, Runs]) -> list[str]:
    """Arms that ran on several bases or tasks, against LoRA r16 there; the picture."""
    rows = against(columns)
    picture = [
        "![Task score against forgetting](../benchmarks/results/forgetting_pareto.png)",
        "Each line is an arm, each point a learning rate (seed 0); dotted: the matched score.",
    ]
    if not rows:
        return picture
    return [
        "## In short",
        "Forgetting (rise of cross-entropy on what the base knew) at the matched task score, as a"
        " share of what LoRA r16 forgets there with the same seeds (number of seeds). Empty: not"
        " run. `-`: the score was not reached. The last line has LoRA's own figure.",
        table(_in_words(columns)),
        "All arms that ran in three columns or more, by their names in the code. The mean is"
        " geometric, over what has been run, so that arms that ran in few columns are to be"
        " compared column by column. Arms of one or two columns are in the tables below.",
        table(rows),
        *picture,
    ]


def _in_words(columns: dict[str, Runs]) -> list[dict]:
    """The main arms against LoRA r16, in words; the last line has what LoRA itself forgets."""
    found = {r["arm"]: r for r in against(columns, least=1)}
    params: dict[str, list[float]] = {}
    for runs in columns.values():
        for r in runs:
            params.setdefault(r["arm"], []).append(r["params"])

    def line(arm: str, name: str, cells: dict) -> dict:
        trained = f"{min(params[arm]) / 1e3:.0f} k"
        return {"": name, "trained, smallest base": trained} | cells

    rows = [
        line(arm, name, {c: found[arm].get(c, "") for c in columns})
        for arm, name in _WORDS.items()
        if arm in found
    ]
    own = {}
    for column, runs in columns.items():
        task = runs[0]["task"]
        (rival,) = matched([r for r in runs if r["arm"] == _RIVAL], {task: MATCHED[task]})
        own[column] = f"{rival['forgetting']:.3f} ({rival['seeds']})"
    return [*rows, line(_RIVAL, "LoRA r16, all linears: forgetting", own)]


def _tries(bases: list[tuple[str, Runs]]) -> list[str]:
    """What `TRIED` lists, base by base, where more than the paper's own way was run."""
    parts = []
    for title, runs in bases:
        rows = tried(matched(runs))
        if len(rows) > 1:
            parts += [f"{title}:", table([_shown(x) for x in rows])]
    if not parts:
        return []
    scores = ", ".join(f"{score} ({task})" for task, score in MATCHED.items())
    return [
        "## What was tried so that more is kept",
        f"Finalists' runs at a task score of {scores}.",
        *parts,
    ]


def _title(kept: dict) -> str:
    """0.5 M, world 0"""
    return f"{kept['base']['parameters'] / 1e6:.1f} M, world {kept['base']['seed']}"


def _other(kept: dict, runs: Runs, share: float) -> str:
    """The section of another base: its size, the arms, the aims."""
    lines, noise = matched(runs), noise_floor(runs)
    aims = targets(lines, share)
    parts = [
        f"## Parameters: {_title(kept)}",
        f"{_base(kept['base'])} {kept['machine']}.",
        _about(runs, MATCHED),
        table([_shown(x, 4) for x in lines]),
    ]
    parts += ["What was aimed at:", table(aims)] if aims else []
    parts += [_NOISE, table([_shown(x, 4) for x in noise])] if noise else []
    return "\n\n".join(parts)


def _base(report: dict) -> str:
    size = report["size"]
    losses = {
        "training loss": "train_loss",
        "answers it has learned": "loss_on_seen_items",
        "sums it never saw": "loss_on_unseen_sums",
        "English text learned": "loss_on_training_text",
        "held out": "loss_on_held_out_text",
    }
    told = ", ".join(f"{what} {report[k]:.3g}" for what, k in losses.items() if k in report)
    return (
        f"The base: a Llama of {report['parameters']:,} parameters ({size['layers']} layers,"
        f" H = {size['hidden']}, I = {size['intermediate']}), trained from nothing on a generated"
        f" world (seed {report['seed']}; cross-entropy per token: {told})."
    )


def _head(kept: dict) -> str:
    return (
        f"# Evidence\n\n## Real pretrained models\n\n{_real()}\n\n## Small worlds\n\nThe rest"
        " of this page is background: models of 0.5 and 10.5 million parameters that have learned"
        " generated worlds. They tell orders, not sizes, and decide nothing about your model. Their"
        " protected inputs are those of version 0.6.0, whose moments were not normalised."
        f" Written by `{command('forgetting')}` from"
        f" `benchmarks/results/forgetting_*.csv`. {kept['machine']}.\n\n"
        f"{_base(kept['base'])} Calibration, anchors and protected inputs see half of the"
        " items of four kinds (people, arithmetic, opposites, instructions); measured are the other"
        " half and three kinds that no calibration covers (places, grammar, sequences).\n\n"
        "*retention*: share of what the base answered right that is still right; *forgetting*: rise"
        " of the answers' cross-entropy; both are means over the seven kinds, *uncovered* over the"
        " three. KL is forward KL(base || tuned) at the answers' positions."
    )


def _real() -> str:
    """What `python -m benchmarks.real report` fills, as it is now."""
    rows = front.kept()
    more = "All arms: [figures of real models](../benchmarks/results/real.md).\n\n" if rows else ""
    page = "docs/evidence.md"
    parts = [front.marked(name, page, rows) for name in ("table", "picture")]
    return more + "\n\n".join(parts)


def _written(found: Runs) -> str:
    if not found:
        return ""
    told = "; ".join(
        f"{r['standing']:.0f} of {r['measured']:.0f} in {r['texts']:.0f} texts"
        f" ({r['parameters'] / 1e6:.1f} M, world {r['base']:.0f})"
        for r in found
    )
    return (
        "\n\nArms called *written* also see what the base writes by itself (`protect.text: self`),"
        " which is of all kinds. Measured questions that stand there with their answers, seed 0:"
        f" {told}."
    )


def _about(runs: Runs, scores: dict[str, float]) -> str:
    hours = sum(r["seconds"] for r in runs) / 3600
    rates = max(len({r["lr"] for r in runs if r["arm"] == a}) for a in {r["arm"] for r in runs})
    return (
        f"{len(runs)} runs of {runs[0]['steps']:.0f} steps, {len({r['arm'] for r in runs})} arms,"
        f" up to {rates} learning rates,"
        f" {len({r['seed'] for r in runs})} seed(s), task(s)"
        f" {', '.join(dict.fromkeys(r['task'] for r in runs))}; {hours:.1f} hours of"
        " training on one thread."
        " Compared where each curve over learning rates first reaches a task score of"
        f" {_targets(runs, scores)}; `-` means that not every seed reached it."
        " `spread`: largest minus smallest seed."
    )


def _targets(runs: Runs, scores: dict[str, float]) -> str:
    """0.9 (facts), 0.8 (classes)"""
    tasks = dict.fromkeys(r["task"] for r in runs)
    return ", ".join(f"{scores[task]} ({task})" for task in tasks)


def _shown(line: dict, digits: int = 3) -> dict:
    return {
        k: "-" if v is None else (f"{v:.{digits}f}" if isinstance(v, float) else v)
        for k, v in line.items()
    }


def _through(folder: Path) -> list[str]:
    """The same runs as a user would start them beside those of the sweep, base by base."""
    tables = []
    for file in sorted(folder.glob("forgetting_final*.csv")):
        kept = about(file)
        rows = _agreement(read(folder / results("axolotl", kept["base"]["seed"])), read(file))
        tables += [f"{_title(kept)}:", table([_shown(x) for x in rows])] if rows else []
    if not tables:
        return []
    return [
        "## Through `axolotl train`",
        "The sweep trains in one process; here the same arms at one rate run as a YAML through the"
        " real command, with unpacked batches of as many sequences and Axolotl's own shuffling."
        " What the base writes itself has up to 128 tokens there, 40 in the sweep.",
        *tables,
    ]


def _agreement(checked: Runs, final: Runs) -> list[dict]:
    rows = []
    for run in checked:
        twin = next((r for r in final if _same(r, run)), None)
        if twin is None:
            continue
        row = {"arm": run["arm"], "task": run["task"], "lr": f"{run['lr']:.3g}"}
        for measure in ("task_score", "retention", "forgetting", "kl_general"):
            row |= {measure: twin[measure], f"{measure}, axolotl": run[measure]}
        rows.append(row)
    return rows


def _same(run: dict, other: dict) -> bool:
    return run["seed"] == 0 and all(run[k] == other[k] for k in ("arm", "task", "lr", "steps"))


def _predictors(runs: Runs) -> str:
    found = {p: r_squared(runs, p) for p in ("kl_task", "delta_norm", "kl_general")}
    return (
        f"R² over all {len(runs)} runs of a line through log(1 + x), for the rise of cross-entropy:"
        f" KL to the base on the new task {found['kl_task']:.2f}, ‖ΔW‖_F {found['delta_norm']:.2f},"
        f" KL on the measured kinds themselves {found['kl_general']:.2f}."
    )


def _limits() -> str:
    return (
        "## What this does not show\n\n"
        "The models are small, their worlds are made up, and what is asked is short. Orders"
        " between arms that are far apart can be expected elsewhere; sizes of effects cannot: a"
        " model of billions of parameters has far more rows and input directions than a task"
        " needs, these have not. The main arms have three seeds on the small base of world 1,"
        " most others one or two, and the larger bases have few arms, most with one seed. What"
        " these bases write by themselves is close to the sentences that they have learned;"
        " whether the text of a pretrained model covers as much of what it knows is not shown."
        " Bases of one seed differ from processor to processor; the file beside each file of"
        " results says which one it was. The screening has three rates per arm and few steps; a"
        " constrained update needs steps, and where there are few it needs a high rate and"
        " forgets more, so that only its orders among like arms count. Forgetting grows faster"
        " than the task score, so that a line between two distant rates overstates it. Facts are"
        " tested as they were taught: at rates a hundred times as high arms still know them when"
        " all else is lost, and of the three that were driven that far only LoRA's score"
        " collapsed. The task `calls` costs every arm without text of the base's own much of what"
        " these bases know. Nothing here has been measured on a pretrained model of billions of"
        " parameters; `docs/reproduce.md` says how to."
    )
