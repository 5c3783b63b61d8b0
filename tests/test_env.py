import copy
import json
import pickle
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import HashRewardModel
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

import tokenmdp
from tokenmdp.models.loading import load_tokenizer

TOY = "tokenmdp:TextGen-Toy-v0"


def make(**kwargs):
    return gym.make(TOY, **kwargs)


def play(env, actions):
    return [env.step(action) for action in actions]


def token(env, word):
    return env.unwrapped.tokenizer.convert_tokens_to_ids(word)


def same(first, second):
    return gym.utils.env_checker.data_equivalence(first, second, exact=True)


@pytest.fixture
def classifier_dir(tmp_path):
    tokenizer = load_tokenizer("toy")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=12, n_embd=32, n_layer=2, n_head=2, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"eos_token_id": 0}, {"horizon_range": (2, 5)}, {"max_new_tokens": 1}],
    ids=str,
)
def test_gymnasium_conformance_without_a_warning(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(**kwargs).unwrapped)


def test_an_episode_has_no_reward_until_the_end_of_text():
    env = make()
    obs, info = env.reset(seed=0, options={"prompt": "the film was"})
    eos, pad = env.unwrapped.eos_token_id, load_tokenizer("toy").pad_token_id
    assert eos != 0
    assert info == {}
    words = [token(env, word) for word in ("the", "film", "was", "great", ".")]
    assert obs["input_ids"].tolist() == [pad, *words[:3], *[pad] * 8]
    assert obs["attention_mask"].tolist() == [0, 1, 1, 1, *[0] * 8]
    assert (obs["input_ids"].dtype, obs["attention_mask"].dtype) == (np.int64, np.int8)
    steps = play(env, [words[3], words[4], eos])
    assert [step[1:4] for step in steps] == [(0.0, False, False), (0.0, False, False), (2.0, True, False)]
    assert all(
        type(value) is kind for step in steps for value, kind in zip(step[1:4], (float, bool, bool), strict=True)
    )
    obs, *_, info = steps[-1]
    assert obs["input_ids"].tolist() == [pad, *words, eos, *[pad] * 5]
    assert obs["attention_mask"].tolist() == [0, *[1] * 6, *[0] * 5]
    assert steps[0][4] == steps[1][4] == {}
    assert set(info) == {"score", "n_tokens", "token_mask"}
    assert (info["score"], info["n_tokens"], info["token_mask"].tolist()) == (2.0, 3, [True] * 3 + [False] * 5)
    assert (info["score"].dtype, info["n_tokens"].dtype, info["token_mask"].dtype) == (np.float32, np.int64, np.bool_)


def test_the_horizon_terminates_and_never_truncates():
    env = make(max_new_tokens=3)
    env.reset(seed=0)
    flags = [step[2:4] for step in play(env, [0, 0, 0])]
    assert flags == [(False, False), (False, False), (True, False)]


def test_token_id_zero_can_be_the_end_of_text():
    env = make(eos_token_id=0)
    env.reset(seed=0)
    assert env.step(0)[2] is True


def test_arrays_of_obs_and_info_are_fresh_and_flags_are_python():
    env = make()
    first, _ = env.reset(seed=0)
    kept = copy.deepcopy(first)
    second, *_ = env.step(1)
    second["input_ids"][:] = 0
    third, *_, info = env.step(env.unwrapped.eos_token_id)
    assert same(first, kept)
    assert third["input_ids"].any()
    info["token_mask"][:] = False
    assert env.unwrapped.outcome.episode.response_mask.sum() == 2


def test_seeds_draw_the_same_prompts_and_horizons():
    def prompts(env, seed):
        first = env.reset(seed=seed)
        return [first, *(env.reset() for _ in range(20))]

    one, two = make(horizon_range=(2, 5)), make(horizon_range=(2, 5))
    assert same(prompts(one, 3), prompts(two, 3))
    assert not same(prompts(one, 3), prompts(two, 4))


def test_a_drawn_horizon_is_in_the_observation_and_ends_the_episode():
    env = make(horizon_range=(2, 4))
    seen = set()
    for seed in range(40):
        obs, info = env.reset(seed=seed)
        assert obs in env.observation_space
        assert obs["horizon"].tolist() == [info["horizon"]]
        horizon = int(info["horizon"])
        seen.add(horizon)
        assert [step[2] for step in play(env, [0] * horizon)] == [False] * (horizon - 1) + [True]
    assert seen == {2, 3, 4}


