"""Seconds and memory to select rows from a score log on disk, and to measure their stability.

    python -m benchmarks.selecting                      # seconds and memory
    python -m benchmarks.selecting --reference CLONE    # and the authors' function beside ours

Scores are random around a fixed mean per row. Each case runs in a process of its own, so that its
memory is not another's leftovers; the log was just written, so it is in the page cache if it fits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from importlib.metadata import version

import torch

from benchmarks.machine import PeakMemory, authors
from benchmarks.writer import command, write
from loki_plugin.analysing.scores.log import ScoreLog
from loki_plugin.choices import STRATEGIES
from loki_plugin.selecting.select import select_rows
from loki_plugin.selecting.stability import bootstrap_overlap

AUTHORS_SELECTION = "a63aec3:src/loki/selection/layer_balanced.py"


def manifest(options) -> dict:
    names = [str(i) for i in range(options.prompts)]
    return {"prompts": names, "num_layers": options.layers, "hidden_size": options.hidden}


def fill(log: ScoreLog) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(log.shape, generator=generator)
    for shard in range(log.num_shards):
        noise = torch.randn(len(log.prompts(shard)), *log.shape, generator=generator)
        log.write(shard, 1e-4 * (mean + noise))


def measure(case: str, folder: str, options) -> dict:
    torch.set_num_threads(options.threads)
    log = ScoreLog(folder, manifest(options))
    cpu = torch.device("cpu")
    with PeakMemory(cpu) as memory:
        start, used = time.perf_counter(), time.process_time()
        if case == "read only":
            for chunk in log.read():
                chunk.sum()
        elif case == "stability, 10 rounds":
            bootstrap_overlap(log.read(), options.quota, prompts=options.prompts)
        else:
            select_rows(log.read(), options.quota, case)
        seconds, used = time.perf_counter() - start, time.process_time() - used
    return {
        "what": case,
        "seconds": f"{seconds:.2f}",
        "cpu_seconds": f"{used:.2f}",
        "peak_MiB": round(memory.peak / 2**20),
    }


def beside_the_authors(clone: str, quota: float) -> str:
    """Run the authors' layer-balanced selection, from a clone of their repository, and compare."""
    theirs = authors(clone, AUTHORS_SELECTION, "layer_balanced")
    scores = torch.randn(300, 8, 512, generator=torch.Generator().manual_seed(0))
    with contextlib.redirect_stdout(io.StringIO()):
        positions = theirs.select_trainable_nodes_layer_balanced(scores.numpy(), quota)
    ours = select_rows(scores, quota)
    count = len(ours[0])
    votes = torch.zeros(8, 512).index_put_(
        (torch.arange(8)[None, :, None], scores.argsort(-1)[..., :count]),
        torch.ones(()),
        accumulate=True,
    )
    other = ties = 0
    for mine, yours, tally in zip(ours, positions, votes, strict=True):
        limit = tally.sort(descending=True).values[count - 1]
        different = set(mine.tolist()) ^ set(yours)
        other += len(different)
        ties += sum(float(tally[j]) == float(limit) for j in different)
    return (
        f"The authors' function (a clone of their repository, N = 300, L = 8, H = 512): of"
        f" {8 * count} rows {other // 2} are others; {ties} of these {other} have exactly the votes"
        " of the last place, where their sort decides and our tie rule."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", help="a clone of the LoKI authors' repository")
    parser.add_argument("--prompts", type=int, default=2850)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--quota", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        fill(ScoreLog(folder, manifest(options)))
        for case in ("read only", *STRATEGIES, "stability, 10 rounds"):
            # A fresh process, so that the peak is this case's alone.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (case, folder, options)))
            print(rows[-1], flush=True)
    size = f"N = {options.prompts}, L = {options.layers}, H = {options.hidden}"
    beside = beside_the_authors(options.reference, options.quota) if options.reference else ""
    about = (
        f"numpy {version('numpy')}; load average {load:.1f} when started (other work on the"
        f" machine). {size}, q = {options.quota:g} %, streamed from a score log on disk, in the"
        " page cache. `peak_MiB` is resident memory above the process's own before the case."
    )
    ran = command("selecting", CLONE=options.reference)
    write("selecting", about, ran, rows, more=beside)


if __name__ == "__main__":
    main()
