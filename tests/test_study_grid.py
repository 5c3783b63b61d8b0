"""From a preset and a command line to cells, and a study's directory read and written."""

import json
import shlex
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from study_doubles import make_cell

from tokenmdp import cli
from tokenmdp import credit as credit_package
from tokenmdp.cli import ablate
from tokenmdp.credit import CREDIT_METHODS
from tokenmdp.runs import credit_options
from tokenmdp.runs.environments import credit_of, make_envs
from tokenmdp.runs.settings import RunSettings, agent_config, settings_from_record, settings_record
from tokenmdp.study import grid
from tokenmdp.study.directory import load_study
from tokenmdp.study.grid import Length, expand, load_cost, parse_length, parse_method, read_rates, shard_of
from tokenmdp.study.presets import PLANS
from tokenmdp.study.results import StudyError, cell_from_record, cell_record

ABC_STUDY = Path(__file__).resolve().parents[1] / "examples" / "abc_study"
SIZES = {
    "quick": 12,
    "tune": 48,
    "smoke": 4,
    "imdb": 60,
    "beta": 30,
    "length": 54,
    "kl": 48,
    "faithful": 60,
    "gpt2": 60,
    "critic": 90,
    "critic_long": 45,
    "signals": 50,
    "second": 50,
}


def plan_for(*words):
    return ablate.plan_of(*ablate.parse_command(words))


def study_plan(name, *words):
    """A plan of the ABC study."""
    return plan_for("--plan", str(ABC_STUDY / f"{name}.json"), *words)


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_a_plan_has_its_cells_and_each_is_another_run(name, size):
    plan = PLANS.get(name) or study_plan(name)
    cells = expand(plan)
    assert len(cells) == size == len({cell.id for cell in cells})
    pairs = Counter((cell.setting, cell.method) for cell in cells)
    assert set(pairs.values()) == {len(plan.seeds)}
    assert all(cell.seed == cell.settings.seed for cell in cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)  # stopped early, it is balanced


def test_the_main_grid_is_the_papers_protocol():
    cells = expand(study_plan("imdb"))
    assert {cell.method for cell in cells} == {"sparse", "uniform", "attention", "abc-d", "abc-d2", "red"}
    assert {cell.seed for cell in cells} == set(range(1, 11))
    for cell in cells:
        settings = cell.settings
        assert (settings.num_envs, cell.updates) == (16, 150)
        assert (settings.horizon_range, settings.min_new_tokens, settings.max_new_tokens) == ((8, 15), 8, 15)
        expected = {
            "update_epochs": 4, "gamma": 1, "gae_lambda": 0.95, "clip_coef": 0.2, "vf_coef": 0.1, "kl_coef": 0.2,
            "kl_target": 6,
        }  # fmt: skip
        assert expected.items() <= settings.config.items()
        assert settings.credit_beta == (1.0 if cell.method in ("red", "uniform") else 0.8)


def test_sweeps_vary_one_thing():
    betas = [cell.settings.credit_beta for cell in expand(replace(study_plan("beta"), seeds=(1,)))]
    assert betas == [0, 0.2, 0.4, 0.6, 0.8, 1]
    for cell in expand(study_plan("kl")):
        assert cell.settings.config["kl_target"] is None
        assert cell.setting == f"8-16 tokens, kl_coef={cell.settings.config['kl_coef']:g}"
    for cell in expand(study_plan("faithful")):
        assert cell.setting.endswith(f"reward model {cell.settings.reward_model}")
    rates = {cell.settings.config["learning_rate"] for cell in expand(PLANS["tune"])}
    assert len(rates) == len(PLANS["tune"].tried_rates) > 1
    assert all(seed > 100 for seed in PLANS["tune"].seeds)  # none that a comparison uses


def test_rates_to_try_are_an_axis_of_any_grid():
    words = ("--preset", "tune", "--methods", "sparse", "red", "--tried-rates", "1e-5", "2e-5", "--lengths", "40-60")
    cells = expand(plan_for(*words))
    assert {cell.settings.config["learning_rate"] for cell in cells} == {1e-5, 2e-5}
    assert {cell.setting for cell in cells} == {
        "40-60 tokens, learning_rate=1e-05",
        "40-60 tokens, learning_rate=2e-05",
    }


