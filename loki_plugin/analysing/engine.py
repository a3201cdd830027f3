"""The growing stack: all (layer, step) pairs of a batch of prompts in one pass upwards.

Attention is causal, so replacing the last token's down-projection output at layer l changes nothing
at earlier positions. Each (layer, step) pair is one more token at the prompt's last position, alive
from layer l upwards, that attends to the kept prefix and to itself. Work per prompt: T + S·(L+1)/2
token-forwards instead of the obvious loop's L·S·T. It is exact, not an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..anatomy import Anatomy, linear_sizes
from ..quantised import quantised_modules, unpack
from . import attention
from .attention import AttentionState, PrefixDone

# Float32 logits held at once: what a cache holds, but rows enough to pay for reading the head, so
# that a 152k vocabulary never materialises L·S·B x V.
_LOGIT_BYTES, _LOGIT_ROWS = 16 << 20, 256


def attribute_batch(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: list[torch.Tensor],
    targets: list[int | None],
    nodes: list[float],
    weights: list[float],
) -> torch.Tensor:
    """Scores of one batch: z_l[j] · Σ_k w_k ∂p/∂z_l[j] at z_l = α_k z_l -> [B, L, H].

    `model` must be inside `quiet(model)`. `prompts` are 1-D id tensors without padding; a target
    of None is the model's own arg-max. The result is on the model's device, float32 (float64 for
    a float64 model).
    """
    device = model.get_input_embeddings().weight.device
    lengths = torch.tensor([len(p) for p in prompts])
    # Padding stands on the right, after every real token, where causal attention never looks.
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    last = (lengths - 1).to(device)
    state = AttentionState(
        last=last,
        final_layer=anatomy.num_layers - 1,
        uniform=bool((lengths == lengths[0]).all()),
    )
    with state, ExitStack() as hooks:
        hooks.enter_context(watched(model, anatomy, state))
        run_prefix(anatomy, state, ids)
        state.mode = "stack"
        stack = _Stack(anatomy, state, nodes, len(prompts))
        hooks.enter_context(stack.hooked())
        with torch.enable_grad():
            hidden = anatomy.decoder(
                input_ids=ids.gather(1, last[:, None]),
                position_ids=last[:, None],
                use_cache=False,
            ).last_hidden_state
            hidden = hidden.reshape(len(prompts), -1, hidden.shape[-1])  # GPT-2 flattens the rows
    y = resolve_targets(model, anatomy, hidden[:, :1].detach(), targets)
    upstream, p = head_gradient(model, anatomy, hidden.detach(), y)
    grads = torch.autograd.grad(hidden, stack.leaves, upstream)
    # ∂p = p · ∂log p: the backward carries log p, which no half precision underflows.
    w = torch.tensor(weights, dtype=p.dtype).to(p.device)
    factors = w * p[:, 1:].view(len(prompts), -1, len(nodes))  # [B, L, S]
    scores = [
        z[:, 0].to(p.dtype) * torch.einsum("bs,bsh->bh", factors[:, i].to(g.device), g.to(p.dtype))
        for i, (z, g) in enumerate(zip(stack.outputs, grads, strict=True))
    ]
    return torch.stack([s.to(device) for s in scores], 1)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, our attention; all put back on the way out."""
    training = {id(m) for m in model.modules() if m.training}
    trainable = [p for p in model.parameters() if p.requires_grad]
    configs = {id(m.config): m.config for m in model.modules() if _has_attention_setting(m)}
    settings = [(c, c._attn_implementation_internal) for c in configs.values()]
    unpack(model)
    try:
        model.eval()
        for module in quantised_modules(model):
            # They have no dropout, and compute as they will train: in evaluation, on a CPU, 4-bit
            # weights would repack themselves and lose their gradient, 8-bit ones round their input.
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(False)
        for config, _ in settings:
            config._attn_implementation_internal = _implementation(model)
        yield
    finally:
        for config, value in settings:
            config._attn_implementation_internal = value
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in model.modules():
            module.training = id(module) in training


def _implementation(model: nn.Module) -> str:
    """Our entry in transformers' attention interface, or the plain call that we intercept."""
    return attention.NAME if model._supports_attention_backend else "sdpa"


