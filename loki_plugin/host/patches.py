"""What is changed in Axolotl itself.

Our log is shown, merging a LoKI run and saving a sharded one is ours, evaluating one says that it
evaluates, and what an earlier run left in a class of attention does no harm.
"""

from __future__ import annotations

import functools
import logging
import sys
from contextvars import ContextVar
from pathlib import Path
from types import MethodType

import click
import yaml
from torch import nn

from .. import ranks
from ..implanting.saved import WEIGHTS
from ..rows import FILE_NAME as ROWS_NAME

LOG = logging.getLogger("loki_plugin")


class _ToAxolotl(logging.Handler):
    """Axolotl silences INFO of every logger that is not its own; ours speak through its.

    The other ranks know nothing that the first does not say, but for their warnings.
    """

    def emit(self, record):
        if record.levelno <= logging.INFO and not ranks.is_first():
            return
        record.name = "axolotl.loki"
        logging.getLogger("axolotl").handle(record)


def show_log() -> None:
    LOG.filters.clear()  # Axolotl's logger class adds its name filter to loggers made after it
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    if not any(isinstance(h, _ToAxolotl) for h in LOG.handlers):
        LOG.addHandler(_ToAxolotl())


def take_over_merge() -> bool:
    """`axolotl merge-lora` on a LoKI run uses our merge; returns whether this is new.

    Axolotl's default method round-trips every matrix of a 4-bit run through NF4, and its legacy
    method rounds the whole base to `torch_dtype`: both change frozen rows.
    """
    from axolotl.cli import merge_lora
    from axolotl.integrations.base import PluginManager

    original = merge_lora.do_merge_lora
    if getattr(original, "merges_loki", False):
        return False

    def do_merge_lora(*, cfg):
        if cfg.loki is None:
            return original(cfg=cfg)
        from ..implanting.proven import merge_run
        from ..picturing.card import write_merged_card

        adapters = [adapter_to_merge(cfg)]
        merged, proof = merge_run(cfg, adapters, Path(cfg.output_dir) / "merged")
        write_merged_card(str(cfg.base_model), adapters, merged, proof)
        manager = PluginManager.get_instance()
        if hasattr(manager, "post_lora_merge"):  # since 0.21: for other plugins
            manager.post_lora_merge(cfg, str(adapters[0]), str(merged.output))

    do_merge_lora.merges_loki = True  # type: ignore[attr-defined]
    do_merge_lora.original = original  # type: ignore[attr-defined]
    merge_lora.do_merge_lora = do_merge_lora
    return True


def adapter_to_merge(cfg) -> Path:
    """The adapter that `axolotl merge-lora` merges: what the run made, as `loki merge` takes it.

    A run that went on from an earlier adapter has that one in its YAML as `lora_model_dir`, and
    Axolotl would merge it, without what the run has learned. `--lora-model-dir` on the command
    line is followed.

    Raises:
        ValueError: both folders hold an adapter, and nothing tells which is meant.
    """
    named, made = Path(cfg.lora_model_dir), Path(cfg.output_dir)
    finished = (made / ROWS_NAME).is_file() and (made / WEIGHTS).is_file()
    if not finished or named.resolve() == made.resolve():
        return named
    on_command_line = _names_adapter_on_command_line(cfg)
    if on_command_line is None:
        raise ValueError(
            f"lora_model_dir is '{named}', and output_dir '{made}' holds an adapter too: expected"
            " one that is to be merged. For what this run made use `axolotl loki merge`, or delete"
            f" `lora_model_dir` from the YAML; for '{named}' use `axolotl merge-lora` with"
            " `--lora-model-dir`"
        )
    if on_command_line:
        return named
    LOG.warning(
        "loki: merging '%s', which this run made, and not lora_model_dir '%s', from which it went"
        " on; `--lora-model-dir` on the command line merges that one",
        made,
        named,
    )
    return made


def _names_adapter_on_command_line(cfg) -> bool | None:
    """Whether `lora_model_dir` comes from the command line and not from the YAML.

    Axolotl writes the options over the YAML's keys, so that the configuration does not tell. None
    where the command was not started by click and both may say the same.
    """
    context = click.get_current_context(silent=True)
    if context is not None and "lora_model_dir" in context.params:
        return context.params["lora_model_dir"] is not None
    try:
        written = yaml.safe_load(Path(str(cfg.axolotl_config_path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    same = isinstance(written, dict) and written.get("lora_model_dir") == cfg.lora_model_dir
    return None if same else True


def give_back_merge() -> None:
    """Undo `take_over_merge`."""
    from axolotl.cli import merge_lora

    merge_lora.do_merge_lora = merge_lora.do_merge_lora.original


def take_over_sharded_saving() -> None:
    """An FSDP2 adapter with confined rows is saved by us.

    Axolotl writes its parameters, and lora_B has none in the dense form, and only those of its
    rows in the low-rank form.
    """
    from axolotl.integrations.expert_parallel import shard

    from ..implanting.adapter import constrained_modules
    from ..implanting.saved import save_sharded

    original = shard.save_fsdp2_lora_adapter
    if getattr(original, "saves_loki", False):
        return

    @functools.wraps(original)
    def save_fsdp2_lora_adapter(model, output_dir):
        if not any(True for _ in constrained_modules(model)):
            return original(model, output_dir)
        save_sharded(model, lambda state: model.save_pretrained(output_dir, state_dict=state))
        return True

    save_fsdp2_lora_adapter.saves_loki = True  # type: ignore[attr-defined]
    shard.save_fsdp2_lora_adapter = save_fsdp2_lora_adapter


def mend_attention(model: nn.Module) -> None:
    """Let a model attend though an earlier LoRA run of this process has changed its class.

    With `lora_qkv_kernel` or `lora_o_kernel` Axolotl rewrites the forward of the attention class,
    for good, so that it calls `apply_qkv` and `apply_o`; but only the models of such runs get
    these. Here they are Axolotl's own plain ones.
    """
    for module in model.modules():
        if not hasattr(type(module), "_original_forward") or hasattr(module, "apply_qkv"):
            continue
        from axolotl.monkeypatch import lora_kernels as kernels

        plain = getattr(module, "v_proj", None) is not None
        qkv = kernels.original_apply_qkv if plain else kernels.original_apply_qkv_optional_v
        module.apply_qkv = MethodType(qkv, module)
        module.apply_o = MethodType(kernels.original_apply_o, module)


_EVALUATING = ContextVar("evaluating", default=False)


def evaluating() -> bool:
    """Whether `axolotl evaluate` is loading a model; no key of its configuration says so."""
    return _EVALUATING.get()


def mark_evaluation() -> None:
    """Make `evaluating()` true while `axolotl evaluate` runs."""
    module = sys.modules.get("axolotl.evaluate")
    if module is None or getattr(module.setup_model_and_tokenizer, "marks_evaluation", False):
        return
    load, make_trainer = module.setup_model_and_tokenizer, module.setup_trainer

    def marked(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            token = _EVALUATING.set(True)
            try:
                return function(*args, **kwargs)
            finally:
                _EVALUATING.reset(token)

        call.marks_evaluation = True  # type: ignore[attr-defined]
        return call

    vars(module).update(setup_model_and_tokenizer=marked(load), setup_trainer=marked(make_trainer))
