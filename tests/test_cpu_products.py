"""Layers that multiply by oneDNN against PyTorch's own."""

import copy

import pytest
import torch
from test_packed import CPU, policy_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from tokenmdp.models.kernels import onednn, packed_weights

pytestmark = pytest.mark.skipif(not packed_weights.can_pack(CPU, torch.float32), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), Conv1D(7, 5)])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 4, 5), (2, 3, 4, 5), (0, 5)])
def test_values_and_gradients_are_the_layers_own(layer, shape):
    model = nn.Sequential(copy.deepcopy(layer))
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plain = model(inputs)
    wanted = (inputs, *model.parameters())
    gradients = torch.autograd.grad(plain.square().sum(), wanted)
    onednn.use_onednn(model)
    assert type(model[0]) in onednn.FASTER.values()
    ours = model(inputs)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), wanted), gradients)


def test_it_is_differentiable_twice():
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias = (
        torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((4, 5), (3, 5), (3,))
    )

    def curvature(multiply):
        slope = torch.autograd.grad(multiply(inputs, weight, bias).pow(3).sum(), weight, create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), (inputs, weight, bias))

    torch.testing.assert_close(curvature(onednn.product), curvature(nn.functional.linear), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_policy_scores_and_learns_the_same(kind, monkeypatch):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: False)
    plain = policy_of(kind)
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: True)
    ours = policy_of(kind)
    classes = [{type(module) for module in policy.lm.modules()} for policy in (plain, ours)]
    assert not classes[0] & set(onednn.FASTER.values())
    assert classes[1] & set(onednn.FASTER.values())
    assert not classes[1] & {*onednn.FASTER}
    ids = torch.arange(30).view(3, 10)
    scored = [policy.evaluate(ids, torch.ones_like(ids).bool(), prompt_slots=4) for policy in (plain, ours)]
    torch.testing.assert_close(*[numbers.logprobs for numbers in scored])
    gradients = [
        torch.autograd.grad(numbers.logprobs.sum() + numbers.entropy.sum(), list(policy.lm.parameters()))
        for numbers, policy in zip(scored, (plain, ours), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in ours.state_dict().items()] == [name for name, _ in plain.state_dict().items()]


def test_a_copy_has_weights_of_its_own():
    policy = policy_of("gpt2")
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1.0)
    ids = torch.arange(10).view(1, 10)
    mask = torch.ones_like(ids).bool()
    assert not torch.allclose(policy.evaluate(ids, mask, 4).logprobs, other.evaluate(ids, mask, 4).logprobs, atol=1e-3)
    torch.testing.assert_close(other.evaluate(ids, mask, 4).logprobs, policy_of("gpt2").evaluate(ids, mask, 4).logprobs)


def test_other_dtypes_and_autocast_go_pytorchs_way(monkeypatch):
    model = nn.Sequential(nn.Linear(5, 7))
    onednn.use_onednn(model)
    monkeypatch.setattr(onednn, "product", lambda *_: pytest.fail("called"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 5)).dtype == torch.bfloat16
    assert model.double()(torch.randn(2, 5).double()).dtype == torch.float64


def test_subclasses_of_layers_stay():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(2, 2))
    onednn.use_onednn(model)
    assert type(model[0]) is Own
