"""DeepLIFT's multipliers: the rules by hand, captum's DeepLift where that has rules, and the sum from end to end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tokenmdp.credit.rescale import rescale_multipliers


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()


def explained(score, inputs, reference):
    return (rescale_multipliers(score, inputs, reference) * (inputs - reference)).flatten(1).sum(-1)


def assert_complete(score, inputs, reference, tolerance=1e-9):
    torch.testing.assert_close(
        explained(score, inputs, reference), score(inputs) - score(reference), atol=tolerance, rtol=0
    )


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks", "ignore:Input Tensor 0 did not")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_network_of_known_modules_has_captums_attributions(inplace):
    captum = pytest.importorskip(
        "captum.attr", reason="needs the attribution extra: pip install 'tokenmdp[attribution]'"
    )
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(inplace), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8), nn.ELU(), nn.Linear(8, 1)
    ).double()
    inputs, reference = draw(5, 6)
    theirs = captum.DeepLift(network).attribute(inputs, reference).detach()
    ours = rescale_multipliers(lambda x: network(x)[:, 0], inputs, reference) * (inputs - reference)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert (theirs < 0).any()
    assert (theirs > 0).any()


@given(x=st.floats(-4, 4), reference=st.floats(-4, 4))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("function", [F.relu, F.gelu, F.silu, torch.tanh, torch.exp, torch.sigmoid, lambda x: x**3])
def test_one_number_gets_the_slope(function, x, reference):
    here, there = torch.tensor([x], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64)
    multiplier = rescale_multipliers(function, here, there)
    assert abs((multiplier * (here - there) - function(here) + function(there)).item()) < 1e-9


def test_equal_inputs_get_the_gradient():
    inputs, _ = draw(3, 4)
    leaf = inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((leaf.tanh() * leaf.exp()).sum(), leaf)
    multipliers = rescale_multipliers(lambda x: (x.tanh() * x.exp()).sum(-1), inputs, inputs)
    torch.testing.assert_close(multipliers, gradient)


def test_factors_get_their_shapley_value():
    inputs, reference = draw(7, 2)
    (a, b), (c, d) = inputs.unbind(-1), reference.unbind(-1)
    multipliers = rescale_multipliers(lambda x: x[:, 0] * x[:, 1], inputs, reference)
    first = ((a * d - c * d) + (a * b - c * b)) / 2  # joining c * d alone, and joining when b is already present
    torch.testing.assert_close(multipliers[:, 0] * (a - c), first)
    torch.testing.assert_close(multipliers[:, 1] * (b - d), a * b - c * d - first)


WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 6**0.5
MASK = torch.ones(4, 4, dtype=torch.bool).tril()


def attention(x, mask=None, is_causal=False):
    query, key = x @ WEIGHT, x @ WEIGHT.T
    return F.scaled_dot_product_attention(query[:, None], key[:, None], x[:, None], mask, is_causal=is_causal)[:, 0]


def by_hand(x):
    logits = (x @ WEIGHT) @ (x @ WEIGHT.T).transpose(1, 2) / 6**0.5
    return logits.masked_fill(~MASK, -torch.inf).softmax(-1) @ x


def in_place(x, factor):
    x *= factor
    x.add_(1.0).mul_(x)
    x /= 3 + factor.square()
    F.silu(torch.relu_(x), inplace=True)
    return x.exp_() + x


@pytest.mark.parametrize(
    "function",
    [
        attention,
        lambda x: attention(x, mask=MASK),
        lambda x: attention(x, is_causal=True),
        by_hand,
        lambda x: F.layer_norm(x, (6,), WEIGHT[0], WEIGHT[1]),
        lambda x: F.rms_norm(x, (6,), WEIGHT[0]),
        lambda x: WEIGHT[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),  # as Llama spells it
        lambda x: F.silu(x @ WEIGHT) * (x @ WEIGHT.T),
        lambda x: x / (1 + x.square().sum(-1, keepdim=True)),
        lambda x: torch.einsum("nlc,nkc->nlk", x, x),
        lambda x: torch.cat([x.relu(), x.chunk(2, -1)[1].tanh()], -1),
        lambda x: 1 / (2 + x.square()),
        lambda x: (2**x).exp2() * 1e-2,
        lambda x: F.glu(x),
        lambda x: F.softmin(x, -1) + x.logsumexp(-1, keepdim=True),
        lambda x: torch.addcmul(x, x, x) + torch.baddbmm(x, x, x.transpose(1, 2) @ x),
        lambda x: x.std(-1, keepdim=True) + x.var(-1, keepdim=True) + x.norm(dim=-1, keepdim=True),
        lambda x: x.exp() ** x.sigmoid() / 100,
        lambda x: in_place(x.tanh(), x.sigmoid()),
    ],
)
def test_what_transformers_do_is_complete(function):
    inputs, reference = draw(3, 4, 6)
    assert_complete(lambda x: (function(x) * torch.arange(4.0)[:, None]).flatten(1).sum(-1), inputs, reference, 1e-6)


def test_a_trained_slope_is_explained_in_single_precision():
    inputs, reference = (side.float() for side in draw(5, 4))
    assert_complete(lambda x: F.prelu(x, torch.tensor([0.3])).sum(-1), inputs, reference, 1e-5)


def test_operations_in_place_keep_the_value_and_the_callers_tensors():
    inputs, reference = draw(3, 6)
    given = inputs.clone(), reference.clone()
    seen = []

    def score(x):
        result = in_place(x, x.sigmoid()).sum(-1)
        seen.append((result.detach().as_subclass(torch.Tensor), result.reference))
        return result

    rescale_multipliers(score, inputs, reference)
    torch.testing.assert_close((inputs, reference), given, atol=0, rtol=0)
    torch.testing.assert_close(seen[0][0], in_place(inputs.clone(), inputs.sigmoid()).sum(-1))
    torch.testing.assert_close(seen[0][1], in_place(reference.clone(), reference.sigmoid()).sum(-1))


def test_an_operation_in_place_on_a_constant_is_refused():
    inputs, reference = draw(3, 6)
    with pytest.raises(ValueError, match="calls add_ on a tensor that has no reference"):
        rescale_multipliers(lambda x: torch.zeros(3, 6).double().add_(x).sum(-1), inputs, reference)


def test_an_operation_without_a_rule_is_taken_as_linear():
    inputs, reference = draw(5, 4)
    taken = inputs.gather(1, inputs.argmax(1, keepdim=True)) - reference.gather(1, inputs.argmax(1, keepdim=True))
    torch.testing.assert_close(explained(lambda x: x.amax(-1), inputs, reference), taken[:, 0])


def test_the_score_and_the_parameters_stay_as_they_are():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1)).double()
    inputs, reference = draw(5, 4)
    seen = []

    def score(x):
        result = network(x)[:, 0]
        seen.append((result.as_subclass(torch.Tensor), result.reference))
        return result

    with torch.no_grad():
        rescale_multipliers(score, inputs, reference)
        assert torch.equal(seen[0][0], network(inputs)[:, 0])
        assert torch.equal(seen[0][1], network(reference)[:, 0])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not inputs.requires_grad
