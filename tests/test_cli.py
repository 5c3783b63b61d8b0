"""The `tokenmdp` command: a whole small run, interruption and resumption, and every refusal."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tokenmdp import cli
from tokenmdp.agents.ppo import PPOConfig
from tokenmdp.cli.train import default_name, preset_options, settings_from, train
from tokenmdp.files import BusyError, locked
from tokenmdp.intervals import mean_interval
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.runs import process_settings, training
from tokenmdp.runs.display import TrainingDisplay, make_console
from tokenmdp.runs.environments import split_prompts, toy_policy
from tokenmdp.runs.settings import preset_settings

pytestmark = pytest.mark.usefixtures("curves_not_drawn")

SMALL = ["--preset", "smoke", "--num-envs", "4", "--eval-samples", "6", "--dtype", "float32", "--device", "cpu"]


def start(out, updates, *more):
    return cli.main(["train", *SMALL, "--updates", str(updates), "--out", str(out), *more])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out):
    return [(record["update"], record["score_mean"], record["kl"], record["loss"]) for record in metrics(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three updates."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert start(out, 3) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """That run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def error(capsys):
    """Runs a command that must be refused with exit status 2 and no traceback; returns the message."""

    def run(*arguments):
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run


def test_a_run_leaves_curve_samples_and_summary(finished):
    assert [record["update"] for record in metrics(finished)] == [1, 2, 3]
    assert (finished / "report" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report" / "samples.html").read_text(encoding="utf-8")
    assert page.count('class="sample"') == 12
    summary = json.loads((finished / "report" / "summary.json").read_text())
    before, after = (json.loads((finished / name).read_text()) for name in ("before.json", "after.json"))
    assert (summary["updates"], summary["samples"]) == (3, 6)
    assert summary["score"]["after"] == dict(zip(("mean", "low", "high"), mean_interval(after["scores"]), strict=True))
    assert summary["KL"]["before"]["mean"] == pytest.approx(0, abs=1e-5)  # cached against full forward
    assert [sample["prompt"] for sample in before["samples"]] == [sample["prompt"] for sample in after["samples"]]
    assert list((finished / "tensorboard").glob("events*"))
    assert (finished / "checkpoint" / "config.json").exists()


def test_a_run_prints_its_table_samples_and_paths(tmp_path, capsys):
    start(tmp_path / "run", 1)
    output = capsys.readouterr().out
    for part in ("allocator: ", "untrained", "before ", "after ", "update 1/1", "6 responses", "learning_curve.png"):
        assert part in output


def test_a_longer_command_goes_on_exactly_where_the_run_ended(finished, tmp_path):
    assert start(tmp_path / "parts", 1) == 0
    assert start(tmp_path / "parts", 3) == 0
    assert curve(tmp_path / "parts") == curve(finished)


def test_metrics_after_a_crash_are_neither_lost_nor_doubled(finished, copy):
    last = metrics(copy)[-1]
    with (copy / "metrics.jsonl").open("a") as stream:  # an update that was never saved, and half a line
        stream.write(json.dumps(last | {"update": 4, "kl": -99.0}) + "\n" + '{"update": 5')
    assert start(copy, 4) == 0
    assert [record["update"] for record in metrics(copy)] == [1, 2, 3, 4]
    assert curve(copy)[:3] == curve(finished)
    assert metrics(copy)[-1]["kl"] != -99.0


def test_ctrl_c_finishes_the_update_saves_and_resumes(finished, tmp_path, monkeypatch, capsys):
    show, before = TrainingDisplay.show, signal.getsignal(signal.SIGINT)  # ignored in a job started in the background

    def interrupt(self, record):
        show(self, record)
        if record["update"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDisplay, "show", interrupt)
        assert start(tmp_path / "run", 3) == 130
    assert "interrupted; run the same command to go on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    assert start(tmp_path / "run", 3) == 0
    assert curve(tmp_path / "run") == curve(finished)


def test_a_second_ctrl_c_leaves_at_once_without_saving_half_an_update(tmp_path, monkeypatch):
    def interrupt_twice(self, record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(TrainingDisplay, "show", interrupt_twice)
    assert start(tmp_path / "run", 3) == 130
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_eval_repeats_the_runs_own_numbers(finished, capsys):
    assert cli.main(["eval", str(finished), "--samples", "6", "--device", "cpu"]) == 0
    interval = json.loads((finished / "report" / "summary.json").read_text())["score"]["after"]
    assert f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]" in capsys.readouterr().out


def test_sample_continues_given_prompts(finished, tmp_path, capsys):
    page = tmp_path / "page.html"
    prompts = ["--prompt", "the plot", "--prompt", "a film"]
    assert cli.main(["sample", str(finished), *prompts, "--num", "2", "--html", str(page), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    openings = [line.split()[1:3] for line in lines[:4]]
    assert openings == [["the", "plot"], ["the", "plot"], ["a", "film"], ["a", "film"]]
    assert page.read_text(encoding="utf-8").count('class="sample"') == 4


def test_sample_draws_as_the_run_did_unless_told_otherwise(copy, capsys):
    record = json.loads((copy / "run.json").read_text())
    record["settings"]["config"]["top_k"] = 1
    (copy / "run.json").write_text(json.dumps(record))
    arguments = ["sample", str(copy), "--prompt", "the plot", "--num", "6", "--device", "cpu"]
    for more, different in (([], False), (["--top-k", "0"], True)):
        assert cli.main([*arguments, *more]) == 0
        assert (len(set(capsys.readouterr().out.splitlines())) > 1) == different


def test_sample_reads_a_plain_model_directory(tmp_path, capsys):
    toy_policy(seed=0).save_pretrained(tmp_path)
    load_tokenizer("toy").save_pretrained(tmp_path)
    options = ["--reward-model", "toy-lexicon", "--prompt", "the film", "--num", "3", "--max-new-tokens", "5"]
    assert cli.main(["sample", str(tmp_path), *options, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("the film") >= 3


def test_score_shows_every_tokens_credit(capsys):
    text = "not great but brilliant"
    assert (
        cli.main(["score", text, "--reward-model", "toy-lexicon", "--prompt", "the film was", "--device", "cpu"]) == 0
    )
    output = capsys.readouterr().out
    assert "the film was | not great but brilliant" in output
    assert "attention mass on the text: 1.000" in output
    score = float(output.split("score ")[1].split()[0])
    rows = [line.replace("│", " ").split() for line in output.splitlines() if "%" in line]
    assert [row[1] for row in rows] == text.split()
    assert sum(float(row[2]) for row in rows) == pytest.approx(score, abs=1e-3)
    assert float(rows[2][2]) == 0.0  # "but" is in no word list


def test_score_beta_zero_is_sparse(capsys):
    arguments = ["score", "a great film", "--reward-model", "toy-lexicon", "--device", "cpu"]
    tables = []
    for more in (["--credit-beta", "0"], ["--credit", "sparse"]):
        cli.main([*arguments, *more])
        tables.append([line for line in capsys.readouterr().out.splitlines() if "%" in line])
    assert tables[0] == tables[1]
    assert "100.0%" in tables[0][-1]


def test_score_reads_the_text_with_the_reward_models_own_tokenizer(capsys):
    arguments = ["score", "a great film", "--device", "cpu", "--reward-model"]
    tables = []
    for name in ("lexicon:toy", "toy-lexicon"):
        assert cli.main([*arguments, name]) == 0
        tables.append([line.split("│")[2] for line in capsys.readouterr().out.splitlines() if "%" in line])
    assert tables[0] == tables[1]


def test_brackets_in_a_path_are_shown(capsys):
    make_console().print("run directory: runs/a[b]c")
    assert capsys.readouterr().out == "run directory: runs/a[b]c\n"


def test_help_and_a_wrong_command_need_no_torch():
    program = (
        "import sys\nfrom tokenmdp.cli import main\n"
        "assert [main(words) for words in (['--help'], [], ['trian'])] == [0, 0, 2]\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)


def test_help_of_train_shows_every_field_with_the_default_of_the_preset(capsys):
    for words, kl_coef in ((["--preset", "smoke"], "0.5"), ([], "0.45")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "ppo", *words, "--help"])
        assert stop.value.code == 0
        shown = " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
        described = "Weight of the KL to the reference; the initial one, if kl_target is set"
        assert f"--kl-coef FLOAT {described} (default: {kl_coef})" in shown
        for field in dataclasses.fields(PPOConfig):
            assert re.search(f"--{field.name.replace('_', '-')}[ ,]", shown) or field.name == "total_updates"


@pytest.mark.parametrize("words", [["--top-k", "2.5"], ["--anneal-lr", "False"], ["--estimator", "mc"], ["--kl-coef"]])
def test_options_of_the_wrong_type_are_usage_errors(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SMALL, "--out", str(tmp_path / "run"), *words])
    assert stop.value.code == 2
    assert not (tmp_path / "run").exists()


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tokenmdp ")


def test_unwritable_directory_is_refused_before_any_work(tmp_path, error, monkeypatch):
    monkeypatch.setattr("tokenmdp.runs.policy_run.make_envs", lambda *_: pytest.fail("work was done"))
    (tmp_path / "file").write_text("")
    message = error("train", *SMALL, "--out", tmp_path / "file" / "run")
    assert f"cannot write to the run directory {tmp_path / 'file' / 'run'}" in message
    assert "--out" in message


def test_foreign_directory_is_refused_and_untouched(tmp_path, error):
    (tmp_path / "thesis.tex").write_text("years of work")
    message = error("train", *SMALL, "--out", tmp_path)
    assert "holds thesis.tex but no run.json" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_run_with_other_settings_is_refused(copy, error):
    message = error("train", *SMALL, "--out", copy, "--seed", 7)
    assert "holds a run with other settings (seed is 1, asked 7); choose another --out" in message


def test_two_processes_do_not_train_in_one_directory(copy, error, monkeypatch):
    pytest.importorskip("fcntl", reason="only Unix locks directories")
    before = (copy / "metrics.jsonl").read_bytes()
    with locked(copy):
        message = error("train", *SMALL, "--updates", 9, "--out", copy)
    assert f"another process trains in {copy}; wait for it, or choose another --out" in message
    assert (copy / "metrics.jsonl").read_bytes() == before

    def learn(kind, run, *arguments):
        with pytest.raises(BusyError), locked(run.path, wait=False):
            pass
        raise ValueError("that was it")

    monkeypatch.setattr(training, "learn", learn)
    assert "that was it" in error("train", *SMALL, "--updates", 9, "--out", copy)
    with locked(copy, wait=False):
        pass


def test_no_resume_refuses_an_existing_run(copy, error):
    assert "already holds a run; leave out --no-resume" in error("train", *SMALL, "--out", copy, "--no-resume")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", "run.json is damaged"),
        ("run.json", '{"format": "x"}', "written by another program"),
        ("before.json", "{", "delete it and it is made anew"),
        ("checkpoint/state/trainer.safetensors", "x", "cannot be continued"),
        ("checkpoint/model.safetensors", "x", "cannot be continued"),
        ("checkpoint/ppo_config.json", "{}", "cannot be continued"),
    ],
)
def test_damaged_run_is_refused_with_the_remedy(copy, error, file, content, message):
    (copy / file).write_text(content)
    assert message in error("train", *SMALL, "--updates", 4, "--out", copy)


def test_a_command_that_fails_early_leaves_no_half_made_run(tmp_path, error):
    out = tmp_path / "run"
    message = error("train", *SMALL, "--out", out, "--policy", tmp_path / "no such model")
    assert "no tokenizer" in message
    assert "no such directory" in message
    assert not out.exists()
    out.mkdir()  # by another program
    error("train", *SMALL, "--out", out, "--policy", tmp_path / "no such model")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gamma", "2"], "gamma is 2.0; it must lie in [0, 1]"),
        (["--kl-coef", "inf"], "kl_coef is inf; it must be finite"),
        (["--seed", "-1"], "--seed is -1; it must lie in 0 to"),
        (["--kl-coef", "0", "--kl-target", "6"], "kl_target is 6.0 and kl_coef is 0"),
        (["--updates", "0"], "--updates is 0"),
        (["--num-envs", "0"], "--num-envs is 0"),
        (["--eval-samples", "1"], "--eval-samples is 1; it must be at least 2"),
        (["--credit-beta", "1.5"], "credit_beta is 1.5"),
        (["--device", "tpu9"], "'tpu9' is not a device that torch computes on"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_refused(more, message, tmp_path, error):
    assert message in error("train", *SMALL, "--out", tmp_path / "run", *more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused(tmp_path, error):
    assert "torch sees none" in error("train", *SMALL, "--out", tmp_path / "run", "--device", "cuda")


def test_looking_at_something_that_is_no_run(tmp_path, finished, error):
    assert "is not a tokenmdp run" in error("eval", tmp_path)
    (tmp_path / "run.json").write_text((finished / "run.json").read_text())
    assert "has no checkpoint yet" in error("eval", tmp_path)
    assert "has no checkpoint yet" in error("sample", tmp_path)
    assert "has no tokens" in error("score", "", "--reward-model", "toy-lexicon")


def test_unknown_command_is_a_usage_error(capsys):
    assert cli.main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err
    assert cli.main(["train", "rlo"]) == 2
    assert "there is no algorithm 'rlo'; choose one of ppo, rloo" in capsys.readouterr().err


def test_train_without_options_is_the_main_job(monkeypatch):
    taken = []
    monkeypatch.setattr(
        training, "train", lambda settings, out, updates, *rest, **options: taken.append((settings, out, updates)) or 0
    )
    assert cli.main(["train"]) == 0
    ((settings, out, updates),) = taken
    assert (settings.policy, settings.credit, settings.algorithm, updates) == ("imdb-tiny", "red", "ppo", 40)
    preset = {"learning_rate": 1e-4, "kl_coef": 0.45, "update_epochs": 1, "num_minibatches": 8}
    assert settings.config == preset
    assert str(out) == "runs/quick-red-seed1"


def test_a_run_that_failed_before_its_first_update_does_not_hinder_the_mended_one(tmp_path, capsys):
    order = ["train", "f-dpg", *SMALL, "--updates", "1", "--moment-samples", "8", "--out", str(tmp_path / "run")]
    assert cli.main([*order, "--target", "word:zzz@0.5"]) == 2
    assert "none of 8 samples has the feature 'word:zzz'" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").touch()  # as if it had learned
    assert cli.main([*order, "--target", "score/1"]) == 2
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert cli.main([*order, "--target", "score/1"]) == 0
    assert cli.main([*order, "--target", "score/2"]) == 2
    assert "config.target is 'score/1', asked 'score/2'" in capsys.readouterr().err


def test_a_default_directory_names_what_makes_a_difference():
    for name, expected in {"ppo": "quick-red-seed1", "grpo": "quick-grpo-red-seed1", "dpo": "quick-dpo-seed1"}.items():
        assert default_name("quick", preset_settings("quick", name)) == expected


def test_every_fifth_prompt_is_held_out(tmp_path, monkeypatch):
    prompts = [f"prompt {index}" for index in range(23)]
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": prompts}))
    settings = settings_from(preset_options("smoke", prompts=str(tmp_path / "prompts.json")))
    split = split_prompts(settings)
    assert split.held_out == prompts[::5]
    assert sorted([*split.training, *split.held_out]) == sorted(prompts)
    assert (
        split_prompts(settings_from(preset_options("smoke", prompts="stanfordnlp/imdb"))).held_out
        == "stanfordnlp/imdb:test"
    )
    monkeypatch.chdir(tmp_path)  # a relative path is kept absolute
    assert settings_from(preset_options("smoke", prompts="prompts.json")).prompts == str(tmp_path / "prompts.json")
    assert split_prompts(settings_from(preset_options("smoke", eval_prompts="mine.txt"))).held_out == "mine.txt"


def test_allocator_settings_are_added_once_and_only_by_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(process_settings.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert process_settings.missing_settings({}) == process_settings.SETTINGS
    assert process_settings.missing_settings({"MALLOC_MMAP_MAX_": "5"}) == {
        name: value for name, value in process_settings.SETTINGS.items() if name != "MALLOC_MMAP_MAX_"
    }
    assert process_settings.missing_settings({process_settings.REEXECUTED: "1"}) == {}

    executed = []
    for name in (*process_settings.SETTINGS, process_settings.REEXECUTED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", lambda *call: executed.append(call))
    monkeypatch.setattr(cli, "run", lambda name, arguments: 0)
    cli.main(["train", *SMALL])  # called as a library
    assert executed == []
    monkeypatch.setattr(sys, "argv", ["tokenmdp", "train", "--no-reexec"])
    cli.main()
    assert executed == []
    monkeypatch.setattr(sys, "argv", ["tokenmdp", "train"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/tokenmdp", "train"])
    cli.main()
    ((program, arguments, environment),) = executed
    assert (program, arguments) == (sys.executable, [sys.executable, "/bin/tokenmdp", "train"])
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert environment[process_settings.REEXECUTED] == "1"


def test_train_is_callable_from_python(tmp_path):
    arguments = preset_options("smoke", updates=1, num_envs=4, eval_samples=2, out=tmp_path / "run", device="cpu")
    assert train(arguments) == 0


def test_a_reward_model_with_another_tokenizer_trains_when_asked_to_align(tmp_path, error, capsys):
    command = [
        "train", "--preset", "smoke", "--reward-model", "imdb-tiny", "--updates", "1", "--num-envs", "4",
        "--eval-samples", "4", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert "align='offsets'" in error(*command)
    assert cli.main([*command, "--align", "offsets"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["align"] == "offsets"
