"""Configurations check each value by its declared type and its range."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from tokenmdp.agents import ALGORITHMS, algorithm
from tokenmdp.agents.ppo import PPOConfig
from tokenmdp.agents.rloo import RLOOConfig
from tokenmdp.training.typed import check_types

WRONG = [
    ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
    ({"top_k": True}, "top_k is True; it must be a whole number"),
    ({"top_k": -1}, "top_k is -1; it must not be negative"),
    ({"seed": -1}, "seed is -1; it must not be negative"),
    ({"seed": "1"}, "seed is '1'; it must be a whole number"),
    ({"learning_rate": "1e-4"}, "learning_rate is '1e-4'; it must be a number"),
    ({"learning_rate": math.inf}, "learning_rate is inf; it must be finite"),
    ({"learning_rate": 0}, "learning_rate is 0.0; it must be positive"),
    ({"kl_coef": math.nan}, "kl_coef is nan; it must be finite"),
    ({"kl_coef": None}, "kl_coef is None; it must be a number"),
    ({"kl_coef": -0.1}, "kl_coef is -0.1; it must not be negative"),
    ({"kl_target": "6"}, "kl_target is '6'; it must be a number, or None"),
    ({"kl_target": 0}, "kl_target is 0.0; it must be positive, or None to switch it off"),
    ({"kl_target": 6, "kl_coef": 0}, "kl_target is 6.0 and kl_coef is 0"),
    ({"gradient_checkpointing": "False"}, "gradient_checkpointing is 'False'; it must be True or False"),
    ({"anneal_lr": 1}, "anneal_lr is 1; it must be True or False"),
    ({"anneal_lr": True}, "set total_updates"),
    ({"dtype": "float16"}, "dtype is 'float16'; choose one of auto, float32, tf32, bfloat16"),
    ({"device": 0}, "device is 0; it must be a text"),
    ({"update_epochs": 0}, "update_epochs is 0; it must be positive"),
    ({"num_minibatches": 1.0}, "num_minibatches is 1.0; it must be a whole number"),
    ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
]
WRONG_IN_PPO = [
    ({"gamma": 2}, "gamma is 2.0; it must lie in [0, 1]"),
    ({"gae_lambda": -0.1}, "gae_lambda is -0.1; it must lie in [0, 1]"),
    ({"estimator": "mc"}, "estimator is 'mc'; choose one of reward_to_go, full_return, vine"),
    ({"estimator": "vine", "gamma": 0.9}, "estimator='vine' does not discount"),
    ({"vine_rollouts": 2.5}, "vine_rollouts is 2.5; it must be a whole number"),
    ({"vf_learning_rate": 0.0}, "vf_learning_rate is 0.0; it must be positive"),
    ({"clip_coef_value": -1.0}, "clip_coef_value is -1.0; it must be positive, or None to switch it off"),
]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [(kind, *one) for kind in (PPOConfig, RLOOConfig) for one in WRONG] + [(PPOConfig, *one) for one in WRONG_IN_PPO],
)
def test_wrong_values_are_errors_that_name_the_field(kind, given, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is compared below)
        kind(**given)
    assert message in str(error.value)


def test_numbers_of_numpy_and_whole_floats_become_pythons():
    config = PPOConfig(learning_rate=1, kl_coef=np.float32(0.5), top_k=np.int64(3))
    assert (config.learning_rate, config.kl_coef, config.top_k) == (1.0, 0.5, 3)
    assert [type(value) for value in (config.learning_rate, config.kl_coef, config.top_k)] == [float, float, int]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_what_the_command_needs(name):
    kind = algorithm(name)
    assert kind.format.algorithm == name
    assert all(kind.config_class(**fields) for fields in kind.presets.values())
    with pytest.raises(ValueError, match=r"there is no algorithm 'dpq'; choose one of ppo"):
        algorithm("dpq")


def test_a_text_is_not_split_and_a_choice_is_not_guessed():
    @dataclass
    class Names:
        one: str = "a"

        def __post_init__(self):
            check_types(self)

    assert Names("b c").one == "b c"
    with pytest.raises(ValueError, match=r"one is \['a'\]; it must be a text"):
        Names(["a"])
