"""The examples run offline on the toy environment."""

import functools
import re

import cleanrl_style
import credit_ablation
import gpt2_study
import gymnasium as gym
import mdp_by_hand
import pytest
import quickstart
import swap_wrappers
import torch
from doubles import SB3

from tokenmdp.cli import ablate
from tokenmdp.credit import CREDIT_METHODS
from tokenmdp.evaluation import evaluate
from tokenmdp.models.loading import load_causal_lm, load_tokenizer
from tokenmdp.runs.environments import toy_policy
from tokenmdp.study import worker
from tokenmdp.study.directory import load_study


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Arguments that replace the bundled model by a tiny random one."""
    directory = tmp_path_factory.mktemp("toy_policy")
    toy_policy(seed=0).save_pretrained(directory)
    load_tokenizer("toy").save_pretrained(directory)
    return ["--env", "TextGen-Toy-v0", "--policy", str(directory)]


def learned(output):
    """Whether the intervals of the scores before and after, as `evaluate` prints them, say so."""
    before, after = (re.search(rf"{when}: score \S+ \[(\S+), (\S+)\]", output).groups() for when in ("before", "after"))
    return float(after[0]) > float(before[1])


def test_quickstart(toy, capsys):
    quickstart.main([*toy, "--updates", "2", "--num-envs", "4"])
    output = capsys.readouterr().out
    assert re.search(r"before: mean score [+-]\d+\.\d\d, KL 0\.00", output)
    assert re.search(r"update 2: [+-]\d", output)
    assert "after: mean score" in output


def test_swap_wrappers(toy, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    swap_wrappers.main([*toy, "--updates", "2", "--num-envs", "4", "--seeds", "1", "2", "--out", str(picture)])
    output = capsys.readouterr().out
    assert re.findall(r"(\w+) seed (\d): score", output) == [
        (name, seed) for name in ("SparseReward", "UniformReward", "AttentionCreditReward") for seed in ("1", "2")
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mdp_by_hand(capsys):
    mdp_by_hand.main(["--prompt", "the plot", "--response", "dull but brilliant <eos>"])
    output = capsys.readouterr().out
    assert re.findall(r"reward: (\S+)", output) == ["0.0", "0.0", "0.0", "2.0"]
    assert "state: the plot | dull but " in output
    rows = {row[0]: row[1:] for line in output.splitlines() if len(row := re.findall(r"[^│\s]+", line)) == 4}
    assert rows["sum"] == ["+2.00", "+2.00", "+2.00"]
    assert rows["dull"] == ["+0.00", "+0.50", "+0.40"]  # sparse, uniform, attention with credit_beta 0.8
    assert rows["<eos>"] == ["+2.00", "+0.50", "+0.40"]


def test_mdp_by_hand_says_when_the_text_is_not_finished(capsys):
    mdp_by_hand.main(["--response", "very dull"])
    assert "Still running after 2 of 8 tokens: end --response with <eos>." in capsys.readouterr().out


def test_cleanrl_style(capsys):
    cleanrl_style.main(["--updates", "6", "--num-steps", "24"])
    assert learned(capsys.readouterr().out)


def test_torchrl_ppo(capsys):
    pytest.importorskip("torchrl", reason="needs the torchrl extra: pip install 'tokenmdp[torchrl]'")
    import torchrl_ppo

    torchrl_ppo.main(["--updates", "6", "--num-steps", "16"])
    assert learned(capsys.readouterr().out)


@pytest.fixture
def sb3():
    pytest.importorskip("sb3_contrib", reason=SB3)


def test_sb3_ppo(sb3, capsys):
    import sb3_ppo

    sb3_ppo.main(["--steps", "2048", "--num-envs", "16"])
    assert learned(capsys.readouterr().out)


def test_sb3_ppo_with_a_language_model(sb3, toy, capsys):
    import sb3_ppo

    sb3_ppo.main([*toy, "--steps", "1024", "--num-envs", "16", "--num-steps", "16", "--learning-rate", "2e-3"])
    assert learned(capsys.readouterr().out)


def test_sb3_maskable(sb3, capsys):
    import sb3_maskable

    sb3_maskable.main(["--steps", "2048", "--min-new-tokens", "4"])
    output = capsys.readouterr().out
    assert learned(output)
    assert int(re.search(r"shortest text: (\d) tokens, and 5 is the least", output)[1]) >= 5


def test_sb3_dqn(sb3, capsys):
    import sb3_dqn

    sb3_dqn.main(["--steps", "2000"])
    assert learned(capsys.readouterr().out)


@pytest.mark.long
def test_sb3_ablation_learns_under_every_wrapper_and_draws_them(sb3, toy, tmp_path, capsys, monkeypatch):
    import sb3_ablation

    fewer = lambda envs, model, episodes: evaluate(envs, model, episodes=episodes // 2)  # noqa: E731
    monkeypatch.setattr(sb3_ablation, "evaluate", fewer)

    picture = tmp_path / "ablation.png"
    sizes = ["--rollouts", "4", "--num-envs", "16", "--learning-rate", "1e-2", "--seeds", "1", "2"]
    sb3_ablation.main([*toy, *sizes, "--out", str(picture)])
    output = capsys.readouterr().out
    highest_before = float(re.search(r"before: score \S+ \[\S+, (\S+)\]", output)[1])
    runs = re.findall(r"(\w+) seed (\d), after: score \S+ \[(\S+), \S+\].* KL (\S+)", output)
    assert [run[:2] for run in runs] == [
        (name, seed) for name in ("SparseReward", "UniformReward", "AttentionCreditReward") for seed in ("1", "2")
    ]
    assert all(float(lowest_after) > highest_before and float(kl) > 0 for *_, lowest_after, kl in runs)
    assert len(re.findall(r"Reward, after, 2 seeds: score ", output)) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_credit_ablation_runs_every_method_of_the_registry(tmp_path, capsys, monkeypatch):
    shorter = {"max_new_tokens": 5, "prompts": ["The film was", "I saw"]}
    monkeypatch.setattr(gym, "make_vec", functools.partial(gym.make_vec, **shorter))
    one_step = functools.partial(credit_ablation.PPOConfig, update_epochs=1, num_minibatches=1)
    monkeypatch.setattr(credit_ablation, "PPOConfig", one_step)
    sizes = ["--updates", "1", "--num-envs", "4", "--out", str(tmp_path / "curves.png")]
    credit_ablation.main([*sizes, "--tuned", "imdb-tiny"])
    first = dict(re.findall(r"(\S+) seed 1: score (\S+)", capsys.readouterr().out))
    assert list(first) == list(CREDIT_METHODS)
    assert len(set(first.values())) == 1  # the first batch is the same: credit changes learning, not sampling
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    credit_ablation.main([*sizes, "--methods", "rto"])
    assert "rto: left out, it needs --tuned" in capsys.readouterr().out


@pytest.fixture
def cells_in_this_process(monkeypatch):
    """A study without the start of a process for every cell."""

    def run_cells(out, cells, *, device, **_):
        return {cell.id: "failed" for cell in cells if worker.main([str(out), cell.id, "--device", device])}

    threads = torch.get_num_threads()
    monkeypatch.setattr(ablate, "run_cells", run_cells)
    yield
    torch.set_num_threads(threads)


@pytest.mark.long
def test_gpt2_study_tries_untrained_models_and_says_what_they_cost(cells_in_this_process, tmp_path, capsys):
    pytest.importorskip("sacrebleu", reason="needs the study extra: pip install 'tokenmdp[study]'")
    sizes = ["--layers", "1", "--width", "64", "--updates", "1", "--num-envs", "4", "--eval-samples", "2"]
    assert gpt2_study.main(["--random-weights", "--out", str(tmp_path), "--device", "cpu", *sizes]) == 0
    output = capsys.readouterr().out
    rows = re.findall(r"8-16 tokens +(\S+) +1 +(\S+) +(\S+) +(\S+) GiB", output)
    assert "on cpu, torch." in output
    assert "credit quality" not in output  # minutes on a CPU, and of an untrained model it says nothing
    assert [row[0] for row in rows] == ["sparse", "attention"]
    assert all(float(number) > 0 for row in rows for number in row[1:])
    settings = [result.cell.settings for result in load_study(tmp_path / "study").results.values()]
    assert {(one.config["learning_rate"], one.horizon_range) for one in settings} == {(1.41e-5, (8, 15))}  # the paper's


def test_gpt2_study_runs_the_command_on_the_models_that_are_named(monkeypatch):
    commands = []
    monkeypatch.setattr(gpt2_study.cli, "main", lambda words: commands.append(words) or 2)
    assert gpt2_study.main(["--policy", "mine", "--out", "there", "--seeds", "1", "2"]) == 2
    plan = ["--plan", str(gpt2_study.PLAN)]
    assert commands == [["ablate", *plan, "--out", "there", "--policy", "mine", "--seeds", "1", "2"]]


def test_gpt2_study_fills_up_the_vocabulary_and_writes_the_shape_that_is_asked_for(tmp_path):
    named = gpt2_study.make_models(tmp_path, layers=2, width=128)
    weights = [tmp_path / f"{kind}-2x128" / "model.safetensors" for kind in ("policy", "reward_model")]
    written = [file.stat().st_mtime_ns for file in weights]
    assert gpt2_study.make_models(tmp_path, layers=2, width=128) == named
    assert [file.stat().st_mtime_ns for file in weights] == written
    tokenizer, policy = load_tokenizer(str(tmp_path / "policy-2x128")), load_causal_lm(str(tmp_path / "policy-2x128"))
    assert len(tokenizer) == len(tokenizer.get_vocab()) == policy.config.vocab_size == 50257
    text = "An unused1 film; naïve, yes."
    assert tokenizer.encode(text) == load_tokenizer("imdb-tiny").encode(text)
    assert tokenizer.convert_ids_to_tokens(50256) == "unused50256"
    assert (policy.config.n_layer, policy.config.n_embd, policy.config.n_head) == (2, 128, 2)
    with pytest.raises(SystemExit):
        gpt2_study.make_models(tmp_path, layers=2, width=100)
