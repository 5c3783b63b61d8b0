import math

import pytest
import torch

from tokenmdp.testing import (
    TablePolicyAttention,
    TableRewardModel,
    ToyMDP,
    enumerate_responses,
    expectation,
    kl,
    total_variation,
)
from tokenmdp.types import Episode

EVERYTHING = frozenset({"attention", "attention_layers", "prefix_scores"})


@pytest.fixture(params=[None, 1], ids=["fixed length", "with end of text"])
def mdp(request):
    return ToyMDP.random(vocab_size=3, horizon=3, eos_token_id=request.param, seed=4)


def random_logits(mdp, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.num_prefixes, mdp.vocab_size, generator=generator, dtype=torch.float64)


def test_every_response_appears_once_and_every_policy_sums_to_one(mdp):
    rows = {tuple(row[mask].tolist()) for row, mask in zip(mdp.tokens, mdp.mask, strict=True)}
    assert len(rows) == len(mdp.tokens) == (27 if mdp.eos_token_id is None else 15)
    assert math.isclose(mdp.tabular_seq_logprobs(random_logits(mdp, 0)).exp().sum(), 1.0)


def test_states_are_numbered_by_their_prefix(mdp):
    numbers = {}
    for row, mask, prefixes in zip(mdp.tokens.tolist(), mdp.mask, mdp.prefixes().tolist(), strict=True):
        for t in range(int(mask.sum())):
            assert numbers.setdefault(tuple(row[:t]), prefixes[t]) == prefixes[t]
    assert len(set(numbers.values())) == len(numbers)
    assert max(numbers.values()) < mdp.num_prefixes


def test_no_policy_beats_the_optimum_and_the_gap_is_a_kl(mdp):
    reference = mdp.tabular_seq_logprobs(random_logits(mdp, 1))
    best, best_value = mdp.optimum(reference, kl_coef=0.5)
    assert torch.isclose(mdp.objective(best, reference, kl_coef=0.5), best_value, rtol=1e-12)
    for seed in range(2, 6):
        policy = mdp.tabular_seq_logprobs(random_logits(mdp, seed))
        gap = best_value - mdp.objective(policy, reference, kl_coef=0.5)
        assert torch.isclose(gap, 0.5 * kl(policy, best), rtol=1e-10)
        assert gap > 0


def test_the_soft_values_satisfy_the_soft_bellman_equation(mdp):
    """V*(s) = b log sum_a ref(a|s) exp(Q*(s, a) / b), with Q* the value of the next state or the score."""
    b, logits = 0.7, random_logits(mdp, 1)
    reference = mdp.tabular_seq_logprobs(logits)
    soft = b * mdp.state_values(reference, (mdp.scores / b).exp()).log()
    every = logits.log_softmax(-1)
    for row in range(len(mdp.tokens)):
        for t in range(int(mdp.mask[row].sum())):
            total = 0.0
            for action in range(mdp.vocab_size):
                same = (mdp.prefixes()[:, t] == mdp.prefixes()[row, t]) & mdp.mask[:, t] & (mdp.tokens[:, t] == action)
                child = int(same.nonzero()[0])
                ends = t + 1 == int(mdp.mask[child].sum())
                q = mdp.scores[child] if ends else soft[child, t + 1]
                total += every[mdp.prefixes()[row, t], action].exp() * (q / b).exp()
            assert torch.isclose(soft[row, t], b * total.log(), rtol=1e-10)
    assert torch.isclose(soft[0, 0], mdp.optimum(reference, b)[1], rtol=1e-10)


def test_the_objective_is_differentiable_and_ascent_finds_the_optimum():
    mdp = ToyMDP.random(vocab_size=2, horizon=2)
    logits = torch.zeros(mdp.num_prefixes, 2, dtype=torch.float64, requires_grad=True)
    reference = mdp.tabular_seq_logprobs(logits.detach())
    for _ in range(800):
        (gradient,) = torch.autograd.grad(mdp.objective(mdp.tabular_seq_logprobs(logits), reference, 0.5), logits)
        logits.data += gradient
    assert total_variation(mdp.tabular_seq_logprobs(logits), mdp.optimum(reference, 0.5)[0]) < 1e-3


