"""An adapter that goes on (`lora_model_dir`): what its files say, before the model is loaded."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import torch
from torch import nn

from ..args import LokiConfig
from ..choices import LINEAR_RANK
from ..implanting.checkpoint import open_tensors
from ..implanting.saved import WEIGHTS
from ..protecting.directions import FILE_NAME as DIRECTIONS_NAME
from ..rows import FILE_NAME, RowSelection


def rows_of(folder: Path, config: LokiConfig) -> RowSelection:
    """The rows of an adapter that goes on; they may not be others than the block asks for.

    Raises:
        ValueError: no rows file, other rows than the block's, or another rank.
    """
    if not (folder / FILE_NAME).is_file():
        raise ValueError(
            f"lora_model_dir '{folder}' has no {FILE_NAME}, so it cannot be told which rows it"
            " trains; give a local folder that loki saved, or copy the rows file of its run there,"
            f" and with it {DIRECTIONS_NAME} where that run was protected: without it nothing would"
            " be protected here"
        )
    rows = RowSelection.load(folder / FILE_NAME)
    if config.rows and RowSelection.load(config.rows) != rows:
        raise ValueError(
            f"loki.rows '{config.rows}' are not the rows of lora_model_dir '{folder}', and an"
            " adapter keeps its rows; take `rows` out of the `loki:` block, or start a new adapter"
        )
    _check_rank(folder, rows, config.rank)
    _check_linear_rank(folder, rows, config.linear_rank or LINEAR_RANK)
    return rows


def _check_rank(folder: Path, rows: RowSelection, rank: int | None) -> None:
    """Check that the adapter has the rank of the run in its down-projections."""
    had = sorted(
        shape[0]
        for key, shape in _shapes(folder).items()
        if key.endswith(".lora_A.weight") and not any(f".{n}.lora" in key for n in rows.linears)
    )
    dense = sorted(count for count in rows.counts if count)
    if not had or had == (dense if rank is None else [rank] * len(dense)):
        return
    if had == dense:
        raise ValueError(
            f"lora_model_dir '{folder}' is dense, and this run has `loki.rank: {rank}`; an adapter"
            " keeps its form: take `rank` out of the `loki:` block"
        )
    raise ValueError(
        f"lora_model_dir '{folder}' has rank {had[0]} in its down-projections, and this run is"
        f" {'dense' if rank is None else f'of rank {rank}'}; an adapter keeps its form: set"
        f" `loki: {{rank: {had[0]}}}`"
    )


def _check_linear_rank(folder: Path, rows: RowSelection, rank: int) -> None:
    """Check that the adapter has the rank of the run in its further linears."""
    had = {
        shape[0]
        for key, shape in _shapes(folder).items()
        if key.endswith(".lora_A.weight") and any(f".{n}.lora" in key for n in rows.linears)
    }
    if had and had != {rank}:
        raise ValueError(
            f"lora_model_dir '{folder}' has rank {max(had)} in its further linears, and this run is"
            f" of rank {rank} there; an adapter keeps its form: set"
            f" `loki: {{linear_rank: {max(had)}}}`"
        )


def check_tokens(cfg, tokens: int, rows: int) -> None:
    """Check that the embeddings of an adapter that goes on are as many as the run's.

    Args:
        tokens: of the run's tokenizer.
        rows: embeddings of the base as it was loaded.

    Raises:
        ValueError: they are more or fewer.
    """
    folder = Path(str(cfg.lora_model_dir or ""))
    if not cfg.lora_model_dir or not (folder / WEIGHTS).is_file():
        return
    wanted = 32 * ceil(tokens / 32) if cfg.resize_token_embeddings_to_32x else tokens
    wanted = wanted if wanted > rows or cfg.shrink_embeddings else rows
    had = {shape[0] for key, shape in _shapes(folder).items() if ".lora_" not in key}
    if had and had != {wanted}:
        raise ValueError(
            f"lora_model_dir '{folder}' was trained with {max(had)} embeddings, and this run has"
            f" {wanted}: give the `tokens` and `special_tokens` with which it was trained, or merge"
            " it and start from the merged model"
        )


def take_new_embeddings(model: nn.Module, checkpoint: str | None, tokens: int) -> None:
    """The embeddings of added tokens as a checkpoint has them, into the model that resumes from it.

    They were drawn in the run that was stopped. The trainer loads them anyway; before that they are
    others than those that the finished run is compared with.

    Args:
        tokens: embeddings of the base, which stay.
    """
    file = Path(checkpoint or "") / WEIGHTS
    if not checkpoint or not file.is_file():
        return
    mine = dict(model.named_parameters())
    with open_tensors(file) as stored, torch.no_grad():
        for key in stored.keys():
            if ".lora_" not in key and key in mine:
                saved = stored.get_tensor(key)
                if saved.shape == mine[key].shape:
                    mine[key][tokens:] = saved[tokens:].to(mine[key])


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Of every tensor of a saved adapter; none where it has no safetensors file."""
    if not (folder / WEIGHTS).is_file():
        return {}
    with open_tensors(folder / WEIGHTS) as stored:
        return {key: stored.get_slice(key).get_shape() for key in stored.keys()}
