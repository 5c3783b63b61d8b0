import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import SB3
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)  # fmt: skip

from tokenmdp.envs.task import make_task
from tokenmdp.models.loading import load_causal_lm, load_tokenizer
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.tokens import VocabularyMismatch, toy_tokenizer

pytest.importorskip("sb3_contrib", reason=SB3)

from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from tokenmdp.interop.sb3.policy import (
    CausalLMActorCriticPolicy,
    MaskableCausalLMActorCriticPolicy,
    causal_lm_kwargs,
)  # fmt: skip
from tokenmdp.models.state_reader import StateReader, read_states

TOY = "tokenmdp:TextGen-Toy-v0"
V, EOS, P, H = 32, 30, 4, 8
SLOTS = P + H
SMALL = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip


def language_model(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3, head_dim=8))
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}  # must stay without effect
    shape = {
        "n_positions": SLOTS if kind == "tight gpt2" else 32,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.3,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, **shape, **rates))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory of a random model of a kind, with a value head that says something."""
    root = tmp_path_factory.mktemp("models")

    def written(kind):
        if not (root / kind).exists():
            policy = CausalLMPolicy(language_model(kind), V, EOS)
            torch.nn.init.normal_(policy.value_head.weight)
            policy.save_pretrained(root / kind)
        return str(root / kind)

    return written


def make_envs(num_envs=5, **options):
    return make_vec_env(TOY, num_envs, seed=3, env_kwargs=options)


def make_policy(model, task=None, **options):
    task = task or gym.make(TOY).unwrapped.task
    torch.manual_seed(1)
    return CausalLMActorCriticPolicy(
        task.observation_space(), gym.spaces.Discrete(V), lambda _: 1e-3, **causal_lm_kwargs(model, task, **options)
    )


def tensors(obs, rows=slice(None)):
    return {key: torch.as_tensor(np.asarray(part))[rows] for key, part in obs.items()}


def play(policy, envs, steps):
    """Step ``envs`` with the policy's collection forward: a list of (obs, action, value, logprob, done)."""
    policy.set_training_mode(False)
    obs, rows = envs.reset(), []
    for _ in range(steps):
        with torch.no_grad():
            action, value, logprob = policy(tensors(obs))
        following, _, done, _ = envs.step(action.numpy())
        rows.append((tensors(obs), action, value, logprob, torch.as_tensor(done)))
        obs = following
    return rows