@pytest.mark.parametrize("other", [("--learning-rate", "1e-4"), ("--learning-rates", "rates.json")])
def test_a_rate_beside_rates_to_try_is_refused(other, tmp_path):
    words = ("--preset", "smoke", "--tried-rates", "1e-3", "3e-3", *other, "--out", str(tmp_path / "study"))
    with pytest.raises(
        StudyError, match=rf"{other[0]} is .*, and this grid tries the rates 0\.001 0\.003; leave out {other[0]}, or"
    ):
        ablate.main(words)
    assert not (tmp_path / "study").exists()


def test_a_cell_of_two_grids_is_one_cell():
    main, length = expand(study_plan("imdb")), expand(study_plan("length"))
    shared = {cell.id for cell in main} & {cell.id for cell in length}
    assert len(shared) == 18
    faithful = {cell.id: cell for cell in expand(study_plan("faithful"))}
    both = [(cell, faithful[cell.id]) for cell in main if cell.id in faithful]
    assert len(both) == 20
    assert all(one.setting != other.setting for one, other in both)  # under another label
    with_critics = {cell.id: cell.setting for cell in expand(study_plan("critic"))}
    both = [with_critics[cell.id] for cell in main if cell.id in with_critics]
    assert both == ["8-16 tokens, critic=shared"] * 30  # the default one


def test_an_id_is_what_a_cell_computes():
    cell = make_cell()
    again = cell_from_record(json.loads(json.dumps(cell_record(cell))))
    assert again == cell
    assert again.id == cell.id == replace(cell, method="another", setting="label").id
    others = [
        make_cell(seed=2), make_cell("red"), make_cell(credit_beta=0.4), make_cell(updates=151),
        make_cell(config={"learning_rate": 1e-3}), make_cell(reward_model="imdb-plain"), make_cell(min_new_tokens=7),
        replace(cell, gold=None), replace(cell, eval_every=7), replace(cell, eval_samples=7),
    ]  # fmt: skip
    assert len({cell.id, *(other.id for other in others)}) == 1 + len(others)
    assert replace(cell, settings=replace(cell.settings, device="cuda")).id == cell.id  # it may move


@pytest.mark.parametrize(
    ("specification", "label", "beta", "options"),
    [
        ("sparse", "sparse", 0.8, {}),
        ("red", "red", 1.0, {}),
        ("attention:credit_beta=0.4", "attention credit_beta=0.4", 0.4, {}),
        ("shapley:budget=64,credit_beta=0.5", "shapley budget=64 credit_beta=0.5", 0.5, {"budget": 64}),
    ],
)
def test_methods_take_options(specification, label, beta, options):
    method = parse_method(specification)
    assert (method.label, method.credit_beta, method.options) == (label, beta, options)


