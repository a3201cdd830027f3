"""Lets pages link to `benchmarks/results/`, which stands beside `docs/`: the site has it inside."""

from __future__ import annotations

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SHOWN = (".md", ".png")


def on_files(files, config):
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in SHOWN:
            files.append(
                File.generated(config, f"results/{path.name}", abs_src_path=str(path.resolve()))
            )
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown.replace("../benchmarks/results/", "results/")
