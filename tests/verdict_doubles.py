"""Studies in memory whose courses are formulas, and the verdict on one claim."""

from dataclasses import replace
from pathlib import Path

import pytest
from abc_study.verdicts import verdicts
from study_doubles import Course, make_result, quality_record

from tokenmdp.study.directory import Study

OUTCOMES = {"reproduced": 1.0, "not reproduced": -1.0, "inconclusive": None}


def study_of(cells, course, grid="imdb", quality=("imdb-tiny", "imdb-plain"), crashed=lambda cell: False):
    """A study of one grid in memory."""
    results = {cell.id: make_result(cell, course(cell)) for cell in cells if not crashed(cell)}
    return Study(
        Path("study"),
        {grid: [cell.id for cell in cells]},
        {cell.id: cell for cell in cells},
        results,
        {cell.id: "RuntimeError: probabilities are nan" for cell in cells if crashed(cell)},
        {model: quality_record(model) for model in quality},
    )


def without(study, keep):
    """The study with only those results whose cell passes."""
    return replace(study, results={id: result for id, result in study.results.items() if keep(result.cell)})


def verdict_on(study, claim):
    """The one verdict on a claim."""
    (found,) = (verdict for verdict in verdicts(study) if verdict.claim == claim)
    return found


def effect(outcome, cell):
    """On the claim's side, on the other, or on either by seed."""
    return OUTCOMES[outcome] or (-1.0) ** cell.seed


def quiet(**course):
    return Course(**({"noise": 0.05, "spread": 0.02} | course))


def check(study, claim, outcome):
    verdict = verdict_on(study, claim)
    assert verdict.verdict == outcome, verdict
    assert verdict.ours
    assert verdict.interval
    assert "seeds" in verdict.where
    return verdict


every_outcome = pytest.mark.parametrize("outcome", OUTCOMES)
