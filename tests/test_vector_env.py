import copy
import pickle

import gymnasium as gym
import gymnasium.utils.env_checker
import numpy as np
import pytest
from doubles import HashRewardModel
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tokenmdp import TextGenVectorEnv

TOY = "tokenmdp:TextGen-Toy-v0"
MODES = ["NextStep", "SameStep", "Disabled"]
VARIANTS = [{}, {"horizon_range": (2, 6)}, {"eos_token_id": 3, "max_new_tokens": 3}]


def make(num_envs=4, **kwargs):
    return gym.make_vec(TOY, num_envs=num_envs, **kwargs)


def same(first, second):
    return gym.utils.env_checker.data_equivalence(first, second, exact=True)


def actions_of(rng, envs, eos_share=0.2):  # 30 is end-of-text, 3 in one variant
    ends = rng.random(envs.num_envs) < eos_share
    return np.where(ends, 3 if rng.random() < 0.1 else 30, rng.integers(32, size=envs.num_envs))


def run(envs, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [copy.deepcopy(envs.step(actions_of(rng, envs))) for _ in range(steps)]


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_equal_to_single_environments_step_by_step(mode, kwargs):
    def single():
        return gym.make(TOY, reward_model=HashRewardModel(), **kwargs)

    envs = make(autoreset_mode=mode, reward_model=HashRewardModel(), **kwargs)
    singles = SyncVectorEnv([single] * 4, autoreset_mode=mode)
    assert envs.observation_space == singles.observation_space
    assert envs.action_space == singles.action_space
    assert same(envs.reset(seed=11), singles.reset(seed=11))
    ours, theirs = run(envs, 60), run(singles, 60)
    assert sum(step[2].sum() for step in ours) > 10
    assert all(same(one, other) for one, other in zip(ours, theirs, strict=True))
    assert same(envs.reset(), singles.reset())


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_disabled_is_equal_to_single_environments_and_still_after_a_rows_end(kwargs):
    envs = make(autoreset_mode="Disabled", reward_model=HashRewardModel(), **kwargs)
    singles = [gym.make(TOY, reward_model=HashRewardModel(), **kwargs) for _ in range(4)]
    rng = np.random.default_rng(0)
    for seed in (5, None, None, 8):
        batch, _ = envs.reset(seed=seed)
        rows = [env.reset(seed=None if seed is None else seed + row)[0] for row, env in enumerate(singles)]
        ended = np.zeros(4, dtype=bool)
        for _ in range(10):
            assert all(same({key: batch[key][row] for key in batch}, rows[row]) for row in range(4))
            actions = actions_of(rng, envs, eos_share=0.3)
            batch, rewards, ends, truncations, infos = envs.step(actions)
            info_of_row = [
                {key: infos[key][row] for key in infos if key[0] != "_" and infos[f"_{key}"][row]} for row in range(4)
            ]
            for row, env in enumerate(singles):
                if ended[row]:
                    assert (rewards[row], ends[row], info_of_row[row]) == (0.0, False, {})
                    continue
                rows[row], reward, end, _, info = env.step(actions[row])
                assert (rewards[row], ends[row]) == (reward, end)
                assert same({key: np.asarray(value) for key, value in info_of_row[row].items()},
                            {key: np.asarray(value) for key, value in info.items()})  # fmt: skip
                ended[row] = end
            assert not truncations.any()


def test_rewards_are_float64_and_arrays_fresh():
    envs = make(autoreset_mode="Disabled")
    obs, _ = envs.reset(seed=0)
    kept = copy.deepcopy(obs)
    after, rewards, ends, truncations, infos = envs.step(np.array([30, 1, 2, 3]))
    assert (rewards.dtype, ends.dtype, truncations.dtype) == (np.float64, np.bool_, np.bool_)
    for array in (*after.values(), infos["token_mask"]):
        array[:] = 0
    assert same(obs, kept)
    again, *_ = envs.step(np.array([0, 1, 2, 3]))
    grown = again["attention_mask"].sum(1) - kept["attention_mask"].sum(1)
    assert grown.tolist() == [1, 2, 2, 2]


def test_autoreset_mode_is_attribute_and_metadata():
    for mode in MODES:
        for spelling in (mode, AutoresetMode(mode)):
            envs = make(autoreset_mode=spelling)
            assert envs.autoreset_mode is envs.metadata["autoreset_mode"] is AutoresetMode(mode)
    assert make().autoreset_mode is AutoresetMode.NEXT_STEP


@pytest.mark.parametrize("score_when", ["ended", "all_done"])
def test_the_reward_model_sees_exactly_the_rows_that_ended(score_when):
    model = HashRewardModel()
    envs = make(3, autoreset_mode="Disabled", score_when=score_when, reward_model=model)
    envs.reset(seed=0, options={"prompt": [[1], [2], [3]]})
    eos = envs.eos_token_id
    envs.step(np.array([9, 9, 9]))
    assert (model.asked, envs.outcome) == ([], None)
    first = envs.step(np.array([8, eos, eos]))
    assert first[2].tolist() == [False, True, True]
    if score_when == "ended":
        assert model.asked == [([[2, 9, eos], [3, 9, eos]], False)]
        assert envs.outcome.rows.tolist() == [1, 2]
        assert first[4]["_score"].tolist() == [False, True, True]
        assert (first[1] == first[4]["score"]).all()
    else:
        assert (model.asked, envs.outcome, first[4], first[1].tolist()) == ([], None, {}, [0.0, 0.0, 0.0])
    envs.step(np.array([7, eos, 50]))  # ended rows ignore their action
    last = envs.step(np.array([eos, 0, 0]))
    assert last[2].tolist() == [True, False, False]
    texts = [[1, 9, 8, 7, eos]] + ([[2, 9, eos], [3, 9, eos]] if score_when == "all_done" else [])
    assert model.asked[-1] == (texts, False)
    assert last[4]["_score"].tolist() == [True, *[score_when == "all_done"] * 2]
    assert last[4]["n_tokens"].tolist() == ([4, 2, 2] if score_when == "all_done" else [4, 0, 0])
    assert same(last[1], last[4]["score"].astype(np.float64))
    asked = len(model.asked)
    idle = envs.step(np.array([0, 0, 0]))
    assert (idle[4], idle[1].any(), idle[2].any(), len(model.asked), envs.outcome) == ({}, False, False, asked, None)


def test_all_done_scores_as_ended_does():
    totals = []
    for score_when in ("ended", "all_done"):
        envs = make(8, autoreset_mode="Disabled", score_when=score_when, reward_model=HashRewardModel())
        envs.reset(seed=3)
        totals.append(sum(step[1] for step in run(envs, 8)))
    assert same(*totals)
    assert totals[0].any()


def test_same_step_scores_before_it_resets():
    model = HashRewardModel()
    envs = make(2, autoreset_mode="SameStep", reward_model=model)
    envs.reset(seed=0, options={"prompt": [[1], [2]]})
    _, rewards, ends, _, infos = envs.step(np.array([envs.eos_token_id, 5]))
    assert model.asked == [([[1, envs.eos_token_id]], False)]
    assert (ends.tolist(), infos["final_info"]["score"].tolist()) == ([True, False], rewards.tolist())
    assert infos["final_obs"][0]["input_ids"][3:5].tolist() == [1, envs.eos_token_id]
    assert infos["final_obs"][1] is None
    assert envs.outcome.rows.tolist() == [0]


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_in_mid_episode_continues_identically(mode):
    envs = make(autoreset_mode=mode, horizon_range=(3, 8))
    envs.reset(seed=2)
    run(envs, 5, seed=1)
    copies = [copy.deepcopy(envs), pickle.loads(pickle.dumps(envs))]
    assert all(other.task.reward_model is envs.task.reward_model for other in copies)
    expected = [*run(envs, 10, seed=4), envs.reset()]
    for other in copies:
        assert all(same(*pair) for pair in zip([*run(other, 10, seed=4), other.reset()], expected, strict=True))


def test_a_spec_rebuilds_the_envs():
    envs = make(3, autoreset_mode="SameStep", max_new_tokens=3)
    for spec in (envs.spec, type(envs.spec).from_json(envs.spec.to_json())):
        other = gym.make_vec(spec)
        assert (other.num_envs, other.autoreset_mode) == (3, AutoresetMode.SAME_STEP)
        assert same(other.reset(seed=1), envs.reset(seed=1))
        assert same(run(other, 5)[-1], run(envs, 5)[-1])


def test_a_list_of_seeds_and_of_prompts_goes_row_by_row():
    envs = make(3)
    obs, _ = envs.reset(seed=[7, None, 7])
    assert same(obs["input_ids"][0], obs["input_ids"][2])
    obs, _ = envs.reset(options={"prompt": ["a", None, [4, 5]]})
    assert obs["input_ids"][[0, 2], 2:4].tolist() == [[31, 1], [4, 5]]
    obs, _ = envs.reset(options={"prompt": "a film"})
    assert (obs["input_ids"] == obs["input_ids"][0]).all()
    assert envs.np_random_seed[0] == 7
    assert len(envs.np_random) == 3


def test_a_partial_reset_leaves_the_other_rows_and_the_callers_dict_alone():
    envs = make(3, autoreset_mode="Disabled")
    envs.reset(seed=0)
    before, *_ = envs.step(np.array([envs.eos_token_id, 1, 2]))
    options = {"reset_mask": np.array([True, False, False]), "prompt": ["the plot", None, None]}
    after, infos = envs.reset(options=options)
    assert set(options) == {"reset_mask", "prompt"}
    assert infos == {}
    assert after["attention_mask"][0].sum() == 2
    assert same({key: rows[1:] for key, rows in after.items()}, {key: rows[1:] for key, rows in before.items()})
    *_, ends, _, infos = envs.step(np.array([envs.eos_token_id] * 3))
    assert ends.all()
    assert infos["n_tokens"].tolist() == [1, 2, 2]


def test_a_partial_reset_draws_as_the_single_environment_would():
    envs = make(2, autoreset_mode="Disabled", horizon_range=(2, 8))
    singles = [gym.make(TOY, horizon_range=(2, 8)) for _ in range(2)]
    envs.reset(seed=4)
    for row, env in enumerate(singles):
        env.reset(seed=4 + row)
    for row in (1, 1, 0, 1):
        mask = np.arange(2) == row
        obs, infos = envs.reset(options={"reset_mask": mask})
        expected, info = singles[row].reset()
        assert same({key: rows[row] for key, rows in obs.items()}, expected)
        assert infos["_horizon"].tolist() == mask.tolist()
        assert infos["horizon"][row] == info["horizon"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reset_mask": [True, False]}, ValueError, r"bool array of shape \(2,\)"),
        ({"reset_mask": np.ones(3, dtype=bool)}, ValueError, r"shape \(2,\)"),
        ({"reset_mask": np.ones(2)}, ValueError, "bool array"),
        ({"reset_mask": np.zeros(2, dtype=bool)}, ValueError, "selects no row"),
        ({"prompt": ["a"]}, ValueError, "list of 2, one per row"),
        ({"prompt": ["a", ""]}, ValueError, "is empty"),
        ({"prompt": ["a", "this movie is so very good"]}, ValueError, "6 tokens and max_prompt_tokens is 4"),
    ],
)
def test_bad_reset_options(options, error, message):
    with pytest.raises(error, match=message):
        make(2).reset(options=options)


