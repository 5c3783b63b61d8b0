"""The section about credit quality: whether the gain follows it, and where each method's credit lands."""

from __future__ import annotations

from html import escape

from tokenmdp.evaluation.credit_quality import MethodQuality
from tokenmdp.evaluation.credit_quality.tables import HEADINGS, LEGEND, cost, method_notes
from tokenmdp.intervals import Estimate
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import model_name, name_of, slug
from tokenmdp.study.outcomes import REWARD_MODEL, Groups, credit_quality
from tokenmdp.study.report.answers import quality_answer
from tokenmdp.study.report.parts import (
    Picture,
    Section,
    bands_of,
    caption_remarks,
    families,
    lost_runs,
    number_cell,
    seeds_of,
    updates_of,
)
from tokenmdp.study.report.tradeoffs import faithful_study

AS_MEASURED = (
    "Credit is of each method with its default options and all of the score spread (credit_beta 1), where training may "
    "leave part of it on the last token."
)


def quality_section(study: Study) -> Section:
    """Learning curves beside credit quality where a grid has several reward models, and a table for every one."""
    section = Section(
        "quality",
        "Does the gain follow the quality of the credit?",
        "Attention credit depends on the attention that it reads. So each method's credit is compared with "
        "leave-one-out: the drop in score when a token is left out. The same grid on reward models whose attention "
        "follows the score's sources to different degrees tells whether the gain follows.",
        models=list(study.quality),
        missing="needs several reward models: --reward-models",
    )
    for grid, found, every in families(study, REWARD_MODEL, _reward_model):
        models = {_reward_model(groups): groups for groups in found.values()}
        quality = {model: correlations(study, model, models[model]) for model in models}
        figure, remarks = faithful_study(models, quality)
        remarks += lost_runs({model_name(model): groups for model, groups in models.items()})
        caption = (
            f"{quality_answer(models, quality)} {seeds_of(every)}. {bands_of(every, updates_of(every))} "
            "Scores of different reward models have different scales. Right: "
            "Spearman's rank correlation of each token's credit with the drop in score when the token is left out, "
            "mean over texts with 95% bootstrap interval. Attention credit has the score's sign on every token, so it "
            "agrees better where signs are left out, as in the second column of the tables below. "
            f"{AS_MEASURED}{caption_remarks(remarks)}"
        )
        section.pictures.append(
            Picture(f"quality-{slug(grid)}", figure, f"grid {grid}: credit quality and learning", caption)
        )
        section.grids.append(grid)
    return section


def _reward_model(groups: Groups) -> str:
    return next(iter(groups.values()))[0].cell.settings.reward_model


def quality_table(study: Study, model: str) -> str:
    """The HTML of how each method's credit on a reward model agrees with leave-one-out."""
    headings = ("method", "texts", *HEADINGS.values(), "cost")
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    methods, rows = _measured(study, model), ""
    for method in methods:
        if method.unavailable is None:
            found = (method.metrics.get(metric) for metric in HEADINGS)
            numbers = (number_cell("" if interval is None else str(interval)) for interval in found)
            rows += (
                f'<tr><th scope="row">{escape(name_of(method.name))}</th>{number_cell(str(method.texts))}'
                f"{''.join(numbers)}{number_cell(cost(method))}</tr>"
            )
    said = "".join(f"<p>{escape(note)}</p>" for note in (_row_note(study, model), *method_notes(methods)))
    return (
        f"<details><summary>credit quality on the reward model {escape(model_name(model))}</summary>{said}"
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{escape(" ".join((*LEGEND, AS_MEASURED)))}</p></details>'
    )


def correlations(study: Study, model: str, groups: Groups) -> dict[str, tuple[float, float, float]]:
    """Method -> rank correlation of its credit with leave-one-out, for the methods that were measured."""
    measured = {
        method.name: method.metrics["spearman"] for method in _measured(study, model) if "spearman" in method.metrics
    }
    credits = {method: results[0].cell.settings.credit for method, results in groups.items()}
    return {method: measured[credit] for method, credit in credits.items() if credit in measured}


def _measured(study: Study, model: str) -> list[MethodQuality]:
    """Every method's credit quality on a reward model; none if it was not measured."""
    records = (record for world in study.quality.get(model, {}).get("worlds", ()) for record in world["methods"])
    return [
        MethodQuality(**record | {"metrics": {name: Estimate(*found) for name, found in record["metrics"].items()}})
        for record in records
    ]


def _row_note(study: Study, model: str) -> str:
    row = credit_quality(study, model)
    if row is None:
        return f"{model_name(model)} shows no attention, or too few texts tell how it agrees with leave-one-out."
    return (
        f"The attention row of {model_name(model)} is {row['level']}: rank correlation {row['spearman'][0]:.2f} "
        f"without signs, entropy {row['entropy']:.2f} of its maximum."
    )
