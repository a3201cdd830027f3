"""Is this checkpoint the model that rows were made on? Asked of its files, one tensor at a time."""

from __future__ import annotations

import hashlib

import torch
from tqdm import tqdm

from ..model.fingerprint import blocks_of, config_hash, is_quantisable, update
from .checkpoint import DTYPES, Checkpoint, matching_keys

_ADVICE = (
    "give the base (and revision) that the rows were made on. If you mean to use them on another"
    " one, take `fingerprint` out of the rows file"
)
_OVERRIDES = (
    "a run with `overrides_of_model_config` is merged with its own YAML, and verified with the rows"
    " file in the merged folder"
)


def check_base(base: Checkpoint, made_for: dict[str, str] | None, progress: bool = True) -> str:
    """Compare a checkpoint with the fingerprint in a rows file, one tensor in memory at a time.

    What is compared: the architecture; everything that quantisation leaves alone; and every weight
    where the rows were made on an unquantised base.

    Returns:
        What was compared, in words.

    Raises:
        ValueError: it is another model.
    """
    if made_for is None:
        return "not compared: the rows file holds no fingerprint"
    if made_for.get("config") != config_hash(base.model):
        raise ValueError(_another(base, f"its architecture differs ({_OVERRIDES})"))
    keys = {}
    for name, parameter in base.model.named_parameters():
        found = matching_keys(name, base.stored, base.renamed)
        if len(found) != 1 or base.stored[found[0]].shape != tuple(parameter.shape):
            return f"architecture only: the checkpoint stores {name} in another form"
        keys[name] = found[0]
    storage = made_for.get("quantisation", "")
    made_in = getattr(torch, storage.removeprefix("none:"), None) if ":" in storage else None
    digests = [_digests(base, keys, made_in, b, progress) for b in blocks_of(made_for)]
    identities, weights = (set().union(*some) for some in zip(*digests, strict=True))
    if made_for.get("identity") not in identities:
        raise ValueError(_another(base, "its embeddings or norms have other values"))
    if not weights:
        return "architecture, embeddings, norms and biases"
    if made_for.get("weights") not in weights:
        difference = "its weights have other values (a fine-tune of the same base?)"
        raise ValueError(_another(base, difference))
    return "architecture and every weight"


def _digests(
    base: Checkpoint,
    keys: dict[str, str],
    made_in: torch.dtype | None,
    block: int,
    progress: bool,
) -> tuple[set[str], set[str]]:
    """The possible `identity` and `weights`; the latter only where all linears were `made_in`."""
    linear = {id(m.weight) for m in base.model.modules() if is_quantisable(m)}
    parameters = dict(base.model.named_parameters())
    # A float16 load has rounded once more on the way to bfloat16 than a 32-bit or bfloat16 one.
    loads = [made_in] if made_in in DTYPES.values() else [None, torch.float16]
    identities = [hashlib.sha256() for _ in loads]
    # Trainers may hold what is no linear layer in 32 bits.
    weights = [hashlib.sha256() for _ in range(2)] if made_in in DTYPES.values() else []
    order = sorted(keys)
    for name in tqdm(order, desc="loki: identifying the base", disable=not progress):
        tensor = base.stored[keys[name]].tensor()
        plain = id(parameters[name]) not in linear
        for load, identity in zip(loads, identities, strict=True):
            if plain:
                loaded = tensor if load is None else tensor.to(load)
                update(identity, name, loaded.to(torch.bfloat16), block)
        for digest, other in zip(weights, (made_in, torch.float32), strict=False):
            loaded = tensor.to(made_in)
            update(digest, name, loaded.to(other) if plain else loaded, block)
    return {d.hexdigest() for d in identities}, {d.hexdigest() for d in weights}


def _another(base: Checkpoint, difference: str) -> str:
    return f"the rows were made on another model than '{base.folder}': {difference}; {_ADVICE}"
