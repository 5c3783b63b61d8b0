"""`tokenmdp credits`, `quality` and `score --credit all`: what they print, write and refuse."""

import json
import re
import sys
import typing
from importlib.util import find_spec

import pytest

from tokenmdp import cli
from tokenmdp.cli import options
from tokenmdp.cli.train import preset_options, settings_from
from tokenmdp.credit import CREDIT_METHODS, NEEDS
from tokenmdp.runs.environments import make_envs
from tokenmdp.runs.settings import absolute_options, parse_options, settings_from_record, settings_record

pytestmark = pytest.mark.usefixtures("curves_not_drawn")

CPU = ["--device", "cpu"]
every_method = pytest.mark.skipif(
    find_spec("captum") is None, reason="needs the attribution extra: pip install 'tokenmdp[attribution]'"
)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in a terminal of so many columns; returns what it printed."""

    def run(*arguments, status=0, columns=200):
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == status
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out if status == 0 else captured.err

    return run


def rows(output):
    """Cells of every table row that begins with a method or token."""
    lines = [line for line in output.splitlines() if "│" in line]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_command_lines_names_are_the_registry():
    assert typing.get_args(options.CreditName) == tuple(CREDIT_METHODS)
    assert typing.get_args(options.AllOrOne) == ("all", *CREDIT_METHODS)


def test_credits_lists_every_method_with_what_it_declares(run):
    output = run("credits")
    declared = {row[0]: row[2:] for row in rows(output) if len(row) == 5 and row[0]}
    for name, method in CREDIT_METHODS.items():
        key = "integrated-" if name == "integrated-gradients" else name
        flags = (method.conserves_return, method.causal, method.potential_based)
        assert declared[key] == ["yes" if flag else "no" for flag in flags]
        for need in method.needs:
            assert f"needs {need}" in output
    for need, meaning in NEEDS.items():
        assert f"{need}: {meaning}" in output
    assert "option tuned" in output


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("quality")
    options = ["--num", "4", "--max-new-tokens", "7", "--methods", "attention", "shapley", "rto", "red"]
    assert cli.main(["quality", "--world", "all", *options, "--option", "shapley.budget=64", "--seed", "3",
                     "--out", str(out), *CPU]) == 0  # fmt: skip
    return out


def test_quality_writes_numbers_a_page_and_its_own_command(measured):
    record = json.loads((measured / "quality.json").read_text())
    assert [world["name"] for world in record["worlds"]] == ["negation", "keyword", "model"]
    assert record["arguments"]["seed"] == 3
    for world in record["worlds"]:
        methods = {method["name"]: method for method in world["methods"]}
        assert list(methods) == ["reference", "random", "attention", "shapley", "red", "rto"]
        assert methods["rto"]["unavailable"].startswith("it has no default for tuned; pass --option rto.tuned=DIR")
        assert methods["reference"]["metrics"]["spearman"] == [1, 1, 1]
        assert 2 < methods["shapley"]["reward_forwards"] <= 65
        low, mean, high = (methods["attention"]["metrics"]["deletion"][place] for place in (1, 0, 2))
        assert low <= mean <= high
        assert world["attention"]["level"] in ("informative", "weakly informative", "not informative", "unknown")
    text = (measured / "quality.md").read_text()
    command = "tokenmdp quality --world all --num 4 --max-new-tokens 7 --methods attention shapley rto red --option "
    assert f"`{command}shapley.budget=64 --seed 3`" in text
    assert "| shapley (budget=64) | 4 |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") == 9
    page = (measured / "texts.html").read_text(encoding="utf-8")
    assert page.count("<section>") == 12
    assert "held-out prompts" in text


def test_quality_prints_table_reasons_and_verdict(run, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("a truly great film\nthe plot was dull and bad\nfine\n")
    output = run("quality", "--texts", file, "--methods", "red", "fine-grained", "--num", 2, *CPU)
    cells = next(row for row in rows(output) if row[0] == "red")
    assert cells[1:3] == ["2", "1"]
    assert len([cell for cell in cells[3:] if "[" in cell]) == 5
    assert "2 texts of" in output
    assert "the texts of texts.txt" in output
    assert "fine-grained: not available: it has no default for parts" in output
    assert "The attention is" in output
    parts = 'fine-grained.parts=[{"reward_model": "lexicon", "density": "token"}]'
    output = run("quality", "--texts", file, "--methods", "fine-grained", "--option", parts, *CPU)
    assert any(row[0].startswith("fine-grained (parts=") and row[1] == "3" for row in rows(output))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "1"], "--num is 1; it must be at least 2"),
        (["--max-forwards", "0"], "--max-forwards is 0"),
        (["--option", "budget=4"], "--option 'budget' does not name a method"),
        (["--option", "shapley.size=4"], "shapley credit has no option size"),
        (["--option", "shapley"], "--option 'shapley' is not name=value, such as shapley.budget=64"),
        (["--option", "fine-grained.parts=[1]"], "1 is not a part of fine-grained credit"),
        (["--reward-model", "no/such/model"], "no/such/model"),
    ],
)
def test_quality_refuses(run, arguments, message):
    assert message in run("quality", "--num", "2", "--max-new-tokens", "6", *arguments, *CPU, status=2)


def test_quality_of_one_text_is_refused(run, tmp_path):
    (tmp_path / "one.txt").write_text("a film\n")
    assert "holds 1 texts" in run("quality", "--texts", tmp_path / "one.txt", *CPU, status=2)


# --- score ------------------------------------------------------------------------------------------------------------

TEXT = ("score", "not a great film", "--prompt", "I think it is")


@every_method
def test_score_all_has_a_column_a_method_and_a_reason_for_the_others(run, tmp_path):
    page = tmp_path / "page.html"
    output = run(*TEXT, "--credit", "all", "--credit-option", "shapley.budget=16", "--html", page, *CPU)
    table = rows(output)
    heading = next(row for row in rows(output.replace("┃", "│")) if "shapley" in row)
    assert [row[1] for row in table] == ["not", "a", "great", "film"]
    score = float(output.split("score ")[1].split(";")[0])
    for place, name in enumerate(heading):
        if name and name not in ("#", "token"):
            total = sum(float(row[place]) for row in table)
            assert total == pytest.approx(score, abs=0.021), name  # two decimals per token
    assert "rto: not available: it has no default for tuned; pass --credit-option rto.tuned=DIR" in output
    ran = len(CREDIT_METHODS) - 2
    assert page.read_text(encoding="utf-8").count('<th scope="row"') == ran


@every_method
@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_tables_fit_the_terminal_with_every_number(run, columns):
    output = run(*TEXT, "--credit", "all", "--credit-option", "shapley.budget=16", *CPU, columns=columns)
    tables = [line for line in output.splitlines() if line[:1] in "┏│"]
    assert max(map(len, tables)) <= columns
    numbers = [cell for row in rows(output) for cell in row[2:]]
    assert len(numbers) == 4 * (len(CREDIT_METHODS) - 2)
    assert not [cell for cell in numbers if "…" in cell]


@pytest.mark.parametrize("columns", [80, 125, 165])
def test_quality_tables_fit_the_terminal(run, columns):
    names = ("abc-d", "integrated-gradients", "shapley")
    output = run("quality", "--num", 2, "--max-new-tokens", 6, "--methods", *names, *CPU, columns=columns)
    tables = [line for line in output.splitlines() if line[:1] in "┏┃│"]
    assert max(map(len, tables)) <= columns
    assert "…" not in "".join(tables)


def test_a_method_whose_library_is_missing_is_left_out_with_the_line_that_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    reason = 'captum, which is not installed: pip install "tokenmdp[attribution]"'
    options = ("--credit-option", "shapley.budget=16", "--credit-option", "owen.budget=16")
    output = " ".join(run(*TEXT, "--credit", "all", *options, *CPU).split())
    assert "integrated-gradients: not available: integrated gradients are computed by" in output
    assert reason in output
    assert "deeplift" in output.split("not available")[0]  # the table
    output = run("quality", "--num", "2", "--max-new-tokens", "6", "--methods", "red", "integrated-gradients", *CPU)
    assert reason in " ".join(output.split())


@every_method
def test_score_all_with_another_vocabulary_says_what_is_missing(run):
    output = run("score", "great fun", "--credit", "all", "--reward-model", "toy-lexicon", *CPU)
    assert "abc-d, abc-d2: not available: the policy 'imdb-tiny' writes other tokens" in output
    assert "integrated-gradients, deeplift: not available" in output


def test_score_by_the_policys_attention_and_by_a_tuned_policy(run):
    output = run(*TEXT, "--credit", "abc-d", *CPU)
    assert "= sum of the credits" in output
    assert re.search(r"attention mass on the text: 0\.\d+\n", output)  # the mean of columns is not a share of a row
    output = run(*TEXT, "--credit", "rto", "--credit-option", "tuned=imdb-tiny", *CPU)
    assert "; the credits sum to" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--credit", "rto"], "rto credit has no default for tuned; pass --credit-option tuned=DIR"),
        (["--credit", "shapley", "--credit-option", "budget=1"], "budget is 1"),
        (["--credit", "sparse", "--credit-option", "x=1"], "sparse credit has no option x"),
        (["--credit", "abc-d", "--reward-model", "toy-lexicon"], "choose one with --policy"),
        (["--credit", "abc-d", "--policy", "no/such"], "no/such"),
        (["--credit-option", "heads=null"], "heads is None; choose 'mean', 'max' or a whole number, at least 0"),
        (["--credit-option", "layer=last"], "layer is 'last'; choose a whole number"),
        (["--credit-option", "attention_floor=low"], "attention_floor is 'low'; it must be a number"),
        (["--credit", "shapley", "--credit-option", 'budget="64"'], "budget is '64'; choose a whole number"),
        (
            ["--credit", "deeplift", "--credit-option", "baseline=1.5"],
            "baseline is 1.5; choose 'mean', 'zero', ",
        ),
        (["--credit", "integrated-gradients", "--credit-option", "steps=2.5"], "steps is 2.5; choose a whole number"),
        (["--credit", "fine-grained", "--credit-option", "parts=3"], "parts is 3; give a list such as [{"),
        (
            ["--credit", "fine-grained", "--credit-option", 'parts={"density": "token"}'],
            "parts is {'density': ",
        ),
        (["--credit", "fine-grained", "--credit-option", 'parts=[{"reward_model": 3}]'], "reward_model is 3; pass"),
        (["--credit", "fine-grained", "--credit-option", 'parts=[{"size": 3}]'], "with some of context, density"),
        (["--credit", "rto", "--credit-option", "tuned=3"], "tuned is 3; give the name or directory of a policy"),
        (["--credit", "all", "--credit-option", "tuned=x"], "--credit-option 'tuned' does not name a method"),
    ],
)
def test_score_refuses(run, arguments, message):
    assert message in run("score", "great fun", *arguments, *CPU, status=2)


@pytest.mark.parametrize("option", ["layer=0", "heads=max", "attention_floor=2"])
def test_score_shows_the_mass_of_every_row_and_the_floor_after_it(run, option):
    lines = run(*TEXT, "--credit-option", option, *CPU).splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("attention mass on the text: "))
    default_row = option == "attention_floor=2"  # and a mass that is always below it
    assert ("of the row (the rest is on the prompt)" in lines[place]) == default_row
    assert (lines[place + 1] == "that is below the floor, so the credit is uniform") == default_row


def test_score_loads_a_policy_only_for_methods_that_read_one(run):
    assert "score " in run(*TEXT, "--policy", "no/such/policy", *CPU)
    options = ("--credit-option", "rto.tuned=imdb-tiny", "--credit-option", "shapley.budget=16")
    output = run(*TEXT, "--credit", "all", "--policy", "no/such/policy", *options, *CPU)
    assert "abc-d, abc-d2: not available: " in output
    assert "rto: not available" not in output
    assert "no/such/policy" in output


# --- settings of a run ------------------------------------------------------------------------------------------------


def test_a_runs_credit_options_are_kept_and_beta_is_the_methods_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo").mkdir()
    red = settings_from(preset_options("smoke", credit="red", device="cpu"))
    assert (red.credit_beta, red.credit_options) == (1.0, {})
    assert "credit_options" not in settings_record(red)  # as earlier versions wrote it
    assert settings_from_record(settings_record(red)) == red
    assert settings_from(preset_options("smoke", device="cpu")).credit_beta == 0.8
    options = ("tuned=dpo", "clip=2")
    rto = settings_from(preset_options("smoke", credit="rto", credit_option=options, device="cpu"))
    assert rto.credit_options == {"tuned": str(tmp_path / "dpo"), "clip": 2}
    assert settings_from_record(settings_record(rto)) == rto


def test_reward_models_of_parts_are_kept_as_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge").mkdir()
    parts = [{"reward_model": "judge"}, {"reward_model": "lexicon"}, {"density": "token"}, {"reward_model": 3}, 4]
    kept = absolute_options({"parts": parts, "tuned": 3})
    assert kept == {"parts": [{"reward_model": str(tmp_path / "judge")}, *parts[1:]], "tuned": 3}
    assert absolute_options({"parts": 3}) == {"parts": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--credit-option", "heads=null"], "heads is None"),
        (["--credit", "rto"], "rto credit has no default for tuned"),
        (["--credit", "rto", "--credit-option", "tuned=3"], "tuned is 3"),
        (["--reward-template", "{prompt} {response}"], "--reward-template '{prompt} {response}' needs --align offsets"),
        (["--reward-template", "{prompt}", "--align", "offsets"], "must have {response} once"),
    ],
)
def test_train_refuses_options_before_it_makes_a_directory(run, tmp_path, options, message):
    error = run("train", "--preset", "smoke", *options, "--out", tmp_path / "run", *CPU, status=2)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_train_with_a_template_keeps_it(run, tmp_path):
    template, out = "Q: {prompt} A: {response}", tmp_path / "run"
    small = ("--updates", 1, "--num-envs", 4, "--eval-samples", 2)
    aligned = ("--reward-model", "lexicon", "--align", "offsets", "--credit", "uniform")
    run("train", "--preset", "smoke", *aligned, "--reward-template", template, *small, "--out", out, *CPU)
    settings = settings_from_record(json.loads((out / "run.json").read_text())["settings"])
    assert settings.reward_template == template
    envs = make_envs(settings, 1, None)
    assert envs.unwrapped.task.reward_model.template == template
    plain = settings_from(preset_options("smoke", device="cpu"))
    assert "reward_template" not in settings_record(plain)  # as earlier versions wrote it


def test_options_need_a_name_and_a_value():
    with pytest.raises(ValueError, match=r"--option 'kl' is not name=value, such as shapley.budget=64"):
        parse_options(["kl"], "--option")


def test_train_with_a_method_of_the_laboratory(tmp_path, run):
    out = tmp_path / "run"
    options = [
        "--preset",
        "smoke",
        "--credit",
        "shapley",
        "--credit-option",
        "units=words",
        "--credit-option",
        "budget=16",
    ]
    run("train", *options, "--updates", 1, "--num-envs", 4, "--eval-samples", 2, "--out", out, *CPU)
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["credit_options"] == {"units": "words", "budget": 16}
    output = run("sample", out, "--num", 1, *CPU)
    assert output.strip()
    assert run("sample", out, "--num", 1, "--credit", "uniform", *CPU).strip()