def tokens_read(policy):
    """The number of tokens in each forward from now on."""
    counts = []
    policy.causal_lm.lm.base_model.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    return counts


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "min_new_tokens": 3}], ids=str)
def test_every_row_of_an_episode_says_what_our_own_policy_says(directory, kind, options):
    least = options.get("min_new_tokens", 0)
    task = make_task(
        tokenizer="toy", reward_model="toy-lexicon", prompts=["the film was", "a", "this movie is so"],
        max_new_tokens=H, max_prompt_tokens=P, min_new_tokens=least,
    )  # fmt: skip
    policy = make_policy(directory(kind), task, **{"temperature": options.get("temperature", 1.0)})
    ours = CausalLMPolicy.for_task(load_causal_lm(directory(kind)), task, temperature=policy.causal_lm.temperature)
    ours.value_head.load_state_dict(policy.causal_lm.value_head.state_dict())
    ours.min_new_tokens = least
    ids = torch.randint(0, V - 2, (3, SLOTS), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(SLOTS) >= torch.tensor([[1], [3], [0]])
    expected = ours.evaluate(ids, mask, P)
    for t in range(H):
        seen = (mask & (torch.arange(SLOTS) < P + t)).float()
        obs = {"input_ids": ids.float(), "attention_mask": seen}  # as a rollout buffer hands them over
        values, logprobs, entropy = policy.evaluate_actions(obs, ids[:, P + t])
        torch.testing.assert_close(logprobs, expected.logprobs[:, t], rtol=0, atol=1e-4)
        torch.testing.assert_close(values[:, 0], expected.values[:, t], rtol=0, atol=1e-4)
        torch.testing.assert_close(entropy, expected.entropy[:, t], rtol=0, atol=1e-4)
        distribution = policy.get_distribution(obs)
        torch.testing.assert_close(distribution.log_prob(ids[:, P + t]), logprobs, rtol=0, atol=1e-4)
        assert (distribution.distribution.probs[:, EOS] == 0).all() == (t < least)
        assert torch.equal(policy.predict_values(obs), values)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_collection_through_the_cache_equals_whole_texts(directory, kind):
    policy = make_policy(directory(kind))
    counts = tokens_read(policy)
    rows = play(policy, make_envs(), steps=40)
    expected, ended = [], torch.ones(5, dtype=torch.bool)
    for obs, *_, done in rows:
        if not ended.all():
            expected.append(5)  # one token per row, also where the answer is then replaced
        if ended.any():
            expected.append(int(ended.sum() * obs["attention_mask"][ended].sum(1).max()))
        ended = done
    assert counts == expected
    assert len({int(done.nonzero()[0]) for *_, done in rows if done.any()}) > 1
    for obs, action, value, logprob, _ in rows:
        whole_value, whole_logprob, _ = policy.evaluate_actions(obs, action)
        torch.testing.assert_close(logprob, whole_logprob, rtol=0, atol=1e-4)
        torch.testing.assert_close(value, whole_value, rtol=0, atol=1e-4)


@st.composite
def observed(draw):
    """Successive texts of three rows, each (S,) with -1 in empty slots: rows continue, stay or jump anywhere."""
    tokens = st.lists(st.integers(0, V - 1), min_size=SLOTS, max_size=SLOTS)
    anywhere = st.tuples(tokens, st.integers(1, P), st.integers(0, H))
    rows, steps = [draw(anywhere) for _ in range(3)], []
    for _ in range(draw(st.integers(1, 6))):
        steps.append([[-1] * (P - p) + ids[: p + t] + [-1] * (H - t) for ids, p, t in rows])
        for row, (ids, p, t) in enumerate(rows):
            move = draw(st.sampled_from(["on", "on", "on", "stay", "jump"]))
            rows[row] = draw(anywhere) if move == "jump" else (ids, p, min(t + (move == "on"), H))
    return torch.tensor(steps)


@pytest.mark.parametrize("kind", ["tight gpt2", "llama"])
def test_any_succession_of_texts_is_read_right(directory, kind):
    policy = CausalLMPolicy.from_pretrained(directory(kind), V, EOS)
    reader = StateReader(policy)

    @settings(max_examples=40, deadline=None)
    @given(observed())
    @torch.no_grad()
    def check(steps):
        for texts in steps:
            ids, mask = texts.clamp(min=0), texts >= 0
            state, whole = reader.read(ids, mask), read_states(policy, ids, mask)
            assert state.attention_mask.shape[1] <= SLOTS  # columns that are no longer needed are dropped
            torch.testing.assert_close(state.logits, whole.logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(state.value, whole.value, rtol=0, atol=1e-4)

    check()


@torch.no_grad()
def changed_in_place(policy):
    policy.causal_lm.lm.lm_head.weight.mul_(1.5)


def changed_by_loading(policy):
    policy.load_state_dict({key: weight * 1.5 for key, weight in policy.state_dict().items()})


def changed_by_new_storage(policy):
    policy.load_from_vector(policy.parameters_to_vector() * 1.5)


def changed_by_the_optimizer(policy):
    sum((weight**2).sum() for weight in policy.parameters()).backward()
    policy.optimizer.param_groups[0]["lr"] = 0.1
    policy.optimizer.step()


def changed_without_a_trace(policy):
    policy.causal_lm.lm.lm_head.weight.data.mul_(1.5)  # as fused optimizers do: PyTorch counts no write


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        changed_by_loading,
        changed_by_new_storage,
        changed_by_the_optimizer,
        changed_without_a_trace,
    ],
)
def test_changed_weights_empty_the_cache(directory, change):
    policy, envs = make_policy(directory("gpt2")), make_envs()
    obs = play(policy, envs, steps=2)[1][0]
    counts = tokens_read(policy)
    action = torch.zeros(5, dtype=torch.long)
    with torch.no_grad():
        before = policy.get_distribution(obs).log_prob(action)
        assert counts == []  # the last state once more
    change(policy)
    with torch.no_grad():
        after = policy.get_distribution(obs).log_prob(action)
    torch.testing.assert_close(after, policy.evaluate_actions(obs, action)[1].detach(), rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 1e-2


def test_training_mode_keeps_no_cache_and_gradients_never_meet_one(directory):
    policy = make_policy(directory("gpt2"))
    obs = play(policy, make_envs(), steps=3)[2][0]
    counts, whole = tokens_read(policy), int(5 * obs["attention_mask"].sum(1).max())
    policy.predict_values(obs).sum().backward()  # gradients enabled
    policy.set_training_mode(True)
    with torch.no_grad():
        policy.predict_values(obs)
    policy.set_training_mode(False)
    with torch.no_grad():
        policy.predict_values(obs)  # forgotten
        policy.reuse_cache = False
        policy.predict_values(obs)
        policy.reuse_cache = True
        action, *_ = policy(obs)  # still knows
        policy.evaluate_actions(obs, action)
        policy(obs)
    assert counts == [whole] * 5
    assert not any(module.training for module in policy.causal_lm.modules())


@pytest.mark.parametrize("num_envs", [2, 5])
def test_an_evaluation_between_two_steps_disturbs_nothing(directory, num_envs):
    model = PPO(
        CausalLMActorCriticPolicy, make_envs(), policy_kwargs={"model": directory("llama")}, n_steps=8, batch_size=40
    )
    obs = play(model.policy, model.env, steps=3)[2][0]
    mean, _ = evaluate_policy(model, make_envs(num_envs), n_eval_episodes=4)
    assert np.isfinite(mean)
    with torch.no_grad():
        action, _, logprob = model.policy(obs)
    torch.testing.assert_close(logprob, model.policy.evaluate_actions(obs, action)[1].detach(), rtol=0, atol=1e-4)
    single = {key: part[0].numpy() for key, part in obs.items()}
    both = [model.predict(part, deterministic=True)[0] for part in (single, {k: v.numpy() for k, v in obs.items()})]
    assert both[0].shape == ()
    assert both[0] == both[1][0]


def test_layers_that_forget_are_read_from_the_start(directory, caplog):
    policy = make_policy(directory("mistral"))
    assert "sliding-window" in caplog.text
    for obs, action, value, logprob, _ in play(policy, make_envs(), steps=12):
        whole_value, whole_logprob, _ = policy.evaluate_actions(obs, action)
        torch.testing.assert_close(logprob, whole_logprob, rtol=0, atol=1e-4)
        torch.testing.assert_close(value, whole_value, rtol=0, atol=1e-4)


LEARNERS = {
    "ppo": (PPO, {"batch_size": 60, "n_epochs": 1}),
    "masked": (MaskablePPO, {"batch_size": 60, "n_epochs": 1}),
    "a2c": (A2C, {}),
    "trpo": (TRPO, {"batch_size": 60, "cg_max_steps": 2, "n_critic_updates": 1}),
}


def make_learner(name, model, **options):
    algorithm, settings = LEARNERS[name]
    envs = make_envs(min_new_tokens=2)
    if algorithm is MaskablePPO:  # the environment's masks say what min_new_tokens forbids
        return MaskablePPO(
            MaskableCausalLMActorCriticPolicy, envs, n_steps=12, seed=0, policy_kwargs={"model": model}, **settings
        )
    kwargs = causal_lm_kwargs(model, envs.get_attr("task")[0])
    return algorithm(CausalLMActorCriticPolicy, envs, n_steps=12, seed=0, policy_kwargs=kwargs, **settings)


@pytest.mark.parametrize("name", LEARNERS)
def test_algorithms_train_the_language_model_from_a_ratio_of_1(directory, name):
    model = make_learner(name, directory("gpt2"))
    for _ in range(2):  # the second collection must not read the first one's cache
        before = copy.deepcopy(model.policy.state_dict())
        model.learn(60, reset_num_timesteps=False)
        moved = {key for key, weight in model.policy.state_dict().items() if not torch.equal(weight, before[key])}
        assert "causal_lm.value_head.weight" in moved
        assert {key for key in moved if "attn.c_attn" in key}
        logged = model.logger.name_to_value
        if "train/approx_kl" in logged:  # one minibatch, before the only optimizer step
            assert abs(logged["train/approx_kl"]) < 1e-6
            assert logged["train/clip_fraction"] == 0
    rows = model.rollout_buffer
    assert rows.log_probs.min() > -50


def test_rows_in_the_buffer_score_the_same_from_whole_texts(directory):
    seen = []

    class AtTheEnd(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            for rows in copy.deepcopy(self.model.rollout_buffer).get():
                with torch.no_grad():
                    values, logprobs, _ = self.model.policy.evaluate_actions(
                        rows.observations, rows.actions.long().flatten()
                    )
                torch.testing.assert_close(logprobs, rows.old_log_prob, rtol=0, atol=1e-4)
                torch.testing.assert_close(values.flatten(), rows.old_values, rtol=0, atol=1e-4)
                seen.append(len(logprobs))

    make_learner("ppo", directory("llama")).learn(120, callback=AtTheEnd())
    assert seen == [60, 60]


@pytest.mark.parametrize("name", ["ppo", "masked"])
def test_a_saved_algorithm_comes_back_with_its_weights(directory, name, tmp_path):
    model = make_learner(name, directory("gpt2")).learn(60)
    obs = model.env.reset()
    actions, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip")
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], actions)
    for key, weight in loaded.policy.state_dict().items():
        assert torch.equal(weight, model.policy.state_dict()[key])
    loaded.set_env(model.env)
    loaded.learn(60)
    model.policy.save(tmp_path / "policy.pt")
    alone = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    assert np.array_equal(alone.predict(obs, deterministic=True)[0], actions)


