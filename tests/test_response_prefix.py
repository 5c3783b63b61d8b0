"""Starting an episode in the middle: reset with a response prefix is the same as having stepped its tokens."""

import gymnasium as gym
import gymnasium.utils.env_checker
import numpy as np
import pytest
from doubles import HashRewardModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp import TextGenVectorEnv, wrappers

TOY = "tokenmdp:TextGen-Toy-v0"
WORDS = st.integers(0, 28)


def same(first, second):
    return gym.utils.env_checker.data_equivalence(first, second, exact=True)


def make(**kwargs):
    return wrappers.AttentionCreditReward(gym.make(TOY, reward_model=HashRewardModel(), **kwargs))


def make_vec(num_envs=3, **kwargs):
    return gym.make_vec(TOY, num_envs=num_envs, autoreset_mode="Disabled", reward_model=HashRewardModel(), **kwargs)


@settings(deadline=None, max_examples=40)
@given(
    prompt=st.lists(WORDS, min_size=1, max_size=4),
    prefix=st.lists(WORDS, max_size=7),
    rest=st.lists(WORDS, max_size=8),
)
def test_it_is_as_if_the_tokens_had_been_stepped(prompt, prefix, rest):
    stepped, started = make(), make()
    expected, _ = stepped.reset(options={"prompt": prompt})
    for token in prefix:
        expected, *_ = stepped.step(token)
    obs, info = started.reset(options={"prompt": prompt, "response_prefix": prefix})
    assert info == {}
    assert same(obs, expected)
    for token in [*rest, started.unwrapped.eos_token_id]:
        ours, theirs = started.step(token), stepped.step(token)
        assert same(ours, theirs)  # observation, reward, flags, score, n_tokens, token_mask, token_rewards
        if ours[2]:
            assert ours[4]["n_tokens"] <= 8
            return


def test_the_prefix_may_be_a_text_or_any_kind_of_ids():
    env = make()
    expected, _ = env.reset(options={"prompt": "the film", "response_prefix": "was great"})
    ids = env.unwrapped.tokenizer.encode("was great", add_special_tokens=False)
    for prefix in (ids, tuple(ids), np.array(ids)):
        assert same(env.reset(options={"prompt": "the film", "response_prefix": prefix})[0], expected)
    for nothing in (None, "", []):
        alone, _ = env.reset(options={"prompt": "the film", "response_prefix": nothing})
        assert same(alone, env.reset(options={"prompt": "the film"})[0])


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_vector_rows_are_the_single_episodes(mode):
    prefixes = [[1, 2, 3], None, [4]]
    envs = gym.make_vec(TOY, num_envs=3, autoreset_mode=mode, reward_model=HashRewardModel())
    singles = [gym.make(TOY, reward_model=HashRewardModel()) for _ in range(3)]
    batch, _ = envs.reset(seed=7, options={"response_prefix": prefixes})
    for row, (env, prefix) in enumerate(zip(singles, prefixes, strict=True)):
        obs, _ = env.reset(seed=7 + row, options={"response_prefix": prefix})  # the prompts are drawn as before
        assert same({key: rows[row] for key, rows in batch.items()}, obs)
    _, rewards, ended, _, infos = envs.step(np.full(3, envs.eos_token_id))
    assert ended.all()
    report = infos["final_info"] if mode == "SameStep" else infos
    assert report["n_tokens"].tolist() == [4, 1, 2]
    assert rewards.tolist() == [env.step(envs.eos_token_id)[1] for env in singles]
    assert (envs.reset()[0]["attention_mask"][:, 4:] == 0).all()  # the next episode starts without one


def test_only_the_rows_of_the_mask_start_again():
    envs = make_vec()
    before, _ = envs.reset(seed=0)
    options = {"reset_mask": np.array([False, True, False]), "response_prefix": [None, [9, 9], "not read at all"]}
    after, _ = envs.reset(options=options)
    assert after["attention_mask"][:, 4:].sum(-1).tolist() == [0, 2, 0]
    assert same({key: rows[[0, 2]] for key, rows in after.items()}, {key: rows[[0, 2]] for key, rows in before.items()})


