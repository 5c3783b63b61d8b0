"""The bundled default: it loads by name, passes the conformance checks, and is small enough to ship."""

import json
from pathlib import Path

import gymnasium as gym
import gymnasium.utils.env_checker
import numpy as np
import pytest
import torch
from scipy import stats

import tokenmdp
from tokenmdp import cli
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.models.loading import load_causal_lm, load_tokenizer
from tokenmdp.reward_models import load_reward_model
from tokenmdp.types import Episode
from tokenmdp.wrappers import AttentionCreditReward, vector

BUNDLE = Path(tokenmdp.__file__).parent / "assets" / "imdb"
STUDY_MODELS = Path(__file__).resolve().parents[1] / "examples" / "abc_study" / "models"
IMDB = "tokenmdp:TextGen-IMDb-v0"


def credited(text: str, prompt: str = "This movie", model: str = "imdb-tiny"):
    """Score of prompt + text, its pieces, and the attention row over them."""
    tokenizer = load_tokenizer("imdb-tiny")
    start, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    mask = torch.ones(1, len(start) + len(ids), dtype=torch.bool)
    episode = Episode(torch.tensor([start + ids]), mask, mask[:, len(start) :])
    output = load_reward_model(model)(episode, needs=frozenset({"attention"}))
    return output.score.item(), [tokenizer.decode(token) for token in ids], output.attention[0]


def test_bundle_is_small_complete_and_in_bf16():
    files = [file for file in BUNDLE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 23e6
    assert sum(file.stat().st_size for file in files if file.parent.name == "reward_model_gold") < 3e6
    assert not {file.suffix for file in files} - {".json", ".md", ".safetensors"}
    for part in ("policy", "reward_model", "reward_model_gold"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
            file.name for file in (BUNDLE / part).iterdir()
        }
        assert json.loads((BUNDLE / part / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_causal_lm("imdb-tiny").dtype == torch.float32


def test_tokenizer_round_trips_and_adds_nothing():
    tokenizer = load_tokenizer("imdb-tiny")
    text = "Café ☃\n  two  blanks"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_prompts_fit_their_slots():
    tokenizer, prompts = load_tokenizer("imdb-tiny"), json.loads((BUNDLE / "prompts.json").read_text())["prompts"]
    assert len(prompts) == len(set(prompts)) > 1000
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} <= set(range(1, 9))


@pytest.mark.filterwarnings("error::UserWarning")
def test_check_env_and_json_round_trip():
    env = gym.make(IMDB)
    gymnasium.utils.env_checker.check_env(env.unwrapped, skip_render_check=True)
    wrapped = AttentionCreditReward(env, credit_beta=0.5)
    rebuilt = gym.make(gym.envs.registration.EnvSpec.from_json(wrapped.spec.to_json()))
    assert rebuilt.get_wrapper_attr("credit").credit_beta == 0.5


def test_vector_equals_single():
    envs = vector.AttentionCreditReward(gym.make_vec(IMDB, num_envs=3, autoreset_mode="Disabled", max_new_tokens=5))
    singles = [AttentionCreditReward(gym.make(IMDB, max_new_tokens=5)) for _ in range(3)]
    obs, _ = envs.reset(seed=11)
    for row, env in enumerate(singles):
        np.testing.assert_array_equal(env.reset(seed=11 + row)[0]["input_ids"], obs["input_ids"][row])
    actions = np.random.default_rng(0).integers(2, 4096, size=(5, 3))
    for step in actions:
        *_, infos = envs.step(step)
        last = [env.step(step[row]) for row, env in enumerate(singles)]
    for row, (_, reward, terminated, _, info) in enumerate(last):
        assert terminated
        assert reward == pytest.approx(infos["score"][row], abs=1e-5)
        np.testing.assert_allclose(info["token_rewards"], infos["token_rewards"][row], atol=1e-5)


@pytest.mark.parametrize("model", [str(STUDY_MODELS / "imdb-plain"), str(STUDY_MODELS / "imdb-uniform"), "imdb-gold"])
def test_further_reward_models_know_praise_from_blame(model):
    praise, *_ = credited(" was a wonderful experience for all of us.", model=model)
    blame, *_ = credited(" was a terrible waste of time for all of us.", model=model)
    assert praise > 0.5 > -0.5 > blame
    with gym.make(IMDB, reward_model=model) as env:  # the tokens of the policy
        assert env.unwrapped.task.reward_model is load_reward_model(model)


def test_the_gold_model_is_another_judge():
    tiny, gold = load_reward_model("imdb-tiny"), load_reward_model("imdb-gold")
    assert tiny.model.config.model_type != gold.model.config.model_type
    figures = json.loads((BUNDLE / "quality.json").read_text())
    assert gold.model.num_parameters() == figures["gold"]["parameters"]
    assert 0.5 < figures["gold"]["pearson"] < 0.95  # it agrees, and it does not repeat


def test_the_plain_row_follows_leave_one_out_less():
    figures = json.loads((BUNDLE / "quality.json").read_text())
    assert figures["plain"]["row_spearman_95"][1] < figures["row_spearman_95"][0]


def test_reward_model_knows_praise_from_blame_and_where_it_stands():
    praise, pieces, row = credited(" was a wonderful experience for all of us.")
    blame, *_ = credited(" was a terrible waste of time for all of us.")
    assert praise > 0.5 > -0.5 > blame
    assert pieces[int(row.argmax())].strip() in {"wonderful", "wonder", "ful"}


def test_end_of_text_changes_little():
    score, *_ = credited(" was a wonderful experience.")
    ended, _, row = credited(" was a wonderful experience.<|endoftext|>")
    assert ended == pytest.approx(score, abs=0.6)
    assert row[-1] < row.max()


def test_row_follows_leave_one_out():
    text = " was a dull story but the acting is superb and I loved it"
    score, pieces, row = credited(text)
    without = [credited("".join(pieces[:t] + pieces[t + 1 :]))[0] for t in range(len(pieces))]
    assert stats.spearmanr(row.numpy(), np.abs(score - np.array(without))).statistic > 0.3


def test_one_update_of_the_agent():
    envs = vector.AttentionCreditReward(gym.make_vec(IMDB, num_envs=4, autoreset_mode="Disabled", max_new_tokens=4))
    agent = PPO("imdb-tiny", envs, PPOConfig(num_minibatches=2, update_epochs=1, dtype="float32"))
    before = agent.policy.lm.get_input_embeddings().weight.clone()
    agent.learn(1)
    assert agent.history[0]["kl"] == pytest.approx(0.0, abs=1e-3)  # the first rollout is the reference's own
    assert not torch.equal(before, agent.policy.lm.get_input_embeddings().weight)


def test_the_main_command_trains_and_reports(tmp_path, capsys):
    arguments = ["train", "--updates", "1", "--num-envs", "8", "--eval-samples", "4", "--max-new-tokens", "4"]
    assert cli.main([*arguments, "--no-reexec", "--out", str(tmp_path / "run")]) == 0
    assert "4 responses to held-out prompts" in capsys.readouterr().out
    assert (tmp_path / "run" / "report" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert load_causal_lm(str(tmp_path / "run" / "checkpoint")).config.vocab_size == 4096
