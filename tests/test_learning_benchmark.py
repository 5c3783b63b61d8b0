"""The learning benchmark: both sides get the same task, and the tables say what the records hold."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tokenmdp.agents.ppo import PPOConfig
from tokenmdp.intervals import mean_interval
from tokenmdp.models.names import resolve
from tokenmdp.returns import explained_variance
from tokenmdp.runs.environments import make_envs, split_prompts

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not (BENCHMARKS / "learning.py").exists():
    pytest.skip("needs a checkout, not an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from learning_parts import command, engines, race, results, tables  # noqa: E402
from learning_parts.protocol import RACERS, Engine, Protocol, Run, curve_engines  # noqa: E402
from speed_parts import trl_worker  # noqa: E402

MACHINE = {
    "cpu": "a processor", "threads": 1, "cores": 2, "default_dtype": "float32", "torch": "2", "transformers": "5",
    "trl_versions": {"trl": "0", "torch": "2", "transformers": "4"},
}  # fmt: skip
TEXTS = [[40, 50, 60, 70], [41, 51], [42, 52, 0]]  # the last with an end-of-text token


def records(scores, seconds=1.0):
    return [
        {"update": place + 1, "score": score, "kl": 1.0, "objective": score - 0.3, "explained_variance": 0.5,
         "entropy": 3.0, "response_length": 9.0, "seconds": seconds}
        for place, score in enumerate(scores)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def envs():
    settings = engines.run_settings(Run(Engine("trl"), Protocol(), 1))
    return make_envs(settings, 1, split_prompts(settings).training)


def test_the_protocol_is_our_agents_default():
    assert Engine("ours").config(Protocol(), seed=3) == PPOConfig(seed=3, device="cpu")


def test_both_sides_get_the_protocols_numbers():
    protocol = Protocol(learning_rate=1.0, kl_coef=2.0, gae_lambda=0.5, clip_coef_value=4.0, episodes=12)
    ours, theirs = Engine("ours").config(protocol, 1), protocol.trl()
    assert (ours.learning_rate, ours.kl_coef, ours.gae_lambda) == (1.0, 2.0, 0.5)
    names = {"learning_rate": "learning_rate", "init_kl_coef": "kl_coef", "lam": "gae_lambda", "gamma": "gamma",
             "cliprange": "clip_coef", "cliprange_value": "clip_coef_value", "vf_coef": "vf_coef",
             "max_grad_norm": "max_grad_norm", "ppo_epochs": "update_epochs"}  # fmt: skip
    assert {name: theirs[name] for name in names} == {name: getattr(ours, own) for name, own in names.items()}
    assert theirs["mini_batch_size"] * ours.num_minibatches == theirs["batch_size"] == 12


def test_one_pass_means_the_same_to_both_sides():
    ours = RACERS["ours-one-pass-sparse"].config(Protocol(), 1)
    theirs = RACERS["trl-one-pass"].trl(Protocol())
    assert (theirs["ppo_epochs"], theirs["learning_rate"]) == (ours.update_epochs, ours.learning_rate) == (1, 1.5e-4)
    assert RACERS["trl"].trl(Protocol()) == Protocol().trl()


def test_variants_have_their_fields_on_top_of_those_of_all():
    found = curve_engines({"ent_coef": 0.1}, {"slow": {"learning_rate": 1e-6}})
    assert found["ours-slow"].config(Protocol(), 1).learning_rate == 1e-6
    assert [found[name].fields.get("ent_coef") for name in ("trl", "ours", "ours-slow")] == [None, 0.1, 0.1]


@pytest.mark.parametrize(
    ("given", "message"), [({"speed": 1}, "no field speed"), ({"kl_coef": "low"}, "must be a number")]
)
def test_wrong_fields_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Engine("ours", fields=given).config(Protocol(), 1)


def test_trl_draws_from_the_token_ids_that_our_environment_draws_from(envs):
    run = Run(Engine("trl"), Protocol(), 1)
    order = engines.trl_order(run, engines.run_settings(run), envs)
    possible = {tuple(prompt) for prompt in order["prompts"]}
    for seed in range(20):
        observation, _ = envs.reset(seed=seed)
        assert tuple(observation["input_ids"][0][observation["attention_mask"][0] == 1].tolist()) in possible
    assert order["response"] == (0, envs.unwrapped.task.max_new_tokens)


def test_the_other_process_scores_as_our_environment(envs):
    worker = SimpleNamespace(torch=torch, reward_model=trl_worker.classifier(resolve("reward_model", "imdb-tiny")))
    theirs = trl_worker.Trainer.scores(worker, [torch.tensor(text) for text in TEXTS])
    ours = engines.our_scores(TEXTS, envs.unwrapped.task.reward_model)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_our_scores_are_those_of_an_episode(envs):
    prompt, *response = TEXTS[2]
    envs.reset(options={"prompt": envs.unwrapped.task.tokenizer.decode([prompt])})
    for token in response:
        *_, infos = envs.step(np.array([token]))
    assert engines.our_scores([TEXTS[2]], envs.unwrapped.task.reward_model).item() == pytest.approx(infos["score"][0])


def test_other_scores_of_the_same_token_ids_are_refused(envs):
    model = envs.unwrapped.task.reward_model
    ours = engines.our_scores(TEXTS, model).tolist()
    answer = {"texts": TEXTS, "scores": ours}
    same = SimpleNamespace(scores=lambda texts: engines.our_scores(texts, model).tolist())
    engines.check_scores(same, answer, model)
    before_the_end = SimpleNamespace(scores=lambda texts: ours)  # the mistake of a search for the last id before eos
    with pytest.raises(RuntimeError, match="different rewards"):
        engines.check_scores(before_the_end, answer, model)


def test_the_other_process_explains_variance_as_we_do():
    values, returns = torch.randn(2, 5, 7)
    mask = torch.rand(5, 7) > 0.3
    worker = SimpleNamespace(before_update={"values": values, "returns": returns, "mask": mask})
    expected = explained_variance(values, returns, mask).item()
    assert trl_worker.Trainer.explained_variance(worker) == pytest.approx(expected, abs=1e-5)


def test_both_records_have_the_same_numbers():
    numbers = {"kl": 2.0, "explained_variance": 0.5, "entropy": 3.0, "seconds": 4.0}
    theirs = engines.trl_record({**numbers, "scores": [1.0, 3.0], "tokens": 10}, 7, Protocol(kl_coef=0.5))

    class Agent:
        def learn(self, updates):
            self.history = [{**numbers, "score_mean": 2.0, "response_length": 5.0, "update": 7, "loss": 1.0}]

    assert engines.our_update(Agent(), Protocol(kl_coef=0.5)) == theirs
    assert theirs["objective"] == 1.0


@given(st.lists(st.integers(-5, 5), max_size=20), st.integers(-3, 3), st.integers(1, 4))
def test_a_target_is_reached_by_the_first_window_that_has_it(scores, target, window):
    ends = (end for end in range(window, len(scores) + 1) if sum(scores[end - window : end]) >= target * window)
    end = next(ends, None)
    expected = None if end is None else race.Reached(end, end * 0.5)
    assert race.reached(records(scores, seconds=0.5), target, window) == expected


def test_sides_take_turns_and_drop_out_when_they_are_there():
    order = []

    def side(name, score):
        def update():
            order.append(name)
            return records([score])[0]

        return update

    found = race.race({"a": side("a", 3.0), "b": side("b", 0.0)}, target=2.5, most=12)
    assert {name: len(own) for name, own in found.items()} == {"a": race.WINDOW, "b": 12}
    assert "".join(order) == "abba" * 5 + "bb"


def curve(name, seed, scores, **protocol):
    run = Run(Engine(name), Protocol(updates=20, **protocol), seed)
    return results.CurveResult(run, MACHINE, records(scores))


def test_the_table_of_curves_is_by_tens_with_paired_differences(tmp_path):
    noise = {1: 0.0, 2: 1.0, 3: 5.0}
    for seed, shift in noise.items():
        curve("trl", seed, [shift] * 20).write(tmp_path)
        curve("ours", seed, [shift + 1] * 10 + [shift + seed] * 10).write(tmp_path)
    curve("ours", 4, [9.0] * 7).write(tmp_path)
    table = tables.curve_table(results.curves_in(tmp_path))
    assert [row[0] for row in table.rows] == ["1 to 10", "1 to 10", "11 to 20", "11 to 20"]
    assert [row[1] for row in table.rows] == ["trl", "ours", "trl", "ours"]
    assert table.rows[0][2] == str(mean_interval([0.0, 1.0, 5.0]))
    assert [row[-1] for row in table.rows] == ["", "1.00 [1.00, 1.00]", "", str(mean_interval([1.0, 2.0, 3.0]))]
    assert "ours-seed4 (7 updates)" in table.note
    assert table.markdown().count("\n| ") == 1 + 1 + 4


def test_the_table_of_times_names_what_was_not_reached():
    names = ("trl", "ours-sparse", "ours-red")
    found = []
    for seed in (1, 2):
        runs = {name: Run(RACERS[name], Protocol(updates=30), seed) for name in names}
        own = [
            records([3.0] * 10, seconds=4.0),
            records([3.0] * 10, seconds=2.0 if seed == 1 else 0.5),
            records([3.0 * (seed - 1)] * 30),
        ]
        found.append(results.RaceResult(runs, (2.5,), MACHINE, dict(zip(names, own, strict=True))))
    rows = tables.race_table(found).rows
    assert rows[0] == ("2.5", "trl", "40, 40", "10, 10", "1.0, 1.0", "", "")
    assert rows[1][:6] == ("2.5", "ours-sparse", "20, 5", "10, 10", "1.0, 1.0", "2.00, 8.00")
    assert rows[1][6].startswith("4.00 [")
    missed = ("not reached, 10", "not reached, 10", "not reached, 1.0", "not reached, 4.00", "")
    assert rows[2] == ("2.5", "ours-red", *missed)


def test_finished_runs_are_kept_and_others_made_anew(tmp_path):
    whole, half, absent = curve("ours", 1, [0.0] * 20), curve("ours", 2, [0.0] * 3), curve("ours", 3, [])
    whole.write(tmp_path)
    half.write(tmp_path)
    runs = [result.run for result in (whole, half, absent)]
    assert results.unfinished_curves(tmp_path, runs) == runs[1:]
    other = curve("ours", 1, [], kl_coef=0.1).run
    with pytest.raises(results.ResultError, match="other settings"):
        results.unfinished_curves(tmp_path, [other])


def test_a_race_is_run_once(tmp_path):
    runs = {"ours-sparse": Run(RACERS["ours-sparse"], Protocol(), 2)}
    results.RaceResult(runs, (2.5, 3.0), MACHINE, {"ours-sparse": records([1.0])}).write(tmp_path)
    assert results.has_race(tmp_path, runs, [2.5, 3.0], 2)
    assert not results.has_race(tmp_path, runs, [2.5, 3.0], 1)
    with pytest.raises(results.ResultError, match="other settings"):
        results.has_race(tmp_path, runs, [2.5], 2)


def test_one_command_fills_a_page(tmp_path):
    for name in ("trl", "ours"):
        curve(name, 1, np.linspace(0, 3, 20).tolist()).write(tmp_path)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"above\n{command.START}\n{command.END}\nbelow\n")
    figure = tmp_path / "a.png"
    for _ in range(2):  # again: the tables are replaced
        assert command.main(["report", "--out", str(tmp_path), "--into", str(page), "--figure", str(figure)]) == 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert text.count("| 1 to 10 | trl |") == 1
    assert "](../a.png)" in text
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["report", "--out", str(tmp_path)])
    assert "holds no finished run" in capsys.readouterr().err


def test_a_race_writes_what_its_sides_did(tmp_path):
    protocol = Protocol(updates=1, episodes=4, response_tokens=3)
    race.run_seeds(
        {"ours-sparse": RACERS["ours-sparse"]}, protocol, [2.5], [1], tmp_path, tmp_path, Console(quiet=True)
    )
    (found,) = results.races_in(tmp_path)
    (record,) = found.records["ours-sparse"]
    assert record["objective"] == pytest.approx(record["score"] - 0.3 * record["kl"])
    assert all(map(math.isfinite, record.values()))


@pytest.mark.long
def test_the_curves_command_names_a_run_that_fails_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    arguments = ["curves", "--smoke", "--jobs", "1", "--out", str(tmp_path)]
    failing = ["--engines", "ours-bad", "ours", "--variant", "bad", "lora_rank=1", "lora_target_modules=nowhere"]
    assert command.main([*arguments, *failing]) == 1
    output = capsys.readouterr().out
    assert "nowhere" in output
    assert "failed: ours-bad-seed1" in output
    assert [result.run.engine.name for result in results.curves_in(tmp_path)] == ["ours"]
    file = tmp_path / "curves" / "ours-seed1.json"
    first = file.read_text()
    assert len(json.loads(first)["records"]) == command.SMOKE["updates"]
    assert command.main(arguments) == 0
    assert file.read_text() == first
    assert "finished already" in capsys.readouterr().out
