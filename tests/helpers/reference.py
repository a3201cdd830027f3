"""The slow truth: loops over prompts, layers and steps. No batching, no tricks."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Exact(TorchFunctionMode):
    """Keep a float64 model in float64: its norms and softmaxes otherwise pass through float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func is torch.Tensor.float:  # of position ids too, which meet float64 frequencies
            return tensor.double()
        if tensor is not None and tensor.dtype == torch.float64:
            casts = func in (torch.Tensor.to, torch.Tensor.type)
            if casts and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return tensor
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def loop(model, down, prompts, nodes, weights, targets=None):
    """score[b, l, j] = z[j] · Σ_k w_k ∂p/∂z[j], one plain full-prompt forward per (b, l, k).

    `down`: the down-projection modules in layer order; `prompts`: list of 1-D id tensors.
    """
    scores = []
    for b, ids in enumerate(prompts):
        with torch.no_grad():
            outputs, handles = {}, []
            for i, module in enumerate(down):
                handles.append(module.register_forward_hook(_keep(outputs, i, len(ids))))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -1]
            for handle in handles:
                handle.remove()
        y = int(logits.argmax()) if targets is None else int(targets[b])
        layers = []
        for i, module in enumerate(down):
            z = outputs[i]
            total = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
            for alpha, weight in zip(nodes, weights, strict=True):
                leaf = (alpha * z).detach().requires_grad_()
                handle = module.register_forward_hook(_replace(leaf, len(ids)))
                logits = model(input_ids=ids[None], use_cache=False).logits[0, -1]
                handle.remove()
                wide = torch.promote_types(logits.dtype, torch.float32)
                p = logits.to(wide).softmax(-1)[y]
                total += weight * torch.autograd.grad(p, leaf)[0]
            layers.append(z * total)
        scores.append(torch.stack(layers))
    return torch.stack(scores)


def _keep(outputs, i, length):
    def hook(module, args, output):
        outputs[i] = output.reshape(-1, output.shape[-1])[length - 1].detach().clone()

    return hook


def _replace(leaf, length):
    def hook(module, args, output):
        flat = output.reshape(-1, output.shape[-1])
        flat = torch.cat([flat[: length - 1], leaf[None]])
        return flat.view(output.shape)

    return hook


def obvious(model, down, ids, nodes, weights):
    """What every published implementation does: per layer, S copies of the whole prompt.

    One prompt `ids` [T]; logits at the last token only. Returns [L, H]. The benchmark's baseline.
    """
    with torch.no_grad():
        outputs, handles = {}, []
        for i, module in enumerate(down):
            handles.append(module.register_forward_hook(_keep(outputs, i, len(ids))))
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]
        for handle in handles:
            handle.remove()
    y = int(logits.argmax())
    alpha, w = (torch.tensor(x, device=ids.device)[:, None] for x in (nodes, weights))
    scores = []
    for i, module in enumerate(down):
        leaf = (alpha.to(outputs[i].dtype) * outputs[i]).requires_grad_()  # [S, H]

        def replace(module, args, output, leaf=leaf):
            return torch.cat([output[:, :-1], leaf[:, None]], 1)

        handle = module.register_forward_hook(replace)
        copies = ids.expand(len(nodes), -1)
        logits = model(input_ids=copies, use_cache=False, logits_to_keep=1).logits[:, -1]
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        handle.remove()
        (grad,) = torch.autograd.grad(p[:, y].sum(), leaf)
        scores.append(outputs[i] * (w * grad).sum(0))
    return torch.stack(scores)
