"""Messages of the `tokenmdp` command when something is wrong, and the options that they name."""

import io
import re
import sys
import warnings
from dataclasses import replace

import pytest
from rich.console import Console

from tokenmdp import cli
from tokenmdp.agents.ppo import PPO
from tokenmdp.cli.train import default_name, preset_options, settings_from
from tokenmdp.credit import CREDIT_METHODS
from tokenmdp.files import CheckpointError
from tokenmdp.runs.settings import settings_from_record, settings_record
from tokenmdp.wrappers import UninformativeAttention

pytestmark = pytest.mark.usefixtures("curves_not_drawn")

SMALL = ["--preset", "smoke", "--updates", "1", "--num-envs", "4", "--eval-samples", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one update."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(["train", *SMALL, "--out", str(out)]) == 0
    return out


@pytest.fixture
def error(capsys):
    """Runs a command that must be refused with exit status 2; returns the message."""

    def run(*arguments):
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    return run


def test_paths_of_the_wrong_kind_are_told_apart(finished, tmp_path, error):
    assert f"it lies in the run {finished}: pass that" in error("eval", finished / "checkpoint")
    refused = error("sample", finished / "report")
    assert "neither a run nor a model: it holds no run.json" in refused
    assert "pass a run directory, its checkpoint/, or a directory" in refused
    assert "there is no such directory; check the path" in error("sample", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"its checkpoint is .*/checkpoint: pass that"):
        PPO.load(finished, envs=None)


def test_messages_name_options_of_the_command(tmp_path, error):
    out = tmp_path / "run"
    assert "in the command, --num-envs or --num-minibatches" in error("train", *SMALL, "--num-envs", 1, "--out", out)
    message = error("train", *SMALL, "--prompts", __file__, "--out", out)
    assert "test_cli_messages.py is a file, but only .txt, .json, .jsonl, .csv, .parquet files" in message
    assert "shorten it" in error("score", "a film " * 600)
    assert error("train", *SMALL, "--policy", "imdb-tiny", "--out", out).count("--align offsets") == 1
    assert not out.exists()


def test_sample_warns_in_one_line_of_words_that_the_policy_does_not_know(finished, capsys):
    arguments = ["sample", str(finished), "--num", "1", "--device", "cpu"]
    assert cli.main([*arguments, "--prompt", "I watched the film"]) == 0
    assert capsys.readouterr().err == "warning: not in the vocabulary, so read as <unk>: 'I', 'watched'\n"
    assert cli.main([*arguments, "--prompt", "the film"]) == 0
    assert capsys.readouterr().err == ""


def test_prompts_of_any_length_by_option(finished, error, capsys):
    arguments = ["sample", str(finished), "--num", "1", "--device", "cpu", "--prompt", "the film was " * 6]
    assert "in the command, --max-prompt-tokens and --truncate-prompt" in error(*arguments)
    for more, shown in ((["--max-prompt-tokens", "18"], 18), (["--truncate-prompt", "left"], 4)):
        assert cli.main([*arguments, *more]) == 0
        opening = capsys.readouterr().out.split(" | ")[0].split()[1:]  # after the score
        assert opening == (["the", "film", "was"] * 6)[-shown:]


def test_settings_added_later_are_recorded_only_where_they_are_set():
    assert not {"max_prompt_tokens", "truncate_prompt"} & settings_record(settings_from(preset_options())).keys()
    settings = settings_from(preset_options(max_prompt_tokens=24, truncate_prompt="left"))
    record = settings_record(settings)
    assert (record["max_prompt_tokens"], record["truncate_prompt"]) == (24, "left")
    assert settings_from_record(record) == replace(settings, device="cpu")


def test_runs_with_adapters_have_a_directory_of_their_own():
    names = [
        default_name("smoke", settings_from(preset_options("smoke"), "ppo", {"lora_rank": rank})) for rank in (0, 8)
    ]
    assert names == ["smoke-attention-seed1", "smoke-attention-lora8-seed1"]


@pytest.mark.parametrize(("command", "first"), [("score", "all"), ("sample", "None")])
def test_choices_are_listed_in_the_librarys_order(command, first, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "imdb-tiny", "--credit", "atention"])
    listed = re.findall(r"'([\w-]+)'", capsys.readouterr().err.replace("\n", ""))
    assert [name for name in listed if name in (first, *CREDIT_METHODS)] == [first, *CREDIT_METHODS]


def test_warnings_of_others_keep_their_place(monkeypatch, capsys):
    def warn(name, arguments):
        warnings.warn("for users", UserWarning, stacklevel=2)  # placed in cli/__init__.py
        warnings.warn("of our kind", UninformativeAttention, stacklevel=1)
        warnings.warn("of another library", UserWarning, stacklevel=1)
        warnings.warn("for programmers", FutureWarning, stacklevel=2)
        return 0

    monkeypatch.setattr(cli, "run", warn)
    assert cli.main(["credits"]) == 0
    shown = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(" ")]  # source lines
    assert shown[:2] == ["warning: for users", "warning: of our kind"]
    assert re.fullmatch(r".*test_cli_messages\.py:\d+: UserWarning: of another library", shown[2])
    assert re.fullmatch(r".*cli/__init__\.py:\d+: FutureWarning: for programmers", shown[3])


def test_a_warning_is_written_above_a_running_progress_display(monkeypatch):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with console.status("evaluating"):  # stands in for sys.stderr
        cli.show_warning("look", UninformativeAttention, __file__, 1)
    assert "warning: look" in re.sub(r"\x1b\[[\d;]*m", "", written.getvalue())