def test_prompts_may_be_token_ids():
    env = make()
    ids = [token(env, word) for word in ("a", "very")]
    assert same(env.reset(options={"prompt": ids})[0], env.reset(options={"prompt": "a very"})[0])


def test_truncation_keeps_the_side_that_was_asked_for():
    for side, words in (("left", "movie is so good"), ("right", "this movie is so")):
        env = make(truncate_prompt=side)
        obs, _ = env.reset(options={"prompt": "this movie is so good"})
        assert env.unwrapped.tokenizer.decode(obs["input_ids"][:4]) == words


def test_end_of_text_is_masked_until_min_new_tokens():
    env = make(min_new_tokens=2)
    eos = env.unwrapped.eos_token_id
    env.reset(seed=0)
    for count in range(3):
        legal = env.unwrapped.action_masks()
        assert (legal.shape, legal.dtype) == ((32,), np.bool_)
        assert legal[eos] == (count == 2)
        assert np.delete(legal, eos).all()
        if count < 2:
            env.step(0)
    assert env.step(eos)[2]


def test_the_reward_model_is_called_once_an_episode_on_the_ids_alone():
    model = HashRewardModel()
    env = make(reward_model=model)
    env.reset(seed=0, options={"prompt": [5, 6]})
    eos = env.unwrapped.eos_token_id
    play(env, [7, 8])
    assert model.asked == []
    assert env.unwrapped.outcome is None
    *_, info = env.step(eos)
    assert model.asked == [([[5, 6, 7, 8, eos]], False)]
    outcome = env.unwrapped.outcome
    assert (outcome.rows.tolist(), outcome.reward.score.tolist()) == ([0], [info["score"]])
    env.reset()
    assert env.unwrapped.outcome is outcome  # valid until the next step
    env.step(1)
    assert env.unwrapped.outcome is None


def test_a_copy_in_mid_episode_continues_identically():
    env = make(horizon_range=(4, 8))
    env.reset(seed=5)
    play(env, [1, 2])
    copies = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    rest = [1, 2, env.unwrapped.eos_token_id]

    def go_on(env):
        steps = []
        for action in rest:
            steps.append(env.step(action))
            if steps[-1][2]:
                break
        return [*steps, env.reset(), env.step(3)]

    expected = go_on(env)
    assert all(same(go_on(other), expected) for other in copies)


def test_the_reward_model_is_never_copied():
    model = HashRewardModel()
    env = make(reward_model=model)
    for other in (copy.deepcopy(env), gym.make(env.spec), gym.make(copy.deepcopy(env.spec))):
        assert other.unwrapped.task.reward_model is model
    named = make()
    assert pickle.loads(pickle.dumps(named)).unwrapped.task.reward_model is named.unwrapped.task.reward_model


def test_specs_rebuild_the_env_also_through_json():
    env = make(max_new_tokens=3, horizon_range=(2, 3), prompts=["a film", "the plot"], render_mode="ansi")
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        other = gym.make(spec)
        assert other.spec == env.spec or spec is not env.spec  # JSON turns tuples into lists
        assert same(env.reset(seed=1), other.reset(seed=1))
        assert same(play(env, [3, 4])[-1], play(other, [3, 4])[-1])


def test_an_object_in_a_spec_is_refused_by_json_clearly():
    env = make(reward_model=HashRewardModel())
    with pytest.raises(TypeError, match="HashRewardModel"):
        env.spec.to_json()


def test_a_named_reward_model_loads_at_the_first_score_and_once(classifier_dir, monkeypatch):
    calls = []
    original = tokenmdp.envs.task.load_reward_model
    monkeypatch.setattr(
        "tokenmdp.envs.task.load_reward_model", lambda *args, **kw: calls.append(args) or original(*args, **kw)
    )
    envs = [make(reward_model=classifier_dir) for _ in range(3)]
    assert calls == []
    for env in envs:
        env.reset(seed=0)
        score = play(env, [1, env.unwrapped.eos_token_id])[-1][1]
        assert score != 0.0
    assert len({id(env.unwrapped.task.reward_model) for env in envs}) == 1
    assert len(calls) == 3