def _has_attention_setting(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation_internal")


@contextmanager
def watched(model: nn.Module, anatomy: Anatomy, state: AttentionState) -> Iterator[None]:
    """Tell `state` which layer runs, and catch plain attention calls where the family has them."""
    with ExitStack() as stack:
        if _implementation(model) == "sdpa":
            stack.enter_context(attention.SdpaCalls())
        for i, layer in enumerate(anatomy.layers):
            stack.enter_context(removing(layer.register_forward_pre_hook(_at(state, i))))
        yield


def _at(state: AttentionState, index: int):
    def enter_layer(module, args):
        state.layer = index

    return enter_layer


@contextmanager
def removing(handle):
    try:
        yield
    finally:
        handle.remove()


def run_prefix(anatomy: Anatomy, state: AttentionState, ids: torch.Tensor) -> None:
    with torch.no_grad():
        try:
            anatomy.decoder(input_ids=ids, use_cache=False)
        except PrefixDone:
            return
    raise ValueError(
        f"model family '{anatomy.decoder.config.model_type}' does not attend through transformers'"
        " attention interface or scaled_dot_product_attention in every layer (seen in layers"
        f" {sorted(state.keys)}), so its keys and values cannot be kept; loki cannot analyse it"
    )


class _Stack:
    """Grows the stack: row 0 is the plain last token, then S rows for each layer passed."""

    def __init__(self, anatomy, state, nodes, batch):
        self.anatomy, self.state, self.nodes, self.batch = anatomy, state, nodes, batch
        self.leaves: list[torch.Tensor] = []  # per layer α_k·z_l, [B, S, H], requires grad
        self.outputs: list[torch.Tensor] = []  # per layer z_l, [B, 1, H]
        self._memo: dict[nn.Module, torch.Tensor] = {}

    @contextmanager
    def hooked(self):
        with ExitStack() as stack:
            for layer, down in zip(self.anatomy.layers, self.anatomy.down, strict=True):
                linears = linears_of(layer)
                for module in linears:
                    stack.enter_context(removing(module.register_forward_hook(self._remember)))
                hook = layer.register_forward_hook(self._grow(down, linears), with_kwargs=True)
                stack.enter_context(removing(hook))
            yield

    def _remember(self, module, args, output):
        if self.state.mode == "stack":
            rows = output.view(self.batch, -1, output.shape[-1])  # OPT flattens batch and rows
            self._memo[module] = rows[:, :1].detach()

    def _grow(self, down, linears):
        def grow(layer, args, kwargs, output):
            if self.state.mode != "stack":
                return output
            first = output[0] if isinstance(output, tuple) else output
            z = self._memo[down]
            alpha = torch.tensor(self.nodes, dtype=z.dtype).to(z.device, non_blocking=True)
            leaf = (alpha[:, None] * z).requires_grad_()  # [B, S, H]
            self.outputs.append(z)
            self.leaves.append(leaf)
            rows = leaf.shape[1]
            answers = {m: self._memo[m].expand(-1, rows, -1) for m in linears}
            answers[down] = leaf.clone()  # Falcon adds to it in place
            row = hidden_of(args, kwargs)[:, :1].detach().expand(-1, rows, -1)
            grown = torch.cat([first, replay(self.state, layer, args, kwargs, row, answers)], 1)
            self._memo.clear()
            return (grown, *output[1:]) if isinstance(output, tuple) else grown

        return grow


def hidden_of(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def call(layer: nn.Module, args: tuple, kwargs: dict, hidden: torch.Tensor) -> torch.Tensor:
    """Call a layer as it was called, on other hidden states; returns hidden states."""
    if args:
        output = layer(hidden, *args[1:], **kwargs)
    else:
        output = layer(**{**kwargs, "hidden_states": hidden})
    return output[0] if isinstance(output, tuple) else output


def replay(state: AttentionState, layer, args, kwargs, hidden, answers) -> torch.Tensor:
    """The layer's own code on `hidden` where every linear answers with what it is given.

    Only norms and residual sums are computed: whatever the family does between its linears is
    exact, and costs next to nothing.
    """
    mode, state.mode = state.mode, "replay"
    try:
        with answering(answers):
            return call(layer, args, kwargs, hidden)
    finally:
        state.mode = mode


def linears_of(layer: nn.Module) -> list[nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        if linear_sizes(module) and not any(name.startswith(n + ".") for n in found):
            found[name] = module
    return list(found.values())


@contextmanager
def answering(answers: dict[nn.Module, torch.Tensor]):
    """For the duration, each module's forward returns the given [B, S, F] tensor."""
    saved = {m: m.__dict__.get("forward") for m in answers}
    try:
        for module, answer in answers.items():
            module.forward = _answer(answer)
        yield
    finally:
        for module, forward in saved.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _answer(tensor):
    def forward(x, *_, **__):
        return tensor if x.dim() == 3 else tensor.reshape(-1, tensor.shape[-1])

    return forward


def resolve_targets(model, anatomy, hidden, targets: list[int | None]) -> torch.Tensor:
    """The tokens y [B]: as given, or the arg-max behind the final states `hidden` [B, 1, H]."""
    with _decoder_returns(anatomy.decoder) as head, torch.no_grad():
        predicted = head(model, hidden)[:, 0].argmax(-1)
    given = torch.tensor([-1 if t is None else t for t in targets]).to(predicted.device)
    return torch.where(given < 0, predicted, given)


def head_gradient(model, anatomy, hidden, y) -> tuple[torch.Tensor, torch.Tensor]:
    """∂(Σ log p)/∂hidden and p = softmax(logits)[y] of n rows per prompt, by the model's own head.

    `hidden` [B, n, H] -> [B, n, H] and [B, n].
    """
    flat = hidden.flatten(0, 1)
    of_y = y.repeat_interleave(hidden.shape[1])[:, None]
    upstream, p = torch.empty_like(flat), []
    text_config = model.config.get_text_config()
    chunk = max(_LOGIT_ROWS, _LOGIT_BYTES // (4 * text_config.vocab_size))
    with _decoder_returns(anatomy.decoder) as head:
        for part in range(0, len(flat), chunk):
            rows = slice(part, part + chunk)
            states = flat[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(model, states[None])
            # ∂log p/∂logits = onehot(y) - softmax(logits), written over the softmax itself.
            wide = torch.promote_types(logits.dtype, torch.float32)
            by_logits = logits[0].detach().to(wide).softmax(-1)
            p.append(by_logits.gather(1, of_y[rows]))
            by_logits.neg_().scatter_(1, of_y[rows], 1 - p[-1])
            by_logits = by_logits.to(logits.dtype)[None]
            upstream[rows] = torch.autograd.grad(logits, states, by_logits)[0]
    return upstream.view_as(hidden), torch.cat(p).view(hidden.shape[:2])


@contextmanager
def _decoder_returns(decoder: nn.Module):
    """Run the model's head alone: its decoder is short-circuited to hand back given states."""
    saved = decoder.__dict__.get("forward")

    def head(model, hidden):
        # The widest of the output classes: GPT-2 reads `cross_attentions` from it.
        states = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
        decoder.forward = lambda *_, **__: states
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits

    try:
        yield head
    finally:
        if saved is None:
            decoder.__dict__.pop("forward", None)
        else:
            decoder.forward = saved
