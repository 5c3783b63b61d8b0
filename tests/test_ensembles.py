"""Ensembles of reward models: what they say together, how they are written and read; and which pairs to ask about."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from tokenmdp import cli
from tokenmdp.files import CheckpointError
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.preferences import query_values, read_records
from tokenmdp.reward_models import EnsembleRewardModel, LexiconRewardModel, load_reward_model
from tokenmdp.reward_models.ensemble import write_ensemble
from tokenmdp.runs.environments import toy_policy
from tokenmdp.types import lay_out
from tokenmdp.wrappers import vector

WORDS = ({"great": 2.0, "dull": -1.0}, {"great": 1.0, "dull": -3.0}, {"great": 4.0})


@pytest.fixture
def members():
    return [LexiconRewardModel(load_tokenizer("toy"), words) for words in WORDS]


def texts(*responses):
    tokenizer = load_tokenizer("toy")
    return lay_out([tokenizer.encode("the film")] * len(responses), [tokenizer.encode(text) for text in responses])


def test_the_score_is_the_mean_less_the_penalty_times_the_sd(members):
    episodes = texts("was great", "was dull", "was dull but great")
    each = torch.tensor([[2.0, 1.0, 4.0], [-1.0, -3.0, 0.0], [1.0, -2.0, 4.0]]).T  # (K, N)
    torch.testing.assert_close(EnsembleRewardModel(members).member_scores(episodes), each)
    output = EnsembleRewardModel(members, penalty=0.5)(episodes)
    torch.testing.assert_close(output.spread, each.std(0))
    torch.testing.assert_close(output.score, each.mean(0) - 0.5 * each.std(0))


def test_red_credit_of_an_ensemble_conserves_its_score_and_the_sd_is_in_the_infos(members):
    envs = gym.make_vec(
        "tokenmdp:TextGen-Toy-v0", num_envs=4, autoreset_mode="Disabled",
        reward_model=EnsembleRewardModel(members, penalty=1.0),
    )  # fmt: skip
    wrapped = vector.CreditReward(envs, "red", credit_beta=1.0)
    wrapped.reset(seed=1)
    done = np.zeros(4, dtype=bool)
    while not done.all():
        _, _, terminated, truncated, infos = wrapped.step(wrapped.action_space.sample())
        done |= terminated | truncated
    assert infos["score_sd"].shape == (4,)
    np.testing.assert_allclose(infos["token_rewards"].sum(-1), infos["score"], atol=1e-5)
    outcome = wrapped.unwrapped.outcome
    prefixes = EnsembleRewardModel(members, 1.0)(outcome.episode, needs=frozenset({"prefix_scores"})).prefix_scores
    lengths = outcome.episode.response_mask.sum(-1)
    torch.testing.assert_close(prefixes.gather(1, lengths[:, None])[:, 0], outcome.reward.score)


def test_an_ensemble_of_one_and_a_negative_penalty_are_refused(members):
    with pytest.raises(ValueError, match="an ensemble of 1"):
        EnsembleRewardModel(members[:1])
    with pytest.raises(ValueError, match="penalty is -1"):
        EnsembleRewardModel(members, penalty=-1)


def test_a_damaged_list_of_members_is_refused(tmp_path):
    write_ensemble(tmp_path, ["member-0", "member-1"])
    (tmp_path / "ensemble.json").write_text('{"format": "tokenmdp-ensemble-1", "members": "all"}')
    with pytest.raises(CheckpointError, match="is not the list of an ensemble's members"):
        load_reward_model(str(tmp_path))


def test_raw_means_invert_an_order_that_normalised_members_keep():
    truth = torch.linspace(-1, 1, 9)
    raw = torch.stack([truth, truth, -10 * truth])
    normal = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True)
    assert torch.corrcoef(torch.stack([raw.mean(0), truth]))[0, 1] < -0.99
    assert torch.corrcoef(torch.stack([normal.mean(0), truth]))[0, 1] > 0.99


def test_the_rules_of_asking_have_their_closed_forms():
    same = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    opposite = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    sigma = 1 / (1 + np.exp(-1))
    assert query_values(same, "disagreement").item() == 0
    assert query_values(opposite, "disagreement").item() == pytest.approx((2 * sigma - 1) ** 2 / 2)  # unbiased
    assert query_values(same, "label-variance").item() == 0
    assert query_values(opposite, "label-variance").item() == 0.25
    # Agreement on a large difference is not disagreement, though its logits vary more.
    two = torch.tensor([[[20.0, 0.0], [1.0, 0.0]], [[40.0, 0.0], [0.0, 1.0]]])
    assert query_values(two, "disagreement").argmax() == 1
    assert (two[..., 0] - two[..., 1]).var(0).argmax() == 0
    with pytest.raises(ValueError, match="compares members, and there is 1"):
        query_values(same[:1], "disagreement")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A toy policy with its tokenizer, and prompts."""
    place = tmp_path_factory.mktemp("policy")
    toy_policy(1).save_pretrained(place / "policy")
    load_tokenizer("toy").save_pretrained(place / "policy")
    (place / "prompts.txt").write_text("\n".join(["the film", "a story", "this movie", "i", "the plot was", "it is"]))
    return place


