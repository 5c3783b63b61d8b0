"""Rounds of RLHF: every stage once, nothing twice, the same numbers after an interruption, and the page."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from forked import exit_code, needs_fork
from rich.console import Console

from tokenmdp import cli
from tokenmdp.agents.ppo import PPO
from tokenmdp.agents.reward_model import RewardModelLearner
from tokenmdp.agents.sft import SFT
from tokenmdp.evaluation.policies import Evaluation
from tokenmdp.intervals import Estimate
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.preferences import Annotator, Comparison, read_records
from tokenmdp.report import pipeline_page
from tokenmdp.report.pipeline_figures import learning_curves_figure, reward_models_figure
from tokenmdp.runs import pipeline
from tokenmdp.runs.directory import RunError
from tokenmdp.runs.held_out import report_held_out
from tokenmdp.runs.pipeline import PipelineSettings, rlhf
from tokenmdp.runs.pipeline_report import elo, reward_model_line, summary


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small language model that reads the bundled tokenizer, and prompts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    place, tokenizer = tmp_path_factory.mktemp("rlhf"), load_tokenizer("imdb-tiny")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(place / "policy")
    tokenizer.save_pretrained(place / "policy")
    (place / "prompts.txt").write_text("\n".join(f"The film number {number} is" for number in range(25)))
    (place / "texts.jsonl").write_text('{"text": "A great film."}\n{"text": "A dull film."}\n')
    return place


def settings(place, **changes):
    small = {"rounds": 2, "pairs_per_round": 24, "updates": 1, "eval_samples": 4, "max_new_tokens": 3}
    own = {"policy": str(place / "policy"), "judge": "imdb-gold", "prompts": str(place / "prompts.txt")}
    return PipelineSettings(**(own | small | changes))


def run(place, out, **changes):
    return rlhf(settings(place, **changes), out, Console(quiet=True))


def numbers(out):
    """Everything that the stages say, without times."""
    files = sorted(path.relative_to(out) for path in out.rglob("*.json*") if path.name in ("judged.json", "start.json"))
    pairs = {str(path.relative_to(out)): path.read_bytes() for path in out.glob("round-*/*.jsonl")}
    return {str(path): json.loads((out / path).read_text()) for path in files}, pairs


@pytest.fixture(scope="module")
def whole(place):
    """A pipeline that nobody interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        stages = run(place, place / "whole", demonstrations=str(place / "texts.jsonl"))
    return place / "whole", stages


def test_every_round_adds_its_comparisons_and_a_policy(whole):
    out, stages = whole
    assert [stage.name for stage in stages] == ["start", "round 1", "round 2"]
    assert stages[0].policy == str(out / "sft" / "checkpoint")
    first, second = (read_records(out / f"round-{number}" / "comparisons.jsonl") for number in (1, 2))
    assert second[: len(first)] == first
    assert len(second) == len(first) + len(read_records(out / "round-2" / "pairs.jsonl"))
    for stage in stages[1:]:
        record = json.loads((out / stage.name.replace(" ", "-") / "policy" / "run.json").read_text())["settings"]
        assert record["policy"] == record["reference"] == stages[0].policy  # start sft, reference fixed
        assert record["reward_model"].startswith(str(out / stage.name.replace(" ", "-")))
        assert len(stage.evaluation.scores) == len(stage.evaluation.gold) == 4
    assert stages[0].evaluation.kls == pytest.approx([0.0] * 4, abs=1e-5)  # the cache rounds otherwise
    assert stages[1].evaluation.kls != stages[2].evaluation.kls


def test_a_finished_pipeline_does_nothing_again(whole, place, monkeypatch):
    out, stages = whole
    before = numbers(out)
    monkeypatch.setattr(pipeline.training, "train", lambda *_: pytest.fail("trained again"))
    again = run(place, out, demonstrations=str(place / "texts.jsonl"))
    assert [stage.evaluation for stage in again] == [stage.evaluation for stage in stages]
    assert numbers(out) == before


def die_after(owner, name, calls):
    """SIGKILL once ``name`` was called so often: its work is done, and not saved yet."""
    real, left = getattr(owner, name), [calls]

    def replacement(*arguments, **options):
        found = real(*arguments, **options)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, replacement)


def run_and_die(place, out, owner, name, calls):
    die_after(owner, name, calls)
    run(place, out, demonstrations=str(place / "texts.jsonl"))