def test_a_named_classifier_gives_the_same_score_after_a_json_round_trip(classifier_dir):
    env = make(reward_model=classifier_dir)
    other = gym.make(EnvSpec.from_json(env.spec.to_json()))
    scores = []
    for each in (env, other, pickle.loads(pickle.dumps(env))):
        each.reset(seed=0)
        scores.append(play(each, [4, 5, each.unwrapped.eos_token_id])[-1][1])
    assert scores[0] == scores[1] == scores[2] != 0.0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"prompts": ["this movie is so very good"]}, ValueError, "prompt 0 has 6 tokens.* is 4.*truncate_prompt"),
        ({"prompts": ["the film", ""]}, ValueError, "prompt 1 is empty"),
        ({"prompts": []}, ValueError, "no prompts"),
        ({"prompts": 7}, TypeError, "list of texts, .* not int"),
        ({"prompts": [[1, 99]]}, ValueError, r"prompt 0 holds the token id 99, which is not in \[0, 32\)"),
        ({"eos_token_id": 32}, ValueError, r"eos_token_id=32 is not a token: the tokenizer's ids are 0..31"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id=-1"),
        ({"eos_token_id": "</s>"}, ValueError, "eos_token_id='</s>' is neither a token id nor a list of ids"),
        ({"eos_token_id": [30, True]}, ValueError, r"eos_token_id=\[30, True\] is neither"),
        ({"eos_token_id": []}, ValueError, r"eos_token_id=\[\] is neither"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"max_new_tokens": "16"}, ValueError, "max_new_tokens has '16'; give a whole number"),
        ({"min_new_tokens": 2.5}, ValueError, "min_new_tokens has 2.5; give a whole number"),
        ({"min_new_tokens": 9}, ValueError, "min_new_tokens=9 is not in"),
        ({"horizon_range": (0, 4)}, ValueError, r"horizon_range=\(0, 4\) needs"),
        ({"horizon_range": (4, 9)}, ValueError, "max_new_tokens=8"),
        ({"horizon_range": (4,)}, ValueError, "give two numbers"),
        ({"horizon_range": (1.5, 4)}, ValueError, "horizon_range has 1.5; give a whole number"),
        ({"add_special_tokens": "no"}, ValueError, "is neither True nor False"),
        ({"prompt_tokens": (5, 2)}, ValueError, r"prompt_tokens is \(5, 2\); give \(least, most\)"),
        ({"reward_model": "imdb-tiny", "reward_dtype": "int8"}, ValueError, "dtype 'int8' is not one of float32"),
        ({"reward_model": "imdb-tiny", "reward_device": "tpu"}, ValueError, "device 'tpu' is none that torch knows"),
        ({"truncate_prompt": "middle"}, ValueError, "truncate_prompt='middle'"),
        ({"reward_model": torch.nn.Linear(1, 1)}, TypeError, r"bare Linear.*HFRewardModel\(model, tokenizer\)"),
        ({"reward_model": 3}, TypeError, "name or a tokenmdp.RewardModel, not 3"),
        ({"reward_model": "no/such-dir/anywhere"}, OSError, "no/such-dir/anywhere"),
        ({"tokenizer": 3}, TypeError, "name or a transformers tokenizer"),
        ({"prompts": None}, gym.error.MissingArgument, "prompts is missing: pass prompts="),
        ({"reward_model": HashRewardModel(), "score": 1}, ValueError, "score=1.*is built already"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_arguments_say_what_to_do(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


def test_a_render_mode_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="render_mode='ascii'"):
        tokenmdp.TextGenEnv(tokenizer="toy", reward_model="toy-lexicon", prompts=["a"], render_mode="ascii")


def test_bring_your_own_names_what_is_missing():
    with pytest.raises(gym.error.MissingArgument, match="tokenizer is missing"):
        gym.make("tokenmdp:TextGen-v0")
    env = gym.make("tokenmdp:TextGen-v0", tokenizer="toy", reward_model="toy-lexicon", prompts=["the film"])
    assert env.reset(seed=0)[0] in env.observation_space


def test_a_tokenizer_without_end_of_text_needs_an_id():
    toy = load_tokenizer("toy")
    bare = PreTrainedTokenizerFast(tokenizer_object=toy.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(ValueError, match="no end-of-text token; pass eos_token_id=ID"):
        make(tokenizer=bare)
    env = make(tokenizer=bare, eos_token_id=toy.eos_token_id)
    assert env.reset(options={"prompt": "a"})[0]["input_ids"].tolist() == [30, 30, 30, 1, *[30] * 8]  # eos pads


def test_slots_beyond_the_reward_models_positions_are_refused(classifier_dir):
    with pytest.raises(
        ValueError, match=r"max_prompt_tokens=4 \+ max_new_tokens=9 = 13 tokens exceed the 12 positions"
    ):
        make(reward_model=classifier_dir, max_new_tokens=9)
    model = tokenmdp.load_reward_model(classifier_dir)
    with pytest.raises(ValueError, match="exceed the 12 positions"):
        make(reward_model=model, max_new_tokens=9)


def test_a_named_classifier_without_the_score_that_was_asked_for_is_refused_before_its_weights_load(classifier_dir):
    with pytest.raises(ValueError, match=r"score=1 is not 'auto' or the index of one of the 1 labels"):
        make(reward_model=classifier_dir, score=1)
    config = Path(classifier_dir) / "config.json"
    labels = {"id2label": {"0": "sad", "1": "so", "2": "glad"}, "label2id": {"sad": 0, "so": 1, "glad": 2}}
    config.write_text(json.dumps(json.loads(config.read_text()) | labels))
    with pytest.raises(ValueError, match=r"has 3 labels \(0: sad, 1: so, 2: glad\).*pass score=INDEX"):
        make(reward_model=classifier_dir)
    make(reward_model=classifier_dir, score=2)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (32, r"action 32 is not a token id; legal ids are 0..31"),
        (-7, "action -7 is not a token id"),
        (2**70, "is not a token id"),
        (1.0, r"action 1.0 \(float\) is not an integer"),
        (True, "not an integer"),
        (np.array([1]), "not an integer"),
        ("film", "not an integer"),
        (30, "action 30 is the end-of-text token, illegal after 0 tokens with min_new_tokens=1"),
    ],
)
def test_bad_actions_are_refused_and_change_nothing(action, message):
    env = make(min_new_tokens=1)
    before, _ = env.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction, match=message):
        env.unwrapped.step(action)
    after, *_ = env.step(0)
    assert after["attention_mask"].sum() == before["attention_mask"].sum() + 1


