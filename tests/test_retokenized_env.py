"""A policy and a reward model with different tokenizers, from the environment to the policy update."""

import pickle
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import HashRewardModel, ScoreOnly
from other_tokenizers import FILMS, IMDB, TAIL, TOY, bpe, causal_model, encoder_model, gpt2, texts
from transformers import GPT2Config, GPT2LMHeadModel

import tokenmdp
from tokenmdp import cli, wrappers
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.credit import CREDIT_METHODS, FineReward, make_credit
from tokenmdp.envs.task import make_task
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.policy_attention import ForwardAttention
from tokenmdp.reward_models import (
    HFRewardModel,
    LexiconRewardModel,
    RetokenizedRewardModel,
    VocabularyMismatch,
    load_reward_model,
    readable_by,
    toy_lexicon,
)
from tokenmdp.reward_models.lexicon import TOY_WEIGHTS
from tokenmdp.wrappers import vector

EOS = 30
CREDIT_OPTIONS = {
    "shapley": {"budget": 40},
    "owen": {"budget": 40},
    "integrated-gradients": {"steps": 4},
    "fine-grained": {"parts": (FineReward(None, density="token"),)},
    "rto": {"tuned": "imdb-tiny"},
}


@pytest.fixture(scope="module")
def causal():
    return causal_model()


@pytest.fixture(scope="module")
def encoder():
    return encoder_model()


@pytest.fixture(scope="module")
def causal_dir(tmp_path_factory, causal):
    directory = tmp_path_factory.mktemp("causal")
    causal.tokenizer.save_pretrained(directory)
    gpt2(causal.tokenizer).save_pretrained(directory)
    return str(directory)


def make(reward_model, tokenizer="toy", **options):
    return {
        "id": "tokenmdp:TextGen-v0", "tokenizer": tokenizer, "reward_model": reward_model, "align": "offsets",
        "prompts": ["the film", "a great movie was"], "max_new_tokens": 5, "max_prompt_tokens": 8, **options,
    }  # fmt: skip


@pytest.mark.parametrize("name", CREDIT_METHODS)
@pytest.mark.filterwarnings("ignore::tokenmdp.credit.IncompleteAttribution")
def test_single_equals_vector(causal_dir, name):
    options = make(causal_dir, "imdb-tiny", reward_template=TAIL)
    method = make_credit(name, **CREDIT_OPTIONS.get(name, {}))
    envs = vector.CreditReward(gym.make_vec(**options, num_envs=3, autoreset_mode="Disabled"), method)
    singles = [wrappers.CreditReward(gym.make(**options), method) for _ in range(3)]
    policy = CausalLMPolicy.for_task("imdb-tiny", envs.unwrapped.task)
    for env in (envs, *singles):
        env.unwrapped.policy_attention = ForwardAttention(policy)
    envs.reset(seed=7)
    for row, env in enumerate(singles):
        env.reset(seed=7 + row)
    actions = np.random.default_rng(0).integers(2, len(IMDB), (5, 3))
    for step in actions:
        infos = envs.step(step)[-1]
        each = [env.step(action)[-1] for env, action in zip(singles, step, strict=True)]
    for row, info in enumerate(each):
        np.testing.assert_allclose(infos["token_rewards"][row], info["token_rewards"], atol=1e-4)
        assert np.ptp(info["token_rewards"]) > 1e-3 or name == "uniform"
        residual = 0.0 if method.conserves_return else info["credit_residual"]
        assert info["token_rewards"].sum() == pytest.approx(info["score"] - residual, abs=1e-5)
        assert infos["score"][row] == pytest.approx(info["score"], abs=1e-5)


@pytest.mark.parametrize("name", ["causal", "encoder"])
def test_ppo_learns_from_a_reward_model_with_another_tokenizer(request, name):
    options = make(request.getfixturevalue(name))
    envs = vector.AttentionCreditReward(gym.make_vec(**options, num_envs=8, autoreset_mode="Disabled"))
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=EOS, eos_token_id=EOS, **shape))
    agent = PPO(policy, envs, PPOConfig(dtype="float32", device="cpu", num_minibatches=2, update_epochs=1))
    (metrics,) = agent.learn(1).history
    assert all(np.isfinite(value) for value in metrics.values() if isinstance(value, float))
    assert isinstance(envs.unwrapped.task.reward_model, RetokenizedRewardModel)


@pytest.mark.filterwarnings("ignore:.*spec")
def test_the_wrapped_model_is_built_lazily_and_again_from_spec_and_pickle(causal_dir):
    env = gym.make(**make(causal_dir, reward_template=TAIL))
    assert "reward_model" not in vars(env.unwrapped.task)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    copied = pickle.loads(pickle.dumps(env.unwrapped.task))
    scores = []
    for task in (env.unwrapped.task, again.unwrapped.task, copied):
        assert "reward_model" not in vars(task)
        assert task.reward_model.template == TAIL
        assert task.reward_model.inner is load_reward_model(causal_dir)
        scores.append(task.reward_model(FILMS).score)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    model = RetokenizedRewardModel(load_reward_model(causal_dir), TOY, TAIL)
    assert torch.equal(pickle.loads(pickle.dumps(model))(FILMS).score, scores[0])
    with pytest.raises(TypeError, match=r"JSON cannot hold it.*name with align='offsets'"):
        model.to_json()


