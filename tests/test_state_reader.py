"""Which changes of the weights empty the cache. What is read through it is tested with the policies that use it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.state_reader import StateReader, WeightSample, _every_kth, read_states
from tokenmdp.runs.environments import toy_policy

IDS = torch.tensor([[3, 4, 5, 0], [0, 6, 7, 0]])
MASK = torch.tensor([[True, True, True, False], [False, True, True, False]])


@pytest.fixture
def policy():
    policy = CausalLMPolicy(toy_policy(3), 32, 30)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


def check_reads_anew(policy, change):
    """A reader that has read a text before ``change`` says what reading all of it says."""
    reader = StateReader(policy)
    before = reader.read(IDS, MASK).logits.clone()
    change()
    longer = MASK | torch.tensor([False, False, False, True])
    state, whole = reader.read(IDS, longer), read_states(policy, IDS, longer)
    torch.testing.assert_close(state.logits, whole.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(state.value, whole.value, rtol=0, atol=1e-5)
    again = reader.read(IDS, MASK).logits
    assert (again - before).abs().max() > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_is_seen(policy, fused):
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, fused=fused)
    sum((weight**2).sum() for weight in policy.parameters()).backward()
    versions = [weight._version for weight in policy.parameters()]
    check_reads_anew(policy, optimizer.step)
    uncounted = [weight._version for weight in policy.parameters()] == versions
    assert uncounted == fused  # why the elements are looked at


def test_a_write_that_pytorch_does_not_count_is_seen_in_every_single_parameter(policy):
    weights = list(policy.parameters())
    assert max(weight.numel() for weight in weights) > 1000
    sample = WeightSample(weights)
    assert sample.still_that_of(list(policy.parameters()))
    for weight in weights:
        before = weight.detach().clone()
        weight.data.mul_(1.01).add_(1e-3)
        assert not sample.still_that_of(weights), weight.shape
        weight.data.copy_(before)
        assert sample.still_that_of(weights)


@pytest.mark.parametrize("setting", [{"temperature": 0.5}, {"compute_dtype": torch.bfloat16}])
def test_a_changed_setting_of_the_policy_is_seen_though_the_text_is_the_same(policy, setting):
    reader = StateReader(policy)
    before = reader.read(IDS, MASK).logits.clone()
    vars(policy).update(setting)
    logits = reader.read(IDS, MASK).logits
    assert torch.equal(logits, read_states(policy, IDS, MASK).logits)
    assert not torch.equal(logits, before)


def test_a_counted_write_of_one_element_and_other_memory_are_seen(policy):
    weights = list(policy.parameters())
    for change in (lambda weight: weight[-1, -2].add_(1), lambda weight: setattr(weight, "data", weight.data.clone())):
        sample = WeightSample(weights)
        with torch.no_grad():
            change(weights[0])
        assert not sample.still_that_of(weights)


def test_a_matrix_added_beside_the_others_is_seen(policy):
    """Like an adapter's two small matrices, trained alone."""
    layer = policy.lm.transformer.h[0].mlp.c_fc
    layer.low_rank = torch.nn.Parameter(torch.randn(4, layer.nf))
    layer.register_forward_hook(lambda module, inputs, output: output + inputs[0][..., :4] @ module.low_rank)
    check_reads_anew(policy, lambda: layer.low_rank.data.add_(1.0))


@given(st.lists(st.integers(1, 90), min_size=0, max_size=3), st.booleans())  # turned: no flat view of it
def test_every_tensor_is_looked_at_in_many_places_and_small_ones_everywhere(shape, turned):
    weight = torch.arange(int(torch.Size(shape).numel())).reshape(shape)
    weight = weight.permute(tuple(range(weight.ndim))[::-1]) if turned else weight
    seen = _every_kth(weight)
    places = seen.sort().values
    assert len(seen) >= min(weight.numel(), 64)
    assert len(seen) == weight.numel() or weight.numel() >= 192
    assert len(places.diff().unique()) <= 1  # evenly spread
    assert len(seen) == 1 or places[1] % 2 == 1  # an even distance would look at every other column of an even width
    weight += 1000
    assert (seen >= 1000).all()  # a view