@pytest.mark.parametrize("action", [3, np.int64(3), np.array(3), np.uint8(3), torch.tensor(3)], ids=repr)
def test_every_kind_of_integer_is_an_action(action):
    env = make()
    env.reset(seed=0)
    assert env.unwrapped.step(action)[0]["input_ids"][4] == 3


def test_stepping_without_an_episode_asks_for_a_reset():
    env = make().unwrapped
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    play(env, [0, env.eos_token_id])
    with pytest.raises(gym.error.ResetNeeded, match="ended after 2 tokens"):
        env.step(0)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, r"options\['prompt'\] is empty"),
        ([], ValueError, "is empty"),
        ("this movie is so very good", ValueError, "6 tokens and max_prompt_tokens is 4"),
        (3, TypeError, "is 3; a prompt is a text, a chat or a list of token ids"),
    ],
)
def test_bad_prompts_at_reset(prompt, error, message):
    with pytest.raises(error, match=message):
        make().reset(options={"prompt": prompt})


def test_ansi_shows_the_text_so_far():
    env = make(render_mode="ansi")
    env.reset(options={"prompt": "the film was"})
    assert env.render() == "the film was |"
    env.step(token(env, "great"))
    assert env.render() == "the film was | great"


def test_human_prints_each_step_and_returns_nothing(capsys):
    env = make(render_mode="human")
    env.reset(options={"prompt": "the film was"})
    env.step(token(env, "great"))
    env.step(env.unwrapped.eos_token_id)
    assert capsys.readouterr().out.splitlines() == [
        "the film was |", "the film was | great", "the film was | great <eos>",
    ]  # fmt: skip
    assert env.render() is None


def test_images_keep_their_size():
    env = make(render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    env.step(4)
    second = env.render()
    assert first.shape == second.shape
    assert first.shape[2] == 3
    assert first.dtype == np.uint8
    assert (first != second).any()


@pytest.mark.slow  # a worker imports torch
def test_worker_processes_make_the_env_by_name():
    envs = gym.vector.AsyncVectorEnv([lambda: gym.make(TOY, max_new_tokens=2)], context="spawn")
    try:
        single = make(max_new_tokens=2)
        obs, _ = envs.reset(seed=0)
        assert same(obs["input_ids"][0], single.reset(seed=0)[0]["input_ids"])
        for _ in range(2):
            _, rewards, ends, _, infos = envs.step(np.array([20]))
            _, reward, end, _, info = single.step(20)
        assert (rewards[0], ends[0], infos["score"][0]) == (reward, end, info["score"]) == (4.0, True, 4.0)
    finally:
        envs.close()