def test_a_horizon_can_be_chosen_where_it_is_part_of_the_state():
    env = make(horizon_range=(3, 8))
    obs, info = env.reset(seed=0, options={"prompt": [1], "response_prefix": [2, 3, 4, 5], "horizon": 6})
    assert info["horizon"] == obs["horizon"][0] == 6
    assert not env.step(6)[2]
    assert env.step(7)[2]
    envs = make_vec(horizon_range=(3, 8))
    assert envs.reset(options={"horizon": np.array([3, 5, 8])})[1]["horizon"].tolist() == [3, 5, 8]
    assert envs.reset(options={"horizon": 4})[1]["horizon"].tolist() == [4, 4, 4]
    assert envs.unwrapped.horizons.tolist() == [4, 4, 4]
    # One that is given is not drawn: the next one is the first of the seed.
    first = make(horizon_range=(3, 8)).reset(seed=5, options={"prompt": [1]})[1]["horizon"]
    env.reset(seed=5, options={"prompt": [1], "horizon": 3})
    assert env.reset(options={"prompt": [1]})[1]["horizon"] == first


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"response_prefix": [1] * 8},
            ValueError,
            "8 tokens and the episode may end after 8.*by 1 or raise",
        ),
        ({"response_prefix": [1, 30]}, ValueError, "holds the end-of-text token 30"),
        ({"response_prefix": "good <eos>"}, ValueError, "holds the end-of-text token 30"),
        ({"response_prefix": [1, 32]}, ValueError, r"holds token id 32; legal ids are 0\.\.31"),
        ({"response_prefix": [-1]}, ValueError, "holds token id -1"),
        ({"response_prefix": "a kaleidoscope"}, ValueError, "'a kaleidoscope', which the tokenizer cannot read"),
        ({"response_prefix": 5}, TypeError, "a text or a list of token ids, not 5"),
        ({"response_prefix": [1.5]}, TypeError, "a text or a list of token ids"),
        ({"horizon": 4}, ValueError, "every episode has max_new_tokens=8"),
        ({"prompt": ""}, ValueError, "is empty"),
    ],
)
def test_a_refused_reset_leaves_the_running_episode(options, error, message):
    env, twin = make(), make()
    envs, twins = make_vec(), make_vec()
    for one in (env, twin, envs, twins):
        one.reset(seed=3)
    env.step(1), twin.step(1), envs.step(np.ones(3, dtype=int)), twins.step(np.ones(3, dtype=int))
    with pytest.raises(error, match=message):
        env.reset(seed=4, options=options)
    with pytest.raises(error, match=message):
        envs.reset(seed=4, options={name: [None, None, value] for name, value in options.items()})
    assert same(env.step(30), twin.step(30))
    assert same(envs.step(np.full(3, 30)), twins.step(np.full(3, 30)))
    assert same(env.reset(), twin.reset())  # and no random numbers were drawn or seeded
    assert same(envs.reset(), twins.reset())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"horizon": 2}, ValueError, r"not in horizon_range=\(3, 8\)"),
        ({"horizon": "long"}, TypeError, "a number of tokens, not 'long'"),
        ({"response_prefix": [1, 2, 3]}, ValueError, r"may end after 3.*or give options\['horizon'\]"),
        ({"response_prefix": [1, 2, 3, 4], "horizon": 4}, ValueError, "4 tokens and the episode may end after 4"),
    ],
)
def test_bad_horizons(options, error, message):
    with pytest.raises(error, match=message):
        make(horizon_range=(3, 8)).reset(options=options)


@pytest.mark.parametrize("prefixes", [[[1], [2]], np.array([[1], [2]]), {"a": 1}], ids=str)
def test_a_batch_needs_one_prefix_a_row(prefixes):
    with pytest.raises(ValueError, match="give one for all rows or a list of 3, one per row"):
        make_vec().reset(options={"response_prefix": prefixes})


def test_environments_can_share_a_task():
    envs = make_vec()
    more = TextGenVectorEnv(5, task=envs.unwrapped.task, autoreset_mode="Disabled", score_when="all_done")
    assert more.task is envs.unwrapped.task
    assert more.reset(seed=1)[0]["input_ids"].shape == (5, 12)
    with pytest.raises(ValueError, match="task= holds max_new_tokens already"):
        TextGenVectorEnv(5, task=more.task, max_new_tokens=4)