def test_a_waiting_score_is_not_lost_by_a_partial_reset():
    envs = make(2, autoreset_mode="Disabled", score_when="all_done")
    envs.reset(seed=0)
    envs.step(np.array([envs.eos_token_id, 1]))
    with pytest.raises(gym.error.Error, match="row 0 has ended but is not scored yet"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    envs.reset()
    *_, infos = envs.step(np.array([envs.eos_token_id] * 2))
    assert infos["n_tokens"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([1, 32]), "row 1: action 32 is not a token id; legal ids are 0..31"),
        (np.array([-1, 1]), "row 0: action -1"),
        (np.array([1.0, 2.0]), "dtype float64; one integer token id per row"),
        (np.array([True, False]), "dtype bool"),
        (np.array([1]), r"shape \(1,\)"),
        (np.array([[1], [2]]), r"shape \(2, 1\)"),
        (np.array([0, 30]), "row 1: action 30 is the end-of-text token, illegal after 0 tokens with min_new_tokens=1"),
    ],
)
def test_bad_actions_are_refused_and_change_nothing(actions, message):
    envs = make(2, min_new_tokens=1)
    before, _ = envs.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction, match=message):
        envs.step(actions)
    after, *_ = envs.step(np.array([0, 0]))
    assert (after["attention_mask"].sum(1) == before["attention_mask"].sum(1) + 1).all()


