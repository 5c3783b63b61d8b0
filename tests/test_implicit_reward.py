"""The reward that a preference-tuned policy implies (RTO)."""

import copy

import gymnasium as gym
import pytest
import torch
from doubles import HashRewardModel, of_words
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp.credit import ImplicitRewardCredit, MissingResource, Resources, make_credit
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.runs.environments import toy_policy
from tokenmdp.types import Outcome, response_rows
from tokenmdp.wrappers import CreditReward

TOY = load_tokenizer("toy")
TEXTS = [("the film was", "great but very dull <eos>"), ("it is", "so bad"), ("this", "fun")]
EPISODE = of_words(*TEXTS, horizon=8)
MASK = EPISODE.response_mask
OUTCOME = Outcome(EPISODE, HashRewardModel()(EPISODE), torch.arange(len(TEXTS)))
SPARSE = make_credit("sparse")(OUTCOME, Resources()).token_rewards


def policy(seed, **options):
    options = {"vocab_size": len(TOY), "eos_token_id": TOY.eos_token_id, **options}
    return CausalLMPolicy(toy_policy(seed), **options)


TUNED, REFERENCE = policy(1), policy(2)


def credit(tuned=TUNED, reference=REFERENCE, **options):
    return ImplicitRewardCredit(tuned, reference, **options)(OUTCOME, Resources())


@pytest.mark.parametrize("pair", [(TUNED, TUNED), (policy(1), policy(1))])
def test_a_policy_that_was_not_moved_gives_sparse_credit(pair):
    assert torch.equal(credit(*pair).token_rewards, SPARSE)


def test_the_log_ratio_is_that_of_a_plain_forward():
    log_ratio = 0
    for sign, model in ((1, TUNED), (-1, REFERENCE)):
        mask = EPISODE.attention_mask.long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model.lm(EPISODE.input_ids, attention_mask=mask, position_ids=positions).logits
        logprobs = response_rows(logits[:, :-1], 4).log_softmax(-1)
        log_ratio = log_ratio + sign * logprobs.gather(-1, EPISODE.input_ids[:, 4:, None])[..., 0]
    expected = SPARSE + torch.where(MASK, 0.3 * log_ratio, 0.0).detach()
    torch.testing.assert_close(credit(rto_beta=0.3, clip=float("inf")).token_rewards, expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 5), st.floats(0.01, 2))
def test_the_clip_bounds_every_token_and_beta_scales(rto_beta, clip):
    result = credit(rto_beta=rto_beta, clip=clip)
    implicit = result.token_rewards - SPARSE
    assert implicit.abs().max() <= clip + 1e-5
    assert not implicit[~MASK].any()
    unclipped = rto_beta * (credit(rto_beta=1.0, clip=float("inf")).token_rewards - SPARSE)
    torch.testing.assert_close(implicit, unclipped.clamp(-clip, clip), atol=1e-5, rtol=1e-4)
    at_the_clip = ((unclipped.abs() > clip * 1.001) & MASK).sum(-1) / MASK.sum(-1)
    assert (result.report["clipped_share"] >= at_the_clip - 1e-6).all()


def test_swapping_the_policies_swaps_the_signs_and_both_may_be_scored_in_parts():
    forwards, backwards = credit().token_rewards, credit(REFERENCE, TUNED, rows_per_forward=2).token_rewards
    torch.testing.assert_close(forwards - SPARSE, SPARSE - backwards)


def test_an_early_end_of_text_is_masked_in_both():
    tuned, reference = policy(1, min_new_tokens=3), policy(2, min_new_tokens=3)
    masked, plain = credit(tuned, reference, clip=9.0).token_rewards, credit(clip=9.0).token_rewards
    assert not torch.equal(masked[0, :3], plain[0, :3])
    torch.testing.assert_close(masked[0, 3:], plain[0, 3:])


def test_names_are_loaded_for_the_environment(tmp_path):
    for name, model in (("tuned", TUNED), ("reference", REFERENCE)):
        model.save_pretrained(tmp_path / name)
        TOY.save_pretrained(tmp_path / name)
    method = make_credit("rto", tuned=str(tmp_path / "tuned"), reference=str(tmp_path / "reference"))
    env = CreditReward(gym.make("tokenmdp:TextGen-Toy-v0"), method)
    env.reset(options={"prompt": TEXTS[0][0]})
    for word in TEXTS[0][1].split():
        *_, info = env.step(TOY.convert_tokens_to_ids(word))
    implicit = torch.from_numpy(info["token_rewards"])
    implicit[4] -= float(info["score"])
    torch.testing.assert_close(implicit, (credit().token_rewards - SPARSE)[0], atol=1e-5, rtol=1e-5)
    assert info["credit_residual"] == pytest.approx(-implicit.sum().item(), abs=1e-5)


def test_a_copied_method_shares_its_policies():
    method = ImplicitRewardCredit(TUNED, REFERENCE)
    assert copy.deepcopy(method).tuned is TUNED


def test_bad_input_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"rto credit needs tuned: make_credit\('rto', tuned=...\)"):
        make_credit("rto")
    with pytest.raises(TypeError, match="tuned is NoneType; pass a policy's name or directory, or a CausalLMPolicy"):
        ImplicitRewardCredit(None)
    with pytest.raises(TypeError, match="reference is GPT2LMHeadModel"):
        ImplicitRewardCredit(TUNED, toy_policy(0))
    with pytest.raises(ValueError, match="rto_beta is -1"):
        ImplicitRewardCredit(TUNED, rto_beta=-1)
    with pytest.raises(ValueError, match="clip is 0"):
        ImplicitRewardCredit(TUNED, clip=0)
    with pytest.raises(ValueError, match="rows_per_forward is 0"):
        ImplicitRewardCredit(TUNED, rows_per_forward=0)
    with pytest.raises(MissingResource, match="nobody here loads the policy 'imdb-tiny' by name"):
        credit(TUNED, "imdb-tiny")
    with pytest.raises(ValueError, match=r"the tuned policy has temperature 2.0 and its reference 1.0"):
        credit(policy(1, temperature=2.0))
    with pytest.raises(ValueError, match="the policies have top_k 3; make them with top_k=0"):
        credit(policy(1, top_k=3), policy(2, top_k=3))
