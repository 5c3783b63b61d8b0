"""`tokenmdp train sft`, `train dpo` and `train reward-model`: whole small runs, resumption, and every refusal."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_doubles import PAIRS, saved, small_lm, three_words
from preference_doubles import TOY, encode, lines
from test_ppo import timeless

from tokenmdp import cli
from tokenmdp.models.loading import load_causal_lm
from tokenmdp.preferences import Comparison, read_preferences, write_records
from tokenmdp.report import calibration
from tokenmdp.report.curves import read_metrics
from tokenmdp.reward_models import load_reward_model
from tokenmdp.runs.directory import RunDirectory
from tokenmdp.runs.environments import toy_policy
from tokenmdp.types import lay_out

PROMPTS = [f"{start} {noun} was" for start in ("the", "a", "this") for noun in ("film", "movie", "plot", "story")]
GOOD, BAD = ("great", "lovely", "so fun"), ("dull", "awful", "very boring")
RECORDS = [
    Comparison(
        prompt=prompt, chosen=f" {good}", rejected=f" {bad}", prompt_ids=encode(prompt), chosen_ids=encode(good),
        rejected_ids=encode(bad), score_chosen=1.0, score_rejected=-1.0, probability=0.9,
    )
    for prompt in PROMPTS for good, bad in zip(GOOD, BAD, strict=True)
]  # fmt: skip
SMOKE = ["--preset", "smoke", "--eval-samples", "4", "--dtype", "float32", "--device", "cpu", "--batch-size", "4"]
SMOKE += ["--no-anneal-lr"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A language model and data for it."""
    folder = tmp_path_factory.mktemp("files")
    saved(toy_policy(seed=0), folder / "lm")
    write_records(folder / "pairs.jsonl", RECORDS)
    lines(folder / "texts.jsonl", *({"prompt": one.prompt, "completion": one.chosen} for one in RECORDS))
    return folder


@pytest.fixture
def error(capsys):
    """Runs a command that must be refused in one line; returns it."""

    def run(*arguments):
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert "please report it" not in message
        assert len([line for line in message.splitlines() if line.startswith("error: ")]) == 1
        return message

    return run


def start(algorithm, out, updates, *more):
    return cli.main(["train", algorithm, *more, "--out", str(out), "--updates", str(updates)])