def test_the_mask_says_what_is_legal_in_each_row():
    envs = make(2, autoreset_mode="Disabled", min_new_tokens=1)
    envs.reset(seed=0)
    eos = envs.eos_token_id
    assert envs.action_masks()[:, eos].tolist() == [False, False]
    envs.step(np.array([0, 0]))
    envs.step(np.array([eos, 0]))
    masks = envs.action_masks()
    assert (masks.shape, masks.dtype) == ((2, 32), np.bool_)
    assert masks.all()


def test_stepping_before_reset_asks_for_one():
    envs = make(2)
    with pytest.raises(gym.error.ResetNeeded, match="row 0 has no episode; call reset"):
        envs.step(np.array([0, 0]))
    envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gym.error.ResetNeeded, match="row 1 has no episode"):
        envs.step(np.array([0, 0]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"autoreset_mode": "Never"}, "autoreset_mode='Never' is not one of 'NextStep', 'SameStep', 'Disabled'"),
        ({"score_when": "later"}, "score_when='later'"),
        ({"score_when": "all_done"}, "needs autoreset_mode='Disabled'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_too_few_rows_and_seeds():
    with pytest.raises(ValueError, match="num_envs=0"):
        TextGenVectorEnv(0, tokenizer="toy", reward_model="toy-lexicon", prompts=["a"])
    with pytest.raises(ValueError, match="3 seeds for 2 rows"):
        make(2).reset(seed=[1, 2, 3])


def test_random_numbers_go_on_from_a_saved_state():
    envs, other = make(horizon_range=(2, 8)), make(horizon_range=(2, 8))
    envs.reset(seed=1)
    other.set_rng_state(envs.get_rng_state())
    assert same(envs.reset(), other.reset())
    with pytest.raises(ValueError, match="4 random-number states for 2 rows"):
        make(2).set_rng_state(envs.get_rng_state())


def test_rendering_shows_every_row(capsys):
    envs = make(2, render_mode="ansi", autoreset_mode="Disabled")
    envs.reset(options={"prompt": ["a film", "the plot"]})
    envs.step(np.array([20, 30]))
    assert envs.render() == ("a film | great", "the plot | <eos>")
    envs = make(2, render_mode="human")
    envs.reset(options={"prompt": ["a film", "the plot"]})
    assert capsys.readouterr().out.splitlines() == ["a film |", "the plot |"]
