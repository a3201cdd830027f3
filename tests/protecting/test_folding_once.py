"""A P is made once for all passes of a training step, and never of a weight that has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loki_plugin.protecting import reading

X, OTHER = torch.randn(2, 40, 80, generator=torch.Generator().manual_seed(1)).unbind()


def protected(rank=6, dtype=torch.float32):
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(80, 9))[0] * torch.linspace(0.9, 0.1, 9).sqrt()
    return reading.ProtectedA(torch.nn.Parameter(torch.randn(rank, 80, dtype=dtype)), u)


def exact(a, x):
    """A P x in float64."""
    v = a.whole(x.device)
    return (x.double() - x.double() @ v @ v.T) @ a.weight.detach().double().T


@pytest.fixture
def folds(monkeypatch):
    """How often something went through P."""
    count, outside = [0], reading.outside

    def counted(*args):
        count[0] += 1
        return outside(*args)

    monkeypatch.setattr(reading, "outside", counted)
    return count


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_a_step_of_two_passes_folds_once_and_once_for_each_gradient(reentrant, folds):
    a, x = protected(), X.clone().requires_grad_()

    def through(x):
        return a(x) if reentrant is None else checkpoint(a, x, use_reentrant=reentrant)

    for _ in range(3):
        before = folds[0]
        loss = through(x).square().mean()
        a.eval()  # as the anchor's pass is
        loss = loss + through(OTHER.clone().requires_grad_()).square().mean()
        a.train()
        loss.backward()
        assert folds[0] - before == 3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_and_gradients_are_those_of_folding_in_each_pass(dtype, autocast):
    known, plain = protected(dtype=dtype), protected(dtype=dtype)
    plain._known = lambda x: None
    for a in (known, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs = [a(x.to(dtype)) for x in (X, OTHER)]
        sum(out.float().square().sum() for out in outs).backward()
        a.outs = outs
    for one, other in zip(known.outs, plain.outs, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert torch.equal(known.weight.grad, plain.weight.grad)


def test_a_recomputed_pass_goes_the_way_it_went_first():
    """Few tokens go through P. What the second pass makes known is not for the first one's graph,
    which a checkpoint that is not reentrant hands what it computes again."""
    grads = []
    for again in (True, False):
        a, x = protected(), X[:3].clone().requires_grad_()
        loss = (checkpoint(a, x, use_reentrant=False) if again else a(x)).square().sum()
        loss = loss + a(OTHER).square().sum()
        loss.backward()
        grads.append(a.weight.grad)
    assert torch.equal(*grads)


def write_past_its_version(a):
    a.weight.data.add_(1)


def step(a):
    torch.optim.SGD([a.weight], 0.1).step()


class Raw(torch.optim.Optimizer):
    """Writes as kernels do that are handed a pointer."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad.data)


def assert_new(a):
    """Another answer than the one before, and that of the weight as it is."""
    found = a(X)
    assert torch.allclose(found.detach().double(), exact(a, X), atol=1e-4)


@pytest.mark.parametrize("change", [write_past_its_version, step])
@pytest.mark.parametrize("training", [True, False])
def test_what_changes_behind_a_backward_is_seen(change, training):
    a = protected()
    a(X).square().mean().backward()
    change(a)
    a.train(training)
    assert_new(a)


def test_a_pass_between_backward_and_step_leaves_nothing_stale():
    """A callback may ask the model before a step whose kernel no version tells of."""
    a = protected()
    optimizer = Raw([a.weight], {})
    a(X).square().mean().backward()
    with torch.no_grad():
        a(X)
    version = a.weight._version
    optimizer.step()
    assert a.weight._version == version
    assert_new(a)


def test_a_weight_that_is_written_to_loaded_or_folded_is_read_anew():
    a = protected()
    a(X)
    with torch.no_grad():
        a.weight.add_(1)
    assert_new(a)
    state = protected().state_dict()
    a.load_state_dict(state)
    assert_new(a)
    a(X)
    a.fold()
    assert a._read is None  # nor is it held when the training is over
    assert_new(a)
    other = copy.deepcopy(a)
    with torch.no_grad():
        other.weight.mul_(2)
    assert_new(other), assert_new(a)


def test_an_evaluation_makes_none_and_few_tokens_go_through_p(folds):
    a = protected().eval()
    with torch.no_grad():
        a(X), a(X)
    assert folds[0] == 2 and a._read is None
    a.train()(X[:3])
    assert a._read is None