def test_models_that_read_the_same_tokens_are_left_as_they_are():
    lexicon = toy_lexicon()
    assert readable_by(lexicon, TOY) is lexicon
    assert make_task(tokenizer="toy", reward_model=lexicon, prompts=["a"], align="offsets").reward_model is lexicon
    assert isinstance(readable_by(lexicon, TOY, "{response} !"), RetokenizedRewardModel)
    other = LexiconRewardModel(IMDB, TOY_WEIGHTS)
    wrapped = readable_by(other, TOY)
    assert torch.equal(wrapped(FILMS).score, lexicon(FILMS).score)


def test_score_reads_a_text_in_another_tokenizers_tokens(capsys, causal_dir):
    arguments = ["score", "was great but dull", "--prompt", "the film", "--device", "cpu", "--reward-model", causal_dir]
    scores = []
    for tokenizer, tokens in ((None, None), ("toy", 4), ("imdb-tiny", len(IMDB(" was great but dull")["input_ids"]))):
        assert cli.main([*arguments, *(["--tokenizer", tokenizer] if tokenizer else [])]) == 0
        output = capsys.readouterr().out
        scores.append(float(output.split("score ")[1].split()[0]))
        if tokens is not None:
            assert sum("%" in line for line in output.splitlines()) == tokens
    assert scores == pytest.approx([scores[0]] * 3, abs=2e-4)


# --- refusals


def test_another_vocabulary_is_refused_with_the_remedy(causal, causal_dir):
    with pytest.raises(VocabularyMismatch, match=r"32 tokens and .* has \d+; .*Pass align='offsets'"):
        gym.make(**make(causal, align=None))
    task = gym.make(**make(causal_dir, align=None)).unwrapped.task
    with pytest.raises(VocabularyMismatch, match="Pass align='offsets'"):
        _ = task.reward_model


def test_bad_arguments(causal):
    with pytest.raises(ValueError, match="align='bytes' is neither None nor 'offsets'"):
        gym.make(**make(causal, align="bytes"))
    with pytest.raises(ValueError, match=r"reward_template='Q: \{response\}' lets .*pass align='offsets' with it"):
        gym.make(**make("toy-lexicon", align=None, reward_template="Q: {response}"))


@pytest.mark.parametrize("template", ["{prompt}", "{response}{response}", "{response!r}", "{response} {answer}", "{}"])
def test_a_template_shows_the_response_once_and_nothing_unknown(causal, template):
    for build in (
        lambda: RetokenizedRewardModel(causal, TOY, template),
        lambda: gym.make(**make(causal, reward_template=template)),
    ):
        with pytest.raises(ValueError, match=r"must have \{response\} once"):
            build()
    with pytest.raises(ValueError, match="is not a format string"):
        RetokenizedRewardModel(causal, TOY, "{response")


def test_a_text_beyond_the_positions_is_refused_when_it_is_scored(tmp_path):
    tokenizer = bpe()
    gpt2(tokenizer, positions=20).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = make_task(tokenizer="toy", reward_model=str(tmp_path), prompts=["a"], align="offsets", max_new_tokens=16)
    assert task.reward_model(texts(("a", "film"))).score.shape == (1,)
    longer = texts(("a", "film"), ("a film", "brilliant brilliant brilliant boring"))
    with pytest.raises(ValueError, match=r"text of row 1 has \d\d tokens of HFRewardModel.* has 20 positions; lower"):
        task.reward_model(longer)


def test_a_model_that_cannot_read_text_or_place_it_is_refused(causal):
    model = HFRewardModel(gpt2(causal.tokenizer), None)
    with pytest.raises(ValueError, match="has no tokenizer files, so it cannot read text"):
        RetokenizedRewardModel(model, TOY)
    with pytest.raises(VocabularyMismatch, match="different vocabularies"):
        readable_by(HFRewardModel(gpt2(IMDB), None), TOY)
    slow = HashRewardModel()
    slow.tokenizer = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match=r"SimpleNamespace, a slow tokenizer, which gives no character offsets"):
        RetokenizedRewardModel(slow, IMDB)


def test_needs_that_the_inner_model_cannot_meet_are_refused(encoder):
    env = gym.make(**make(encoder))
    with pytest.raises(ValueError, match="does not provide prefix_scores"):
        wrappers.CreditReward(env, tokenmdp.credit.make_credit("red"))
    with pytest.raises(ValueError, match="does not provide attention"):
        RetokenizedRewardModel(ScoreOnly(), IMDB)(texts(("a", "b"), tokenizer=IMDB), needs=frozenset({"attention"}))