def test_a_method_of_ones_own_is_named_by_its_place(tmp_path, monkeypatch):
    (tmp_path / "my_credit.py").write_text(
        "from dataclasses import dataclass\n"
        "from tokenmdp.credit import SparseCredit\n\n"
        "@dataclass(frozen=True)\nclass Mine(SparseCredit):\n    sharpness: float = 1.0\n\n"
        "NOT_A_CLASS = 3\n"
    )
    (tmp_path / "my_bug.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "CREDIT_METHODS", methods := dict(CREDIT_METHODS))
    monkeypatch.setattr(credit_package, "CREDIT_METHODS", methods)
    monkeypatch.setattr(credit_options, "CREDIT_METHODS", methods)
    plan = plan_for("--preset", "smoke", "--methods", "sparse", "my_credit.Mine:sharpness=2", "--seeds", "1")
    _, cell = expand(plan)
    assert cell.settings.credit == "my_credit.Mine"
    assert cell.method == "my_credit.Mine sharpness=2"
    assert credit_of(cell.settings).sharpness == 2
    for wrong in ("my_credit.Yours", "my_credit.NOT_A_CLASS", "no_such_module.Mine", "my_bug.Mine"):
        with pytest.raises(StudyError, match=f"--methods '{wrong}'"):
            parse_method(wrong)


def test_lengths_exclude_their_upper_end():
    assert (parse_length("8-16"), parse_length("5")) == (Length(8, 15), Length(5, 5))
    for wrong in ("16-8", "8-8", "0-4", "8-", "eight", ""):
        with pytest.raises(StudyError, match="--lengths"):
            parse_length(wrong)


def test_responses_have_the_lengths_of_their_range():
    (cell,) = expand(replace(PLANS["smoke"], methods=("sparse",), seeds=(1,)))
    envs = make_envs(cell.settings, 64, None)
    task = envs.unwrapped.task
    assert (task.horizon_range, task.min_new_tokens, task.max_new_tokens) == ((4, 7), 4, 7)
    _, infos = envs.reset(seed=0)
    assert set(infos["horizon"]) == {4, 5, 6, 7}
    assert not envs.unwrapped.action_masks()[:, task.eos_token_id].any()
    envs.close()


def test_betas_go_to_the_methods_that_have_one():
    cells = expand(study_plan("imdb", "--methods", "sparse", "red", "--credit-betas", "0.5", "1", "--seeds", "1"))
    assert [cell.method for cell in cells] == ["sparse", "red credit_beta=0.5", "red credit_beta=1"]


def test_the_command_line_changes_a_preset(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"attention": 2e-5, "attention credit_beta=0.4": 3e-5}))
    plan = study_plan(
        "imdb", "--methods", "attention", "attention:credit_beta=0.4", "--seeds", "3", "4", "4",
        "--lengths", "5-9", "--kl-coefs", "0.3", "--updates", "7", "--num-envs", "8", "--kl-horizon", "50",
        "--gold", "none", "--eval-every", "2", "--eval-samples", "4", "--prompts", str(file),
    )  # fmt: skip
    cells = expand(plan, read_rates(file))
    assert [(cell.method, cell.seed) for cell in cells] == [
        ("attention", 3), ("attention credit_beta=0.4", 3), ("attention", 4), ("attention credit_beta=0.4", 4),
    ]  # fmt: skip
    for cell in cells:
        settings = cell.settings
        assert (cell.setting, cell.updates, cell.gold) == ("5-9 tokens, kl_coef=0.3", 7, None)
        assert (cell.eval_every, cell.eval_samples, settings.num_envs) == (2, 4, 8)
        assert (settings.horizon_range, settings.prompts) == ((5, 8), str(file))
        assert settings.config["kl_horizon"] == 50
        assert settings.config["learning_rate"] == (2e-5 if cell.method == "attention" else 3e-5)


def test_a_plan_file_holds_options_that_the_command_line_changes(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"methods": ["sparse"], "seeds": [7], "updates": 4, "gold": "none", "gamma": 0.9}')
    plan = plan_for("--plan", str(file), "--updates", "5", "--kl-coef", "0.4")
    assert (plan.name, plan.methods, plan.seeds, plan.updates, plan.gold) == ("mine", ("sparse",), (7,), 5, None)
    words = "--methods sparse --seeds 7 --gold none --updates 5 --gamma 0.9 --kl-coef 0.4"
    assert plan == replace(plan_for("--preset", "custom", *words.split()), name="mine")
    command = ablate.command_of(*ablate.parse_command(["--plan", str(file), "--updates", "5"]))
    assert command == f"tokenmdp ablate --plan {file} --updates 5"
    file.write_text('{"updates": "many"}')
    with pytest.raises(SystemExit):
        plan_for("--plan", str(file))


def test_the_plans_of_the_first_edition_have_its_cells():
    study = load_study(ABC_STUDY.parents[1] / "docs" / "study_results")
    for name in ("imdb", "beta", "length", "kl", "faithful"):
        assert {cell.id for cell in expand(study_plan(name))} <= study.results.keys()


def test_another_policy_has_its_own_tokenizer_and_no_gold_model_that_reads_other_tokens(tmp_path):
    plan = study_plan("imdb", "--policy", str(tmp_path), "--reward-models", "lexicon")
    (cell, *_) = expand(plan)
    assert cell.settings.policy == cell.settings.tokenizer == str(tmp_path)
    assert (cell.settings.reward_model, cell.gold) == ("lexicon", None)
    assert study_plan("imdb").gold == "imdb-gold"


