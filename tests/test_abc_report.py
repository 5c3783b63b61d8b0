"""The page of the ABC study: its claims come first, and its verdicts are those of the shipped runs."""

import html as markup
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import abc_report
import pytest
from abc_study.claims import multiplicity
from abc_study.verdicts import verdicts
from study_doubles import figures_not_drawn, synthetic_study

from tokenmdp.study.directory import load_study
from tokenmdp.study.report.critics import explained_variance
from tokenmdp.study.report.parts import typeset
from tokenmdp.study.tables import equal_kl_table, method_table

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "study_results"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A study of every grid, with its report."""
    path = synthetic_study(tmp_path_factory.mktemp("study"), seeds=3, updates=30)
    with figures_not_drawn():
        abc_report.main([str(path)])
    return load_study(path)


@pytest.fixture(scope="module")
def page(full):
    return (full.path / "report" / "index.html").read_text(encoding="utf-8")


def test_the_page_opens_with_the_claims(full, page):
    assert re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', page)[0] == ("claims", "The claims")
    assert "<h1>Dense reward for free: the claims, tried again</h1>" in page
    shown = markup.unescape(page)
    for verdict in verdicts(full):
        for text in (verdict.claim, verdict.paper, verdict.ours, verdict.rule, verdict.where, verdict.refuted):
            assert typeset(text) in shown
    stored = json.loads((full.path / "report" / "verdicts.json").read_text())
    assert [record["claim"] for record in stored] == [verdict.claim for verdict in verdicts(full)]
    assert "## The claims\n\n| claim | paper |" in (full.path / "report" / "tables.md").read_text()


@pytest.mark.parametrize(("directory", "grid"), [("study_results", "imdb"), ("study_second", "critic")])
def test_the_tables_are_recomputed_without_the_library(directory, grid):
    """The script reads the same file with numpy alone; the numbers agree to the digits that the page shows."""
    script = RESULTS.parent / "recompute_study.py"
    imported = {line.split()[1] for line in script.read_text().splitlines() if re.match("(import|from) ", line)}
    assert imported == {"json", "lzma", "pathlib", "numpy", "sys"}
    command = [sys.executable, "-I", str(script), str(RESULTS.parent / directory)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("setting | method | runs | mean | explained | ")
    lines = [line.split(" | ") for line in printed.splitlines()[1:]]
    theirs = {(name, row[1]): row[2:] for row in lines for name in row[0].split(" = ")}
    study = load_study(RESULTS.parent / directory)
    at_equal_kl = {
        tuple(row[:2]): [text.partition(", n=")[0] for text in row[2:]] for row in equal_kl_table(study, grid)
    }
    rows = method_table(study, grid)
    assert not any(row.setting.startswith("all ") for row in rows)  # no mean over several critics
    assert len(rows) >= 6
    lines = [line for line in lines if len(line) > 2]  # the others are of settings without sparse
    for names in {line[0] for line in lines}:  # every method that ran there is printed, and no other
        cells = [result.cell for result in study.results.values() if result.cell.setting in names.split(" = ")]
        ran = {cell.method for cell in cells if cell.updates == 150}  # 250 are those over credit_beta
        assert {line[1] for line in lines if line[0] == names} == ran
    for row in rows:
        ours = [str(row.seeds), f"{row.mean.value:.2f}"]
        if row.method != "sparse":
            ours += [str(row.difference), *at_equal_kl[row.setting, row.method]]
        found = theirs[row.setting, row.method]
        assert found[:2] + found[3:] == ours
        told = explained_variance(study.select(grid)[row.setting, row.method])
        assert found[2] == f"{told.value:.2f}"


@pytest.mark.parametrize("directory", ["study_results", "study_second"])
def test_the_shipped_verdicts_are_those_of_the_shipped_cells(directory):
    place = RESULTS.parent / directory
    stored = json.loads((place / "report" / "verdicts.json").read_text())
    assert json.loads(json.dumps([asdict(verdict) for verdict in verdicts(load_study(place))])) == stored


def test_the_papers_claims_are_counted_and_shown_apart_from_our_own_questions(full, page):
    summary = page[page.index("</h1>") : page.index("<nav>")]
    counts = re.findall(r"(\d+) (claims of the paper|questions of our own): (.*?)\.", summary)
    assert [int(number) for number, *_ in counts] == [11, 9]
    for number, _, kinds in counts:
        assert sum(map(int, re.findall(r"<b>(\d+)</b>", kinds))) == int(number)
    assert "reproduced" in counts[0][2]
    assert "reproduced" not in counts[1][2]
    rows = re.findall(r'<span class="verdict \w+">\S+ (.*?)</span>', page)
    assert set(rows[11:]) <= {"yes", "no", "open"}
    assert "imdb-plain is the same model before that" in summary


def test_the_page_says_how_many_claims_there_are(full, page):
    assert markup.escape(multiplicity(verdicts(full))) in page