def test_pickles_and_copies_leave_the_cache_behind(directory):
    policy = make_policy(directory("gpt2"))
    play(policy, make_envs(), steps=1)
    size = len(pickle.dumps(policy._reader))
    rows = play(policy, make_envs(), steps=6)
    assert len(pickle.dumps(policy._reader)) == size
    twin = copy.deepcopy(policy)
    changed_in_place(twin)
    for reader_of in (policy, twin):
        obs, action, *_ = rows[-1]
        with torch.no_grad():
            cached = reader_of.get_distribution(obs).log_prob(action)
        torch.testing.assert_close(cached, reader_of.evaluate_actions(obs, action)[1].detach(), rtol=0, atol=1e-4)


def test_an_exported_directory_is_read_by_transformers_by_us_and_by_the_next_policy(directory, tmp_path):
    model = make_learner("ppo", directory("gpt2")).learn(60)
    model.policy.save_pretrained(tmp_path, tokenizer=toy_tokenizer())
    assert len(load_tokenizer(str(tmp_path))) == V
    ids, mask = torch.randint(0, V, (2, SLOTS)), torch.ones(2, SLOTS, dtype=torch.bool)
    here, there = model.policy.causal_lm, CausalLMPolicy.from_pretrained(str(tmp_path), V, EOS)
    for ours, theirs in zip(here.evaluate(ids, mask, P), there.evaluate(ids, mask, P), strict=True):
        assert torch.equal(ours, theirs)
    assert here.value_head.weight.any()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids).logits, here.lm(ids).logits)
    following = make_policy(str(tmp_path))
    obs = tensors(model.env.reset())
    assert torch.equal(following.predict_values(obs), model.policy.predict_values(obs))