@needs_fork
def test_kills_in_every_stage_change_no_number(whole, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deaths = (
        (SFT, "update", 1), (pipeline, "evaluate", 1), (Annotator, "judge", 1), (RewardModelLearner, "update", 1),
        (PPO, "update", 1), (pipeline, "evaluate", 1), (Annotator, "judge", 1), (RewardModelLearner, "update", 2),
        (pipeline.training, "train", 2), (pipeline, "save_evaluation", 1),
    )  # fmt: skip
    for death in deaths:  # the stages of the first round, then those of the second
        assert exit_code(run_and_die, place, tmp_path / "cut", *death) == -signal.SIGKILL, death
    run(place, tmp_path / "cut", demonstrations=str(place / "texts.jsonl"))
    assert numbers(tmp_path / "cut") == numbers(whole[0])


def test_a_moved_reference_and_dpo(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = run(place, tmp_path / "dpo", algorithm="dpo", reference="moved", start="last")
    assert not list((tmp_path / "dpo").glob("round-*/reward-model"))
    record = json.loads((tmp_path / "dpo" / "round-2" / "policy" / "run.json").read_text())["settings"]
    assert record["reference"] == record["policy"] == stages[1].policy
    assert record["data"] == str(tmp_path / "dpo" / "round-2" / "comparisons.jsonl")
    assert "held_out" not in record  # all comparisons teach, and earlier pipelines go on
    assert not stages[1].evaluation.gold
    shown = summary(settings(place, algorithm="dpo", reference="moved", start="last"), tmp_path / "dpo", stages)
    assert shown.policies[1].links[0][0] == "the run of this policy"
    assert [(one.stage, one.round, *one.metrics) for one in shown.curves] == [
        ("policy", number, "loss", "accuracy") for number in (1, 2)
    ]
    assert pipeline_page.write_page(tmp_path, shown).read_text().count("<svg") == 2


class Certain:
    """Prefers the longer response, by 2."""

    coin_flips = 0.0

    def score_pairs(self, pairs):
        return torch.tensor([[2.0, 0.0] if len(pair.chosen) > len(pair.rejected) else [0.0, 2.0] for pair in pairs])


def test_a_reward_models_calibration_goes_to_the_page(tmp_path):
    texts = " great", " bad"
    pairs = [
        Comparison(
            prompt="a film", chosen=texts[flipped], rejected=texts[not flipped], prompt_ids=(1,), chosen_ids=(2,),
            rejected_ids=(3,),
        )
        for flipped in (number % 4 == 0 for number in range(80))
    ]  # fmt: skip
    record, files = report_held_out(Certain(), pairs, tmp_path, Console(quiet=True))
    assert files == [("calibration", tmp_path / "calibration.png")]
    model = reward_model_line(1, json.loads(json.dumps(record)), 80)
    assert [one.pairs for one in model.calibration] == [10] * 8
    assert model.calibration[0].predicted == pytest.approx(1 / (1 + math.exp(-2)))
    assert 0.7 <= np.mean([one.observed.value for one in model.calibration]) <= 0.8
    left, right = reward_models_figure([model]).axes
    assert left.get_title() == right.get_title() == ""
    assert right.get_legend_handles_labels()[1] == ["calibrated", "round 1"]
    assert len(reward_models_figure([model._replace(calibration=[])]).axes) == 1, "too few held-out pairs"


def test_other_settings_and_other_files_are_refused(whole, place, tmp_path):
    with pytest.raises(pipeline.RunError, match="pairs_per_round is 24, asked 25"):
        run(place, whole[0], pairs_per_round=25, demonstrations=str(place / "texts.jsonl"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(pipeline.RunError, match=r"holds notes.txt but no pipeline.json"):
        run(place, tmp_path)
    with pytest.raises(ValueError, match="trains no policy on preferences"):
        settings(place, algorithm="sft")


def test_a_pipeline_of_other_presets_is_refused(place, tmp_path):
    """Those of an earlier version: what the preset sets of the policy's algorithm is on record."""
    record = pipeline.check(settings(place), tmp_path)
    assert record["settings"]["config"]["kl_coef"] == 0.45
    record["settings"]["config"]["kl_coef"] = 0.3
    (tmp_path / "pipeline.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"other settings \(config.kl_coef is 0.3, asked 0.45\); choose another --out"):
        pipeline.check(settings(place), tmp_path)


def test_elo_is_that_of_the_mean_chance():
    one, other = (Evaluation(scores, [], [], []) for scores in ([2.0, 0.0], [0.0, 0.0]))
    chance = (1 / (1 + math.exp(-2)) + 0.5) / 2
    assert elo(one, other).value == pytest.approx(400 * math.log10(chance / (1 - chance)))
    assert elo(other, one).value == pytest.approx(-elo(one, other).value)


def test_the_page_shows_every_policy_and_escapes_what_it_shows(whole, place, tmp_path):
    shown = summary(settings(place, demonstrations=str(place / "texts.jsonl")), *whole)
    assert shown.policies[1].links == [("texts tinted by credit", "../round-1/policy/report/samples.html")]
    assert [one.comparisons for one in shown.reward_models] == [24, 48]
    odd = shown.policies[0]._replace(name="<b>odd</b>", links=[("a & b", '"x"')])
    page = pipeline_page.write_page(tmp_path, shown._replace(policies=[odd, *shown.policies[1:]])).read_text()
    assert "<b>odd</b>" not in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    assert "a &amp; b" in page
    assert page.count("<svg") == 3
    assert [(one.stage, one.round, *one.metrics) for one in shown.curves] == [
        ("SFT", 0, "loss"),
        *((what, number, *metrics) for number in (1, 2)
          for what, metrics in (("reward model", ["loss"]), ("policy", ["score_mean", "kl"]))),
    ]  # fmt: skip
    figure = learning_curves_figure(shown.curves)
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.axison] == [
        "SFT",
        "reward model",
        *["policy"] * 2,
    ]
    assert [len(axes.get_legend_handles_labels()[1]) for axes in figure.axes] == [1, 2, 2, 2, 0, 0]
    assert str(Estimate(*shown.policies[1].gold)) in page
    assert (tmp_path / "report" / "policies.png").exists()


def test_the_command_prints_the_table_and_writes_the_page(whole, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    flags = ["--policy", "policy", "--prompts", "prompts.txt", "--demonstrations", "texts.jsonl", "--rounds", "2",
             "--pairs-per-round", "24", "--updates", "1", "--eval-samples", "4", "--max-new-tokens", "3"]  # fmt: skip
    assert cli.main(["rlhf", *flags, "--out", "whole"]) == 0
    printed = capsys.readouterr().out
    assert "round 2" in printed
    assert (place / "whole" / "report" / "index.html").exists()
    assert cli.main(["rlhf", *flags, "--algorithm", "rloo", "--out", "whole"]) == 2
    assert "algorithm is 'ppo', asked 'rloo'" in capsys.readouterr().err
