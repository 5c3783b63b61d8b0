"""Credit functions on their own: trailing axes, sums and what the padding may hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmdp.credit import (
    CREDIT_METHODS,
    NEEDS,
    AttentionCredit,
    LastPolicyAttentionCredit,
    MissingResource,
    PolicyAttentionCredit,
    PositionCredit,
    PrefixDifferenceCredit,
    Resources,
    SparseCredit,
    UniformCredit,
    attention_weights,
    blend,
    conserve,
    make_credit,
    prefix_differences,
    redistribute,
    sparse_weights,
    uniform_weights,
)
from tokenmdp.types import Episode, Outcome, RewardOutput

LENGTHS = torch.tensor([1, 3, 5])
MASK = torch.arange(5) < LENGTHS[:, None]


def row():
    return torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * MASK / 5


@given(score=st.floats(-1e4, 1e4, width=32), beta=st.floats(0, 1), length=st.integers(1, 5))
def test_every_weighting_conserves_the_score(score, beta, length):
    mask = torch.arange(5) < length
    alpha, *_ = attention_weights(row()[2], mask)
    for weights in (sparse_weights(mask), uniform_weights(mask), blend(alpha, mask, beta)):
        assert (weights >= 0).all()
        assert not weights[~mask].any()
        token_rewards = redistribute(torch.tensor(score), weights)
        assert abs(token_rewards.double().sum().item() - score) <= 1e-5 * max(1.0, abs(score))


def test_a_batch_is_its_rows():
    batch = attention_weights(row(), MASK)
    for index in range(3):
        for ours, alone in zip(batch, attention_weights(row()[index], MASK[index]), strict=True):
            assert torch.equal(ours[index], alone)
        assert torch.equal(blend(batch[0], MASK, 0.3)[index], blend(batch[0][index], MASK[index], 0.3))
        assert torch.equal(sparse_weights(MASK)[index], sparse_weights(MASK[index]))
        assert torch.equal(uniform_weights(MASK)[index], uniform_weights(MASK[index]))


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_what_the_padding_holds_cannot_matter(garbage):
    clean = attention_weights(row(), MASK)
    dirty = attention_weights(torch.where(MASK, row(), garbage), MASK)
    for ours, theirs in zip(clean, dirty, strict=True):
        assert torch.equal(ours, theirs)


def test_below_the_floor_the_weights_are_uniform():
    weights, mass, fell_back = attention_weights(row() * torch.tensor([1.0, 1e-6, 1.0])[:, None], MASK)
    assert fell_back.tolist() == [False, True, False]
    assert mass[1] < 1e-6
    assert torch.equal(weights[1], uniform_weights(MASK)[1])


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"attention \(3, 4\) and response_mask \(3, 5\) differ"):
        attention_weights(row()[:, :4], MASK)


# The methods that need no model, on given numbers, in float64.

GIVEN = ["sparse", "uniform", "attention", "abc-d", "abc-d2", "red"]
VARIANTS = [*((name, {}) for name in GIVEN), ("attention", {"shuffled": True}), ("attention", {"sharpness": 3.0})]


def outcome(lengths, scores, seed=0, horizon=6, prompt_slots=2):
    """Episodes with random attention rows and prefix scores in float64; what the padding holds is NaN."""
    mask = torch.arange(horizon) < torch.tensor(lengths)[:, None]
    rows, prompt = len(lengths), torch.ones(len(lengths), prompt_slots, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    score = torch.tensor(scores, dtype=torch.float64)
    ends = torch.arange(horizon + 1) == torch.tensor(lengths)[:, None]
    prefixes = torch.where(ends, score[:, None], random(rows, horizon + 1) * 6 - 3)
    after = torch.cat([torch.ones(rows, 1, dtype=torch.bool), mask], dim=1)
    reward = RewardOutput(
        score,
        attention=torch.where(mask, random(rows, horizon) / horizon, torch.nan),
        attention_layers=torch.where(mask[:, None, None], random(rows, 3, 2, horizon) / horizon, torch.nan),
        prefix_scores=torch.where(after, prefixes, torch.nan),
    )
    attention = random(rows, horizon, horizon).tril()
    episode = Episode(torch.zeros(rows, prompt_slots + horizon, dtype=torch.long), torch.cat([prompt, mask], 1), mask)
    return Outcome(episode, reward, torch.arange(rows)), Resources(policy_attention=lambda _: attention)


def select(given_outcome, resources, order):
    """The same episodes in another order, or fewer."""
    episode = Episode(*(part[order] for part in given_outcome.episode))
    reward = RewardOutput(*(None if part is None else part[order] for part in given_outcome.reward))
    attention = resources.policy_attention(given_outcome)[order]
    return Outcome(episode, reward, torch.arange(len(order))), Resources(policy_attention=lambda _: attention)


lengths_and_scores = st.lists(st.tuples(st.integers(1, 6), st.floats(-50, 50)), min_size=1, max_size=6)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@given(rows=lengths_and_scores, beta=st.floats(0, 1), seed=st.integers(0, 99))
def test_methods_conserve_and_stay_inside_the_response(name, options, rows, beta, seed):
    lengths, scores = map(list, zip(*rows, strict=True))
    finished, resources = outcome(lengths, scores, seed)
    method = make_credit(name, credit_beta=beta, **options)
    token_rewards = method(finished, resources).token_rewards
    assert token_rewards.dtype == torch.float64
    assert torch.isfinite(token_rewards).all()
    assert not token_rewards[~finished.episode.response_mask].any()
    error = (token_rewards.sum(-1) - finished.reward.score).abs()
    # Prefix differences of any size cancel, so there the error is relative to them.
    largest = finished.reward.score.abs().clamp(min=6.0 if name == "red" else 1e-300)
    assert (error <= 1e-12 * largest).all()
    single = [method(*select(finished, resources, [row])).token_rewards for row in range(len(rows))]
    assert torch.equal(token_rewards, torch.cat(single))
    for row, length in enumerate(lengths):
        if length == 1:  # the only token earned everything
            assert token_rewards[row, 0].item() == pytest.approx(scores[row], rel=1e-12)


@pytest.mark.parametrize("name", ["uniform", "attention", "abc-d", "abc-d2", "red"])
@given(beta=st.floats(0, 1), seed=st.integers(0, 99))
def test_credit_is_linear_in_beta_between_sparse_and_dense(name, beta, seed):
    finished, resources = outcome([1, 3, 6], [1.5, -2.0, 0.25], seed)
    sparse, dense, mixed = (
        make_credit(name, credit_beta=number)(finished, resources).token_rewards for number in (0.0, 1.0, beta)
    )
    assert torch.equal(sparse, SparseCredit()(finished, resources).token_rewards)
    torch.testing.assert_close(mixed, beta * dense + (1 - beta) * sparse)


@pytest.mark.parametrize("name", ["attention", "abc-d", "abc-d2", "sparse", "uniform"])
def test_a_negative_score_flips_every_sign(name):
    finished, resources = outcome([2, 6], [1.5, 4.0])
    flipped = finished._replace(reward=finished.reward._replace(score=-finished.reward.score))
    method = make_credit(name)
    torch.testing.assert_close(method(flipped, resources).token_rewards, -method(finished, resources).token_rewards)


def test_constant_attention_is_uniform_credit():
    finished, resources = outcome([2, 6], [1.5, 4.0])
    same = torch.full(finished.episode.response_mask.shape, 0.01, dtype=torch.float64)
    finished = finished._replace(reward=finished.reward._replace(attention=same))
    torch.testing.assert_close(
        AttentionCredit(credit_beta=1.0)(finished, resources).token_rewards,
        UniformCredit()(finished, resources).token_rewards,
    )


@pytest.mark.parametrize("method", [PolicyAttentionCredit(1.0), LastPolicyAttentionCredit(1.0)])
def test_policy_attention_on_the_first_token_credits_the_first_token(method):
    finished, _ = outcome([1, 2, 6], [1.0, 2.0, 3.0])
    first = torch.zeros(3, 6, 6, dtype=torch.float64)
    first[:, :, 0] = 1.0
    credit = method(finished, Resources(policy_attention=lambda _: first))
    assert credit.token_rewards.tolist() == [[score, 0, 0, 0, 0, 0] for score in (1.0, 2.0, 3.0)]
    assert credit.report["credit_fallback"].tolist() == [True, False, False]  # one token: it was never read


def test_policy_attention_by_hand():
    finished, _ = outcome([4], [10.0])
    attention = torch.tensor([[[0.4, 0, 0, 0], [0.2, 0.2, 0, 0], [0.3, 0.0, 0.1, 0], [9.0, 9, 9, 9]]])
    attention = torch.nn.functional.pad(attention.double(), (0, 2, 0, 2), value=7.0)  # padding does not matter
    resources = Resources(policy_attention=lambda _: attention)
    columns = torch.tensor([(0.4 + 0.2 + 0.3) / 3, (0.2 + 0.0) / 2, 0.1, 0.0, 0, 0], dtype=torch.float64)
    ours = PolicyAttentionCredit(1.0)(finished, resources).token_rewards[0]
    torch.testing.assert_close(ours, 10 * columns / columns.sum())
    ours = LastPolicyAttentionCredit(1.0)(finished, resources).token_rewards[0]
    torch.testing.assert_close(ours, torch.tensor([7.5, 0.0, 2.5, 0.0, 0.0, 0.0], dtype=torch.float64))


def test_layer_and_heads_choose_the_row():
    finished, resources = outcome([3, 6], [1.0, -2.0])
    mask, rows = finished.episode.response_mask, finished.reward.attention_layers
    for layer, heads, row in (
        (0, "mean", rows[:, 0].mean(1)), (-2, "max", rows[:, 1].amax(1)), (2, 1, rows[:, 2, 1]),
    ):  # fmt: skip
        method = AttentionCredit(1.0, layer=layer, heads=heads)
        assert method.needs == {"attention_layers"}
        expected = redistribute(finished.reward.score, attention_weights(row, mask)[0])
        torch.testing.assert_close(method(finished, resources).token_rewards, expected)
    assert AttentionCredit().needs == {"attention"}
    with pytest.raises(ValueError, match=r"layer is 3 and the reward model has 3; choose -3\.\.2"):
        AttentionCredit(layer=3)(finished, resources)
    with pytest.raises(ValueError, match=r"heads is 2 and the layer has 2; choose 0\.\.1"):
        AttentionCredit(heads=2)(finished, resources)
    with pytest.raises(ValueError, match="heads is 'median'; choose 'mean', 'max' or a whole number"):
        AttentionCredit(heads="median")
    for options in ({"heads": 1.5}, {"heads": None}, {"heads": True}, {"layer": "last"}, {"layer": 1.5}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name} is {value!r}; choose .*a whole number"):
            AttentionCredit(**options)


def test_shuffled_rows_keep_their_peaks_and_lose_their_places():
    finished, resources = outcome([6, 6, 4, 1], [1.0, 1.0, 1.0, 1.0])
    ids = torch.arange(4 * 8).reshape(4, 8)
    finished = finished._replace(episode=finished.episode._replace(input_ids=ids))
    plain, shuffled, again, other = (
        AttentionCredit(1.0, **options)(finished, resources).token_rewards
        for options in ({}, {"shuffled": True}, {"shuffled": True}, {"shuffled": True, "seed": 1})
    )
    assert torch.equal(shuffled, again)
    assert not torch.equal(shuffled, other)
    assert not torch.equal(shuffled, plain)
    assert torch.equal(shuffled.sort(-1).values, plain.sort(-1).values)
    places = [[rewards.tolist().index(value) for value in row] for rewards, row in zip(shuffled, plain, strict=True)]
    assert places[0] != places[1]  # texts have their own orders


def test_over_many_texts_shuffled_attention_is_uniform_credit():
    rows = 4000
    finished, resources = outcome([4] * rows, [1.0] * rows, horizon=4)
    ids = torch.arange(rows * 6).reshape(rows, 6)
    finished = finished._replace(episode=finished.episode._replace(input_ids=ids))
    row = torch.tensor([[0.7, 0.2, 0.1, 0.0]], dtype=torch.float64).repeat(rows, 1)
    finished = finished._replace(reward=finished.reward._replace(attention=row))
    mean = AttentionCredit(1.0, shuffled=True)(finished, resources).token_rewards.mean(0)
    torch.testing.assert_close(mean, torch.full((4,), 0.25, dtype=torch.float64), atol=0.02, rtol=0)


@given(power=st.floats(0.1, 20), seed=st.integers(0, 99))
def test_sharpness_is_a_power_of_the_row(power, seed):
    finished, resources = outcome([6, 3], [1.0, -2.0], seed)
    plain = AttentionCredit(1.0)(finished, resources)
    sharp = AttentionCredit(1.0, sharpness=power)(finished, resources)
    powers = (plain.token_rewards / finished.reward.score[:, None]) ** power
    expected = powers / powers.sum(-1, keepdim=True) * finished.reward.score[:, None]
    torch.testing.assert_close(sharp.token_rewards, expected, rtol=1e-9, atol=1e-12)
    flatter = sharp.report["attention_entropy"] >= plain.report["attention_entropy"] - 1e-6
    assert flatter.all() if power <= 1 else not flatter.any() or power < 1.001


def test_prefix_differences_by_hand():
    finished, resources = outcome([3], [4.0])
    prefix_scores = torch.tensor([[0.5, 2.0, 1.0, 4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    finished = finished._replace(reward=finished.reward._replace(prefix_scores=prefix_scores))
    credit = PrefixDifferenceCredit()(finished, resources)
    assert credit.token_rewards.tolist() == [[1.5, -1.0, 3.0 + 0.5, 0.0, 0.0, 0.0]]  # the prompt's 0.5 comes last
    assert credit.report["prompt_score"].tolist() == [0.5]
    with pytest.raises(ValueError, match="one prefix more than response slots"):
        prefix_differences(prefix_scores[:, :-1], finished.episode.response_mask)


@given(beta=st.floats(0, 1), score=st.floats(-1e3, 1e3), length=st.integers(1, 6))
def test_settle_conserves_what_the_attribution_does_not_explain(beta, score, length):
    mask = torch.arange(6) < length
    attribution = torch.linspace(-3, 2, 6, dtype=torch.float64)
    token_rewards = conserve(attribution, torch.tensor(score, dtype=torch.float64), mask, beta)
    assert abs(token_rewards.sum().item() - score) <= 1e-12 * max(abs(score), 20.0)
    torch.testing.assert_close(token_rewards[: length - 1], beta * attribution[: length - 1])


@pytest.mark.parametrize(("name", "missing"), [
    ("attention", "attention row"), ("abc-d", "policy_attention"), ("abc-d2", "policy_attention"),
    ("red", "prefix scores"),
])  # fmt: skip
def test_what_is_missing_is_named(name, missing):
    finished, _ = outcome([2], [1.0])
    bare = finished._replace(reward=RewardOutput(finished.reward.score))
    with pytest.raises(MissingResource, match=missing):
        make_credit(name)(bare, Resources())


def test_every_method_declares_itself():
    for name, method in CREDIT_METHODS.items():
        assert method.name == name
        assert {type(method.conserves_return), type(method.causal), type(method.potential_based)} == {bool}
        assert method.needs <= NEEDS.keys()
        assert not method.potential_based or (method.causal and method.conserves_return)
        assert method.__doc__


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"attention credit has no option floor; it has credit_beta, attention_floor"):
        make_credit("attention", floor=0.1)
    for method in (UniformCredit, PositionCredit, AttentionCredit, PolicyAttentionCredit, PrefixDifferenceCredit):
        with pytest.raises(ValueError, match=r"credit_beta is 1\.5"):
            method(credit_beta=1.5)
    for wrong in ({"sharpness": 0}, {"sharpness": float("inf")}, {"sharpness": "2"}, {"shuffled": 1}, {"seed": 0.5}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            AttentionCredit(**wrong)