def options_of(algorithm, files):
    if algorithm == "reward-model":
        own = ["--init", str(files / "lm"), "--data", str(files / "pairs.jsonl"), "--held-out", "0.5"]
        return [*own, *SMOKE[4:], "--learning-rate", "1e-3"]
    data = "texts" if algorithm == "sft" else "pairs"
    judge = ["--judge", "toy-lexicon"] if algorithm == "dpo" else []
    return [*SMOKE, "--policy", str(files / "lm"), "--data", str(files / f"{data}.jsonl"), *judge]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run of three updates of each algorithm, made once."""
    made = {}

    def of(algorithm):
        if algorithm not in made:
            made[algorithm] = tmp_path_factory.mktemp("runs") / algorithm
            assert start(algorithm, made[algorithm], 3, *options_of(algorithm, files)) == 0
        return made[algorithm]

    return of


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward-model"])
def test_a_longer_command_goes_on_exactly_where_the_run_ended(algorithm, files, finished, tmp_path, capsys):
    parts, options = tmp_path / "parts", options_of(algorithm, files)
    assert start(algorithm, parts, 1, *options) == 0
    assert start(algorithm, parts, 3, *options) == 0
    assert "going on after update 1 of 3" in capsys.readouterr().out
    runs = [timeless(read_metrics(path / "metrics.jsonl")) for path in (parts, finished(algorithm))]
    assert [record["update"] for record in runs[0]] == [1, 2, 3]
    assert runs[0] == runs[1]
    reports = [(path / "report" / "summary.json").read_text() for path in (parts, finished(algorithm))]
    assert reports[0] == reports[1]


def test_a_run_is_evaluated_as_it_trains_and_learns_the_same(files, finished, tmp_path, capsys):
    run, options = tmp_path / "run", options_of("dpo", files)
    assert start("dpo", run, 3, *options, "--eval-every", "1") == 0
    printed = capsys.readouterr().out
    points = RunDirectory(run).points(3)
    assert [point["update"] for point in points] == [1, 2], "the last one is evaluated in the end anyway"
    for point in points:
        assert f"update {point['update']}, training prompts: score " in printed
        assert f"judge's score {point['gold_mean']:+.2f}, KL {point['kl']:.2f}, right about" in printed
        assert f"right about {point['held_out_accuracy']:.2f} of the held-out pairs" in printed
    assert points[1]["kl"] != 0
    assert (run / "report" / "held_out.png").read_bytes().startswith(b"\x89PNG")
    plain, evaluated = (timeless(read_metrics(path / "metrics.jsonl")) for path in (finished("dpo"), run))
    assert plain == evaluated


def test_an_evaluation_that_is_there_is_not_made_again(files, tmp_path, capsys):
    run, options = tmp_path / "run", (*options_of("sft", files), "--eval-every", "2")
    assert start("sft", run, 3, *options) == 0
    assert "held_out_accuracy" not in RunDirectory(run).points(3)[0], "there are no pairs"
    RunDirectory(run).along(2).write_text('{"update": 2, "score_mean": 7.0, "kl": 0.5}')
    shutil.rmtree(run / "checkpoint")  # the run is trained again
    capsys.readouterr()
    assert start("sft", run, 3, *options) == 0
    assert RunDirectory(run).points(3) == [{"update": 2, "score_mean": 7.0, "kl": 0.5}]
    assert "update 2, training prompts" not in capsys.readouterr().out


def test_a_finished_run_says_so(files, finished, capsys):
    assert start("reward-model", finished("reward-model"), 3, *options_of("reward-model", files)) == 0
    printed = capsys.readouterr().out
    assert "3 updates done; raise --updates to train further" in printed
    assert "going on after" not in printed
    assert start("reward-model", finished("reward-model"), 2, *options_of("reward-model", files)) == 0
    assert "3 updates done, 2 asked for; raise --updates" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_a_policys_run_leaves_its_table_curve_and_summary(algorithm, finished):
    run = finished(algorithm)
    assert (run / "report" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "report" / "samples.html").read_text(encoding="utf-8").count('class="sample"') == 8
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert (summary["updates"], summary["samples"]) == (3, 4)
    judged = [name for name in summary if "judge" in name]
    assert bool(judged) == (algorithm == "dpo")
    metrics = read_metrics(run / "metrics.jsonl")
    assert all(one["loss"] > 0 for one in metrics)
    assert ("chosen_logratio" in metrics[0]) == (algorithm == "dpo")
    record = json.loads((run / "run.json").read_text())["settings"]
    assert record["algorithm"] == algorithm
    assert record["data"].endswith(".jsonl")
    assert record["config"]["batch_size"] == 4
    assert list((run / "tensorboard").glob("events*"))


def test_a_policys_run_is_read_by_eval_and_sample(finished, capsys):
    for command in (["eval", str(finished("dpo")), "--samples", "4"], ["sample", str(finished("sft")), "--num", "2"]):
        assert cli.main([*command, "--device", "cpu"]) == 0
    assert capsys.readouterr().out


def test_a_run_prints_its_table_and_paths(files, tmp_path, capsys):
    assert start("dpo", tmp_path / "run", 1, *options_of("dpo", files)) == 0
    printed = capsys.readouterr().out
    for part in ("30 records to learn from, 6 held out", "4 of 30 examples per update", "update 1/1", "4 responses",
                 "learning_curve.png", "judge", "6 held-out pairs", "too few to draw their calibration"):  # fmt: skip
        assert part in printed, part


def test_without_updates_a_run_takes_the_epochs_of_its_data(files, tmp_path):
    options = options_of("reward-model", files)
    assert cli.main(["train", "reward-model", *options, "--epochs", "2", "--out", str(tmp_path / "run")]) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2 * 5  # 18 records in batches of 4


def test_a_reward_models_run_says_how_right_it_is_beside_the_ceiling(finished, files, tmp_path, capsys):
    run, records = finished("reward-model"), read_preferences(files / "pairs.jsonl", TOY)
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert (summary["updates"], summary["pairs"]) == (3, 18)
    assert summary["ceiling"]["value"] == pytest.approx(0.9)
    prompts = list(dict.fromkeys(one.prompt_ids for one in records))[::2]  # every second one is held out
    held_out = [one for one in records if one.prompt_ids in prompts]
    model = load_reward_model(str(run / "checkpoint"))
    right = [
        model(lay_out([one.prompt_ids] * 2, [one.chosen_ids, one.rejected_ids])).score.diff().item() < 0
        for one in held_out
    ]
    assert summary["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert summary["order"] == summary["accuracy"]
    for name in ("calibration.png", "learning_curve.png"):
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG")
    record = json.loads((run / "run.json").read_text())["settings"]
    assert (record["algorithm"], record["held_out"], record["policy"]) == ("reward-model", 0.5, str(files / "lm"))
    assert start("reward-model", tmp_path / "all", 1, *options_of("reward-model", files), "--held-out", "0") == 0
    assert "nothing was held out, so there is no accuracy to report (--held-out)" in capsys.readouterr().out


def test_a_dpo_run_says_how_right_the_implied_reward_is_beside_the_ceiling(finished, files, tmp_path, capsys):
    run, records = finished("dpo"), read_preferences(files / "pairs.jsonl", TOY)
    summary = json.loads((run / "report" / "summary.json").read_text())
    prompts = list(dict.fromkeys(one.prompt_ids for one in records))[::10]  # every tenth one is held out
    held_out = [one for one in records if one.prompt_ids in prompts]
    learned, first = (load_causal_lm(str(name)) for name in (run / "checkpoint", files / "lm"))
    right = []
    for one in held_out:
        ratios = []
        for ids in (one.chosen_ids, one.rejected_ids):
            text, place = torch.tensor([[*one.prompt_ids, *ids]]), len(one.prompt_ids) - 1
            with torch.no_grad():
                rows = [model(text).logits.log_softmax(-1)[0, place:-1] for model in (learned, first)]
            ratios.append((rows[0] - rows[1]).gather(-1, torch.tensor(ids)[:, None]).sum().item())
        right.append(ratios[0] > ratios[1])
    assert summary["pairs"] == len(held_out) == 6
    assert summary["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert summary["ceiling"]["value"] == pytest.approx(0.9)
    assert summary["calibration"] == [], "of 6 pairs"
    assert json.loads((run / "run.json").read_text())["settings"]["held_out"] == 0.1
    assert start("dpo", tmp_path / "all", 1, *options_of("dpo", files), "--held-out", "0") == 0
    assert "nothing was held out, so there is no accuracy to report (--held-out)" in capsys.readouterr().out
    assert "pairs" not in json.loads((tmp_path / "all" / "report" / "summary.json").read_text())


def test_a_reward_models_checkpoint_is_a_reward_model_of_other_commands(finished, files, tmp_path, capsys):
    trained = str(finished("reward-model") / "checkpoint")
    assert cli.main(["score", "great", "--prompt", "the film was", "--reward-model", trained, "--device", "cpu"]) == 0
    options = options_of("dpo", files)
    both = ["--margin", trained, "--objective-weight", "0.5"]
    assert start("dpo", tmp_path / "modpo", 1, *options, *both) == 0
    assert json.loads((tmp_path / "modpo" / "run.json").read_text())["settings"]["config"]["margin"] == trained


def test_a_reward_models_run_is_no_policy(finished, error):
    run = finished("reward-model")
    for command in ("sample", "eval"):
        message = error(command, run, "--device", "cpu")
        assert f"{run} is a run of a reward model, which writes no texts" in message
        assert f"--reward-model {run / 'checkpoint'}" in message


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward-model"])
def test_missing_and_impossible_options_are_named(algorithm, files, tmp_path, error):
    out = ["--out", tmp_path / "run"]
    options = options_of(algorithm, files)
    missing = [one for place, one in enumerate(options) if "--data" not in options[max(place - 1, 0) : place + 1]]
    assert f"--data is missing: {algorithm} learns from" in error("train", algorithm, *missing, *out)
    assert "nowhere.jsonl" in error("train", algorithm, *options, "--data", tmp_path / "nowhere.jsonl", *out)
    if algorithm != "sft":
        assert "it is a share of the prompts" in error("train", algorithm, *options, "--held-out", "1", *out)
    assert "--updates is 0; it must be at least 1" in error("train", algorithm, *options, "--updates", "0", *out)
    assert not (tmp_path / "run").exists()


def test_other_data_in_the_same_file_stop_a_resumed_run(finished, files, tmp_path, error):
    run = shutil.copytree(finished("reward-model"), tmp_path / "run")
    data = files / "pairs.jsonl"
    kept = data.read_text()
    try:
        write_records(data, RECORDS[:-4])
        message = error("train", "reward-model", *options_of("reward-model", files), "--out", run, "--updates", "5")
    finally:
        data.write_text(kept)
    assert "cannot be continued: the checkpoint was trained on other data" in message


def test_data_that_do_not_fit_the_model_or_the_algorithm_are_named(files, tmp_path, error):
    out = ["--out", tmp_path / "run"]
    lines(tmp_path / "bare.jsonl", {"title": "a film"})
    for algorithm in ("sft", "dpo", "reward-model"):
        message = error("train", algorithm, *options_of(algorithm, files), "--data", tmp_path / "bare.jsonl", *out)
        assert "bare.jsonl:1" in message
    three = saved(small_lm(), tmp_path / "three", three_words())
    message = error("train", "reward-model", *options_of("reward-model", files), "--init", three, *out)
    assert "pairs.jsonl:1 holds the token id" in message
    write_records(tmp_path / "one.jsonl", PAIRS[:4])
    message = error("train", "reward-model", *options_of("reward-model", files), "--data", tmp_path / "one.jsonl", *out)
    assert "4 records answer one prompt, so none can be held out; pass --held-out 0" in message
    message = error("train", "dpo", *options_of("dpo", files), "--objective-weight", "0.5", *out)
    assert "two objectives need both" in message


@pytest.mark.parametrize("algorithm", ["dpo", "reward-model"])
@pytest.mark.parametrize("place", [0, 5])
def test_records_that_the_model_cannot_read_are_refused_before_training(algorithm, place, files, tmp_path, error):
    records = RECORDS[:33:3]  # eleven prompts, of which 0 and 10 are held out
    one = records[place]
    records[place] = replace(one, chosen=one.chosen * 2000, chosen_ids=one.chosen_ids * 2000)
    write_records(tmp_path / "long.jsonl", records)
    options = [*options_of(algorithm, files), "--data", tmp_path / "long.jsonl", "--held-out", "0.1"]
    message = error("train", algorithm, *options, "--out", tmp_path / "run")
    assert f"long.jsonl: record {place + 1}: a prompt with its longest response has 200" in message
    assert f"{files / 'lm'} reads 64" in message
    assert not (tmp_path / "run").exists()


def test_bins_of_a_calibrated_model_lie_on_the_diagonal(tmp_path):
    rng = np.random.default_rng(0)
    size = rng.uniform(0, 4, 4000)
    gaps = np.where(rng.random(size.shape) < 1 / (1 + np.exp(-size)), size, -size)
    found = calibration.bins(gaps, number=4)
    assert sum(one.pairs for one in found) == 4000
    for one in found:
        assert one.observed.value == pytest.approx(one.predicted, abs=0.04)
        assert one.observed.low <= one.observed.value <= one.observed.high
    sure = calibration.bins(3 * gaps, number=4)  # scores three times too large
    assert max(one.predicted - one.observed.value for one in sure) > 0.1
    assert [one.pairs for one in calibration.bins(gaps[:26])] == [13, 13]
    assert calibration.bins(gaps[:9]) == []  # too few for a bin
    assert calibration.plot(found, 4000, tmp_path / "four.png").read_bytes().startswith(b"\x89PNG")
