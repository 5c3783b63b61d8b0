"""The batched environment as SB3's VecEnv: row by row what a DummyVecEnv of single environments does."""

import gymnasium as gym
import numpy as np
import pytest
from doubles import SB3, HashRewardModel

pytest.importorskip("sb3_contrib", reason=SB3)
from gymnasium.utils.env_checker import data_equivalence
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from sb3_ledger import TOY
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor

from tokenmdp.interop.sb3 import GymVectorToSB3
from tokenmdp.wrappers import UniformReward, vector
from tokenmdp.wrappers.base import CreditWrapper

pytestmark = pytest.mark.filterwarnings("ignore:.*episodes ended unread")


def bridge(num_envs=3, wrapper=vector.UniformReward, **arguments):
    envs = gym.make_vec(TOY, num_envs=num_envs, autoreset_mode="SameStep", **arguments)
    return GymVectorToSB3(wrapper(envs) if wrapper else envs)


def without_time(infos):
    return [
        {key: {"r": value["r"], "l": value["l"]} if key == "episode" else value for key, value in info.items()}
        for info in infos
    ]


def same(one, two):
    return data_equivalence(dict(one), dict(two), exact=True)


@pytest.mark.parametrize("arguments", [{}, {"horizon_range": (1, 6)}], ids=str)
def test_every_step_equals_single_environments(arguments):
    arguments |= {"reward_model": HashRewardModel()}
    ours = bridge(**arguments)
    theirs = make_vec_env(TOY, 3, env_kwargs=arguments, wrapper_class=UniformReward)
    assert ours.seed(5) == theirs.seed(5)
    for _ in range(2):  # the second reset is not seeded
        assert same(ours.reset(), theirs.reset())
        assert ours.reset_infos == theirs.reset_infos
        rng = np.random.default_rng(0)
        for _ in range(40):
            actions = rng.integers(32, size=3)
            (obs, *one, infos), (other_obs, *two, other_infos) = ours.step(actions), theirs.step(actions)
            assert same(obs, other_obs)
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, two, strict=True))
            assert data_equivalence(without_time(infos), without_time(other_infos), exact=True)
            assert ours.reset_infos == theirs.reset_infos


def test_a_step_costs_one_reward_model_call_however_many_rows_end():
    model = HashRewardModel()
    venv = bridge(8, reward_model=model)
    venv.reset()
    for _ in range(5):
        venv.step(np.array([30, 30, 30, 30, 30, 1, 2, 3]))
    assert [len(texts) for texts, _ in model.asked] == [5] * 5


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_other_autoreset_modes_are_refused(mode):
    envs = vector.UniformReward(gym.make_vec(TOY, num_envs=2, autoreset_mode=mode))
    with pytest.raises(ValueError, match=f"autoreset_mode is {mode}; .*autoreset_mode='SameStep'"):
        GymVectorToSB3(envs)


def test_single_environments_are_refused():
    with pytest.raises(TypeError, match="single environments go into SB3's DummyVecEnv"):
        GymVectorToSB3(gym.make(TOY))


def test_masks_are_found_as_maskable_ppo_looks_for_them():
    venv = bridge(min_new_tokens=2)
    assert is_masking_supported(venv)
    venv.reset()
    for expected in (False, False, True):
        masks = get_action_masks(venv)
        assert (masks.shape, masks.dtype) == ((3, 32), np.bool_)
        assert (masks[:, 30] == expected).all()
        assert masks[:, :30].all()
        venv.step(np.array([1, 2, 3]))
    assert len(venv.env_method("action_masks", indices=[0, 2])) == 2
    assert np.array_equal(venv.env_method("action_masks", indices=1)[0], get_action_masks(venv)[1])


def test_prompts_are_given_once_for_all_rows_or_row_by_row():
    venv = bridge()
    tokenizer = venv.get_attr("tokenizer")[0]

    def prompts():
        obs = venv.reset()
        rows = zip(obs["input_ids"], obs["attention_mask"].astype(bool), strict=True)
        return [tokenizer.decode(ids[mask]) for ids, mask in rows]

    venv.set_options({"prompt": "a very good film"})
    assert prompts() == ["a very good film"] * 3
    venv.set_options([{"prompt": "the plot"}, {}, {"prompt": "so bad"}])
    assert prompts()[::2] == ["the plot", "so bad"]
    assert prompts() != ["a very good film"] * 3  # options count once
    venv.set_options({"reset_mask": np.array([True, False, False])})
    with pytest.raises(ValueError, match=r"option 'reset_mask' .* set_options takes 'prompt'"):
        venv.reset()