def test_the_command_trains_an_ensemble_that_is_asked_where_it_disagrees(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["prefer", "--policy", str(policy / "policy"), "--prompts", str(policy / "prompts.txt"), "--judge",
             "toy-lexicon", "--max-new-tokens", "4"]  # fmt: skip
    assert cli.main([*asked, "--pairs", "24", "--out", "pairs.jsonl"]) == 0
    train = ["train", "reward-model", "--data", "pairs.jsonl", "--init", str(policy / "policy"), "--held-out", "0",
             "--members", "2", "--penalty", "0.5", "--out", "rm", "--no-reexec"]  # fmt: skip
    assert cli.main(train) == 0
    ensemble = load_reward_model("rm")
    assert isinstance(ensemble, EnsembleRewardModel)
    assert ensemble.penalty == 0.5
    ppo = ["train", "ppo", "--policy", str(policy / "policy"), "--prompts", str(policy / "prompts.txt"), "--updates",
           "1", "--max-new-tokens", "4", "--num-envs", "8", "--eval-samples", "2", "--no-reexec"]  # fmt: skip
    assert cli.main([*ppo, "--reward-model", "rm", "--out", "ppo"]) == 0
    assert cli.main([*ppo, "--reward-model", "rm", "--max-new-tokens", "999", "--out", "long"]) == 2
    assert "999" in capsys.readouterr().err  # more positions than its members have
    records = read_records(tmp_path / "pairs.jsonl")
    scores = ensemble.member_scores(lay_out([one.prompt_ids for one in records], [one.chosen_ids for one in records]))
    assert not torch.allclose(scores[0], scores[1])  # another bootstrap, another head
    more = [*asked, "--pairs", "40", "--ask-by", "disagreement", "--ask-model", "rm", "--candidates", "2"]
    assert cli.main([*more, "--out", "more.jsonl"]) == 0
    assert cli.main([*more, "--seed", "1", "--out", "again.jsonl"]) == 0
    assert (tmp_path / "more.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    chosen = read_records(tmp_path / "more.jsonl")
    assert {(one.prompt_ids, one.chosen_ids) for one in chosen} != {(one.prompt_ids, one.chosen_ids) for one in records}
    capsys.readouterr()
    assert cli.main([*asked, "--ask-by", "disagreement", "--out", "third.jsonl"]) == 2
    assert "needs both, the rule and the directory of the ensemble" in capsys.readouterr().err
    assert cli.main([*more, "--ask-model", "rm/member-0/checkpoint", "--out", "third.jsonl"]) == 2
    assert "is one reward model, which disagrees with nobody" in capsys.readouterr().err