def test_bfloat16_forwards_keep_float32_weights_and_outputs(directory):
    exact, rounded = (make_policy(directory("llama"), compute_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {weight.dtype for weight in rounded.parameters()} == {torch.float32}
    for obs, action, value, logprob, _ in play(rounded, make_envs(), steps=10):
        assert value.dtype == logprob.dtype == torch.float32
        assert (logprob - exact.evaluate_actions(obs, action)[1]).abs().max() < 0.5


def refuse(error, message, envs=None, **kwargs):
    with pytest.raises(error, match=message):
        PPO(CausalLMActorCriticPolicy, envs or make_envs(1), policy_kwargs=kwargs)


def test_what_cannot_work_is_refused_with_a_remedy(directory, tmp_path):
    gpt2 = directory("gpt2")
    refuse(TypeError, "not those of a TextGen environment", make_vec_env("CartPole-v1"), model=gpt2)
    refuse(TypeError, "model is a GPT2LMHeadModel.*save_pretrained", model=language_model("gpt2"))
    refuse(TypeError, "net_arch", model=gpt2, net_arch=[64])
    refuse(ValueError, "min_new_tokens=2 needs eos_token_id.*causal_lm_kwargs", model=gpt2, min_new_tokens=2)
    refuse(ValueError, "up to 34 slots and the policy has 32 positions", make_envs(1, max_new_tokens=30), model=gpt2)
    refuse(VocabularyMismatch, "32 tokens and the tokenizer of 'imdb-tiny' 4096", model="imdb-tiny")
    with pytest.raises(ValueError, match="32 logits and the environment 33 tokens"):
        CausalLMActorCriticPolicy(
            gym.make(TOY).observation_space, gym.spaces.Discrete(V + 1), lambda _: 1e-3, model=gpt2
        )
    with pytest.raises(VocabularyMismatch, match="differ, first in id 0"):
        causal_lm_kwargs("imdb-tiny", gym.make(TOY).unwrapped.task)
    model = PPO(
        CausalLMActorCriticPolicy, VecNormalize(make_envs(2)), policy_kwargs={"model": gpt2}, n_steps=4, batch_size=8
    )
    with pytest.raises(ValueError, match="norm_obs=False"):
        model.learn(8)
    fine = VecNormalize(make_envs(2), norm_obs=False)
    PPO(CausalLMActorCriticPolicy, fine, policy_kwargs={"model": gpt2}, n_steps=4, batch_size=8).learn(8)