def test_attributes_and_methods():
    venv = bridge()
    assert venv.has_attr("credit")
    assert not venv.has_attr("nothing")
    assert venv.get_attr("min_new_tokens", indices=[0, 1]) == [0, 0]
    venv.set_attr("token_rewards_read", True)
    assert venv.envs.unwrapped.token_rewards_read
    credit = object()
    venv.set_attr("credit", credit)
    assert venv.envs.credit is credit
    venv.set_attr("note", "new", indices=range(3))
    assert venv.envs.unwrapped.note == "new"
    with pytest.raises(ValueError, match=r"rows 1: the 3 rows are one batch"):
        venv.set_attr("token_rewards_read", False, indices=1)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        venv.env_method("nothing")
    assert len(venv.env_method("get_rng_state")) == 3


class Chatty(gym.vector.VectorWrapper):
    """Results as long as the batch, about all of it, and an array about its rows."""

    def names(self):
        return ["one", "two", "three"]

    def shape(self):
        return 3, 7, 9

    def text(self):
        return "abc"

    def scalar(self):
        return np.array(2.0)

    def scores(self):
        return np.array([1.0, 2.0, 3.0])

    def table(self):
        return np.zeros((2, 3))


def test_results_are_handed_out_by_row_only_where_they_have_rows():
    envs = gym.make_vec(TOY, num_envs=3, autoreset_mode="SameStep", render_mode="ansi")
    venv = GymVectorToSB3(Chatty(vector.UniformReward(envs)))
    venv.seed(3)
    venv.reset()
    for name in ("names", "shape", "text", "scalar"):
        whole = getattr(venv.envs, name)()
        assert venv.env_method(name) == [whole] * 3
        assert venv.env_method(name, indices=1) == [whole]
    assert venv.env_method("scores", indices=[2, 0]) == [3.0, 1.0]
    assert all(table.shape == (2, 3) for table in venv.env_method("table"))
    assert venv.env_method("get_rng_state", indices=1) == [envs.unwrapped.get_rng_state()[1]]
    assert venv.env_method("render") == list(envs.render())
    assert len(set(venv.env_method("render"))) >= 2


def test_wrappers_are_found():
    venv = bridge()
    assert venv.env_is_wrapped(CreditWrapper) == [True] * 3
    assert venv.env_is_wrapped(vector.SparseReward) == [False] * 3
    assert venv.env_is_wrapped(Monitor, indices=0) == [True]
    assert bridge(wrapper=None).env_is_wrapped(CreditWrapper) == [False] * 3


def check_statistics(venv):
    venv.reset()
    venv.step(np.array([4, 4]))
    *_, infos = venv.step(np.array([30, 4]))
    assert "episode" not in infos[1]
    assert infos[0]["episode"]["l"] == 2
    assert infos[0]["episode"]["r"] == pytest.approx(infos[0]["score"], abs=1e-5)
    assert infos[0]["episode"]["t"] >= 0.0


def test_episode_statistics_with_and_without_vecmonitor(tmp_path):
    check_statistics(bridge(2, reward_model=HashRewardModel()))
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        venv = VecMonitor(bridge(2, reward_model=HashRewardModel()), str(tmp_path / "log"), info_keywords=("score",))
    check_statistics(venv)
    venv.close()
    assert (tmp_path / "log.monitor.csv").read_text().count("\n") == 3  # a comment, the names and one episode


@pytest.mark.filterwarnings("error")
def test_evaluation_does_not_ask_for_a_monitor():
    venv = bridge(2, reward_model=HashRewardModel())
    venv.set_attr("token_rewards_read", True)
    model = PPO("MultiInputPolicy", venv, n_steps=8, batch_size=16, device="cpu")
    rewards, lengths = evaluate_policy(model, venv, 5, deterministic=False, return_episode_rewards=True)
    assert len(rewards) == 5
    assert all(1 <= length <= 8 for length in lengths)


def test_rendering():
    venv = bridge(2, render_mode="rgb_array")
    venv.reset()
    assert [image.dtype for image in venv.get_images()] == [np.uint8] * 2
    assert venv.render().ndim == 3
    venv = bridge(2, render_mode="ansi")
    venv.reset()
    assert venv.render() is None
    with pytest.warns(UserWarning, match="images need 'rgb_array'"):
        assert venv.get_images() == [None, None]
    assert len(venv.env_method("render")) == 2
    venv.close()