def test_a_reward_model_with_a_tokenizer_of_its_own_is_aligned():
    (cell, *_) = expand(plan_for("--preset", "quick", "--align", "offsets"))
    envs = make_envs(cell.settings, 2, ["This film"])
    assert envs.unwrapped.task.align == "offsets"
    envs.close()
    assert cell.id != expand(PLANS["quick"])[0].id


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "nothing"], "--methods 'nothing' names no credit method; choose from sparse"),
        (["--methods", "shapley:budgett=3"], "no option budgett"),
        (["--methods", "shapley:budget"], "not name=value"),
        (["--preset", "custom"], "the grid 'custom' is empty: it has no methods; pass --methods"),
        (["--lengths", "16-8"], "--lengths '16-8'"),
        (["--updates", "0"], "--updates is 0"),
        (["--eval-samples", "1"], "--eval-samples is 1"),
        (["--num-envs", "0"], "--num-envs is 0"),
        (["--num-envs", "2", "--num-minibatches", "4"], "--num-envs is 2, which does not fill num_minibatches=4"),
        (["--kl-coef", "nan"], "kl_coef is nan; it must be finite"),
        (["--shard", "0/2"], "--shard '0/2'"),
        (["--shard", "3/2"], "--shard '3/2'"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--quality-texts", "1"], "--quality-texts is 1"),
        (["--learning-rates", "rates.json"], "only for sparse"),
        (["--learning-rates", "text.json"], "is not a JSON object"),
        (["--learning-rates", "missing.json"], "missing.json"),
        (["--report-only"], "holds no study"),
        (["--plan", "missing.json"], "--plan missing.json cannot be read"),
        (["--plan=missing.json"], "--plan missing.json cannot be read"),
        (["--plan", "rates.json", "--preset", "smoke"], "--preset is smoke; leave out one of them"),
        (["--plan", "text.json"], "--plan text.json has no options; it is a JSON object of adam_eps, align"),
        (["--plan", "rates.json"], "--plan rates.json has sparse; it is a JSON object of adam_eps"),
        (["--reward-models", "no-such-model"], "no-such-model"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rates.json").write_text('{"sparse": 1e-3}')
    (tmp_path / "text.json").write_text("[]")
    preset = [] if "--preset" in words or "--plan" in words[0] else ["--preset", "smoke"]
    assert cli.main(["ablate", *preset, "--out", "study", "--device", "cpu", *words]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "study").exists()


def test_directories_of_one_name_are_told_apart(tmp_path):
    models = [str(tmp_path / folder / "model") for folder in ("a", "b")]
    with pytest.raises(StudyError, match="two different cells would both be called"):
        expand(replace(study_plan("imdb"), reward_models=tuple(models)))


def test_shards_share_out_all_cells():
    cells = expand(study_plan("imdb"))
    shards = [shard_of(cells, f"{number}/7") for number in range(1, 8)]
    assert sorted(cell.id for shard in shards for cell in shard) == sorted(cell.id for cell in cells)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_longer_cells_cost_more():
    short, middle, long = (
        expand(replace(study_plan("length"), lengths=(text,)))[0] for text in study_plan("length").lengths
    )
    assert load_cost(short) < load_cost(middle) < load_cost(long)


def test_settings_without_a_range_are_recorded_as_they_were():
    """So that runs of earlier versions can be resumed."""
    settings = RunSettings("TextGen-Toy-v0", "toy", "toy", "toy-lexicon", None, None, 8)
    assert not {"horizon_range", "min_new_tokens"} & settings_record(settings).keys()
    ranged = replace(settings, horizon_range=(4, 8), min_new_tokens=4)
    for each in (settings, ranged):
        assert settings_from_record(json.loads(json.dumps(settings_record(each)))) == each


def test_lambda_and_estimator_are_axes_with_labels_of_their_own():
    options = ["--methods", "sparse", "uniform:credit_beta=0.8", "attention:shuffled=true,sharpness=2", "--seeds", "1"]
    cells = expand(plan_for("--preset", "custom", *options, "--gae-lambdas", "0.95", "1", "--estimators", "full_return",
                            "reward_to_go"))  # fmt: skip
    assert len(cells) == 3 * 2 * 2
    for cell in cells:
        config = cell.settings.config
        told = f"8-16 tokens, gae_lambda={config['gae_lambda']:g}, estimator={config['estimator']}"
        assert cell.setting == told
    assert {(cell.method, cell.settings.credit_beta) for cell in cells} == {
        ("sparse", 0.8), ("uniform credit_beta=0.8", 0.8), ("attention shuffled=True sharpness=2", 0.8),
    }  # fmt: skip
    with pytest.raises(ValueError, match="estimator is 'gae'"):
        expand(plan_for("--preset", "custom", *options, "--estimators", "gae"))


def test_critics_are_an_axis():
    options = ["--preset", "custom", "--methods", "sparse", "--seeds", "1", "--critics"]
    cells = expand(plan_for(*options, "slow", "shared", "separate"))
    found = {cell.setting: agent_config(cell.settings, cell.updates) for cell in cells}
    assert {setting: (one.vf_learning_rate, one.value_model) for setting, one in found.items()} == {
        "8-16 tokens, critic=slow": (found["8-16 tokens, critic=slow"].learning_rate, "shared"),
        "8-16 tokens, critic=shared": (3e-3, "shared"),
        "8-16 tokens, critic=separate": (3e-3, "separate"),
    }
    with pytest.raises(StudyError, match=r"critic=shared and .*critic=slow are the same run: .* learn at 0\.003"):
        expand(plan_for(*options, "slow", "shared", "--learning-rate", "0.003"))
    with pytest.raises(StudyError, match="--critics 'random' is none of slow, shared, separate"):
        expand(plan_for(*options, "random"))


def test_the_plan_about_the_rows_content_compares_all_at_one_credit_beta():
    cells = expand(study_plan("content"))
    assert len(cells) == 100
    assert {cell.settings.credit_beta for cell in cells} == {0.8}


@pytest.mark.parametrize(
    "given",
    [
        {"methods": ("shapley:budget=64,credit_beta=0.5", "my_credit.Mine"), "seeds": (1, 2), "gold": "none"},
        {"reward_models": ("a folder/model", "imdb-tiny"), "policy": "it's", "prompts": "p.txt", "align": "offsets"},
        {"credit_betas": (0.0, 0.5), "kl_coefs": (0.1,), "learning_rates": Path("rates.json")},
        {"updates": 3, "num_envs": 4, "eval_every": 2, "eval_samples": 8, "lengths": ("8-16", "20")},
    ],
)
def test_the_recorded_command_is_the_one_that_was_given(given):
    arguments, config = ablate.plan_options("custom", **given), {"dtype": "float32", "anneal_lr": True}
    command = ablate.command_of(arguments, config)
    assert ablate.parse_command(shlex.split(command)[2:]) == (arguments, config)


def test_every_option_is_in_the_recorded_command():
    arguments = ablate.plan_options("custom", methods=("red", "attention"), lengths=("8-15",), jobs=2)
    command = ablate.command_of(arguments, {"kl_coef": 0.1, "kl_target": 3.0})
    words = "--methods red attention --lengths 8-15 --kl-coef 0.1 --kl-target 3.0"
    assert command == f"tokenmdp ablate --preset custom {words}"
    unrecorded = {"preset", "plan", *ablate.UNRECORDED}
    assert unrecorded < {field.name for field in fields(ablate.Ablate)}


def test_the_names_of_the_presets_are_the_command_lines():
    assert set(PLANS) == set(get_args(get_type_hints(ablate.Ablate)["preset"]))
    assert {name for plan in PLANS.values() for name in plan.methods} <= set(CREDIT_METHODS)


def test_a_missing_file_of_rates_and_a_share_that_is_no_number_name_their_option(tmp_path):
    with pytest.raises(StudyError, match=r"--learning-rates .*absent.json cannot be read: No such file"):
        read_rates(tmp_path / "absent.json")
    with pytest.raises(StudyError, match=r"--methods 'attention:credit_beta=x': credit_beta is 'x'"):
        parse_method("attention:credit_beta=x")
