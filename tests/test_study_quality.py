"""Credit quality in a study: measured once, kept, and shown with what could not be measured."""

import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from study_doubles import figures_not_drawn, quality_record, synthetic_study

from tokenmdp.cli.study_quality import measure_credit_quality
from tokenmdp.study.directory import declare, load_study
from tokenmdp.study.grid import expand
from tokenmdp.study.presets import PLANS
from tokenmdp.study.report.page import write_report
from tokenmdp.study.report.quality import quality_table
from tokenmdp.study.results import StudyError


def test_credit_quality_is_measured_once_for_each_reward_model(tmp_path):
    plan = replace(PLANS["quick"], methods=("sparse", "attention"), seeds=(1,), gold=None)
    declare(tmp_path, "quick", expand(plan), {})
    console = Console(quiet=True)
    measure_credit_quality(tmp_path, 3, "cpu", console)
    record = load_study(tmp_path).quality["imdb-tiny"]
    (world,) = record["worlds"]
    assert {"reference", "random", "sparse", "attention"} == {method["name"] for method in world["methods"]}
    before = (tmp_path / "quality" / "imdb-tiny.json").stat().st_mtime_ns
    mine = replace(expand(plan)[0], settings=replace(expand(plan)[0].settings, credit="no_such_module.Mine"))
    declare(tmp_path, "custom", [mine], {})  # a class that an earlier command could import
    measure_credit_quality(tmp_path, 2, "cpu", console)
    assert (tmp_path / "quality" / "imdb-tiny.json").stat().st_mtime_ns == before
    given = json.loads((tmp_path / "quality" / "imdb-tiny.json").read_text())["arguments"]
    assert (given["num"], given["credit_beta"]) == (3, 1.0)


def test_credit_quality_on_fewer_texts_does_not_replace_that_on_more(tmp_path):
    methods = ("sparse", "uniform")
    for count, num in ((1, 3), (2, 2)):
        plan = replace(PLANS["quick"], methods=methods[:count], seeds=(1,), gold=None)
        declare(tmp_path, "quick", expand(plan), {})
        measure_credit_quality(tmp_path, num, "cpu", Console(quiet=True))
        given = load_study(tmp_path).quality["imdb-tiny"]["arguments"]
        assert (given["num"], given["methods"]) == (3, list(methods[:count]))


@pytest.fixture
def small(tmp_path):
    """A study with one reward model of known credit quality."""
    return synthetic_study(tmp_path / "study", grids=("quick",), seeds=1, updates=4, quality=("imdb-tiny",))


def test_one_reward_model_has_its_table_without_a_figure(small, tmp_path):
    with figures_not_drawn():
        text = write_report(load_study(small), tmp_path / "report").read_text(encoding="utf-8")
    section = re.search(r'<section id="quality">.*?</section>', text)[0]
    assert "No figure: needs several reward models" in section
    assert "credit quality on the reward model imdb-tiny" in section
    assert "is informative: rank correlation 0.57" in section
    numbers = "<td>0.57<small>[0.53, 0.61]</small></td>" * 5
    assert f'<tr><th scope="row">ABC</th><td>100</td>{numbers}<td>1</td></tr>' in section
    assert '<tr><th scope="row">random</th>' in section
    assert "random: noise" in section


def test_the_table_says_what_was_not_measured(small):
    record = quality_record("imdb-tiny")
    (world,) = record["worlds"]
    by_name = {method["name"]: method for method in world["methods"]}
    by_name["abc-d"] |= {"unavailable": "no <policy>", "metrics": {}}
    by_name["red"] |= {"stopped": "it was slow", "texts": 7}
    by_name["sparse"]["metrics"]["auc"] = [-0.004, -0.02, 0.01]
    del by_name["uniform"]["metrics"]["auc"]
    world["attention"] = None
    html = quality_table(replace(load_study(small), quality={"/home/me/imdb-tiny": record}), "/home/me/imdb-tiny")
    assert "<p>abc-d: not available: no &lt;policy&gt;</p>" in html
    assert "<p>red: the first texts only, because it was slow</p>" in html
    assert '<th scope="row">RED</th><td>7</td>' in html
    assert "ABC-D<" not in html
    assert "<td>0.00<small>[\N{MINUS SIGN}0.02, 0.01]</small></td>" in html
    assert "<td>&ndash;</td>" in html
    assert "<p>imdb-tiny shows no attention, or too few texts tell" in html
    assert "/home" not in html


def test_a_quality_file_of_another_program_is_refused(small):
    file = small / "quality" / "imdb-tiny.json"
    for change in ({"format": "other"}, {"arguments": {}}):
        file.write_text(json.dumps(quality_record("imdb-tiny") | change))
        with pytest.raises(StudyError, match=r"imdb-tiny\.json is damaged .* delete it"):
            load_study(small)