def test_episodes_lay_the_responses_out_for_a_model(mdp):
    episode = mdp.episodes(prompt=[2], prompt_slots=3)
    assert episode.input_ids.shape == (len(mdp.tokens), 6)
    assert episode.prompt_slots == 3
    assert episode.attention_mask[0].tolist() == [False, False, True, *mdp.mask[0].tolist()]
    assert torch.equal(episode.input_ids[:, 3:], mdp.tokens)


def test_scores_are_found_by_response(mdp):
    row = len(mdp.tokens) // 2
    response = tuple(mdp.tokens[row][mdp.mask[row]].tolist())
    assert mdp.score_of(response) == mdp.scores[row]
    with pytest.raises(KeyError, match="is not a complete response"):
        mdp.score_of((0,))


def test_expectations_and_limits():
    assert expectation(torch.tensor([1.0]).log(), torch.tensor([3.0])) == 3
    assert total_variation(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()) == 1
    with pytest.raises(ValueError, match="too many to enumerate"):
        enumerate_responses(vocab_size=50, horizon=4)


def test_prefix_scores_belong_to_prefixes_and_end_with_the_score(mdp):
    texts = mdp.texts()
    for row, mask, scores, score in zip(mdp.tokens.tolist(), mdp.mask, mdp.prefix_scores, mdp.scores, strict=True):
        length = int(mask.sum())
        assert [texts[tuple(row[:end])] for end in range(length + 1)] == scores[: length + 1].tolist()
        assert scores[length] == score
        assert not scores[length + 1 :].any()
    assert len(set(texts.values())) == len(texts) == (40 if mdp.eos_token_id is None else 7 + 15)


def test_the_table_is_a_reward_model_that_reads_what_the_masks_show(mdp):
    model, episode = TableRewardModel(mdp), mdp.outcome().episode
    output = model(episode, needs=EVERYTHING)
    assert torch.equal(output.score, mdp.scores.float())
    assert torch.equal(output.prefix_scores, mdp.prefix_scores.float())
    torch.testing.assert_close(output.attention, output.attention_layers[:, -1].mean(1))
    mass = output.attention.sum(-1)
    assert ((mass > 0) & (mass < 1)).all()
    assert not output.attention[~mdp.mask].any()
    gaps = mdp.mask.clone()
    gaps[:, 0] = False  # each response without its first token
    asked = torch.cat([episode.attention_mask[:, :1], gaps], dim=1)
    without = model(Episode(episode.input_ids, asked, gaps), needs=EVERYTHING, empty_responses=True)
    texts = mdp.texts()
    for row, mask, score in zip(mdp.tokens, gaps, without.score.tolist(), strict=True):
        assert score == pytest.approx(texts[tuple(row[mask].tolist())])
    assert not without.attention[:, 0].any()


def test_its_embeddings_are_one_hot_and_its_score_linear_in_each_of_them(mdp):
    embedded = TableRewardModel(mdp).embedded(mdp.outcome().episode)
    rows = torch.arange(len(mdp.tokens))
    one_hot = embedded.embeddings.requires_grad_()
    score = embedded.score(one_hot, rows)
    torch.testing.assert_close(score, mdp.scores.float())
    (gradient,) = torch.autograd.grad(score.sum(), one_hot)
    inner = (gradient * one_hot).sum(-1)  # (M, L): a linear function is its own gradient
    torch.testing.assert_close(inner[mdp.mask], score[:, None].expand(mdp.mask.shape)[mdp.mask])
    assert torch.equal(embedded.response, mdp.mask)
    assert torch.equal(embedded.to_slots(inner) != 0, mdp.mask)
    half = embedded.score(one_hot / 2, rows)
    torch.testing.assert_close(half, mdp.scores.float() / 2 ** mdp.mask.sum(-1))


def test_policy_attention_knows_no_later_tokens(mdp):
    attention = TablePolicyAttention(mdp)(mdp.outcome())
    assert not attention.triu(1).any()
    seen = {}
    for row, mask, rows in zip(mdp.tokens.tolist(), mdp.mask, attention, strict=True):
        for t in range(int(mask.sum())):
            assert torch.equal(seen.setdefault(tuple(row[: t + 1]), rows[t]), rows[t])
            assert 0 < rows[t].sum() < 1
