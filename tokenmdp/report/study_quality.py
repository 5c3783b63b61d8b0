"""The section about credit quality: whether the gain follows it, and where each method's credit lands."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tokenmdp.report.drawing import name_of
from tokenmdp.report.quality import HEADINGS, LEGEND, cost_of
from tokenmdp.report.study_parts import Picture, Section, bands_of, seeds_of, told
from tokenmdp.report.study_tradeoffs import faithful_study
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import model_name
from tokenmdp.study.outcomes import REWARD_MODEL, Groups, by_setting, credit_quality, family

AS_MEASURED = (
    "measured with all of the score spread (credit_beta 1), where training leaves part of it on the last token"
)


def quality_section(study: Study) -> Section:
    """Learning curves beside credit quality where a grid has several reward models, and a table for every one."""
    section = Section(
        "quality",
        "Does the gain follow the quality of the credit?",
        "Attention credit is as good as the attention that it reads. So each method's credit is compared with "
        "leave-one-out: the drop in score when a token is left out. The same grid on reward models whose attention "
        "follows the score's sources to different degrees tells whether the gain follows.",
        models=list(study.quality),
        missing="needs two reward models: tokenmdp ablate --preset faithful",
    )
    for grid in ("faithful", "custom"):
        found = family(by_setting(study, grid), REWARD_MODEL)
        models = {next(iter(groups.values()))[0].cell.settings.reward_model: groups for groups in found.values()}
        if len(models) < 2:
            continue
        figure, remarks = faithful_study(models, {model: correlations(study, model, models[model]) for model in models})
        every = {f"{model} {method}": results for model, groups in models.items() for method, results in groups.items()}
        caption = (
            f"{seeds_of(every)}. {bands_of(every)} Scores of different reward models have different scales. Right: "
            "Spearman's rank correlation of each token's credit with the drop in score when the token is left out, "
            f"mean over texts with 95% bootstrap interval, {AS_MEASURED}.{told(remarks)}"
        )
        section.pictures.append(Picture("quality", figure, f"grid {grid}: credit quality and learning", caption))
        section.grids.append(grid)
        break
    return section


def quality_table(study: Study, model: str) -> str:
    """The HTML of how each method's credit on a reward model agrees with leave-one-out."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in ("credit", *HEADINGS.values(), "cost"))
    rows = ""
    for world in study.quality[model]["worlds"]:
        for method in world["methods"]:
            if method["unavailable"] is None and method["name"] != "reference":
                cost = cost_of(method["reward_forwards"], method["policy_forwards"])
                cells = "".join(_estimate(method["metrics"].get(metric)) for metric in HEADINGS)
                name = name_of(method["name"])
                rows += f'<tr><th scope="row">{escape(name)}</th>{cells}<td>{escape(cost)}</td></tr>'
    legend = " ".join((*LEGEND[:5], f"Credit is {AS_MEASURED}."))
    return (
        f"<details><summary>credit quality on the reward model {escape(model_name(model))}</summary>"
        f"<p>{escape(_row_note(study, model))}</p>"
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{escape(legend)}</p></details>'
    )


def _estimate(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "<td>&ndash;</td>"
    mean, low, high = (f"{value + 0.0:.2f}".replace("-", "\N{MINUS SIGN}") for value in interval)
    return f"<td>{mean}<small>[{low}, {high}]</small></td>"


def correlations(study: Study, model: str, groups: Groups) -> dict[str, tuple[float, float, float]]:
    """Method -> rank correlation of its credit with leave-one-out, for the methods that were measured."""
    record = study.quality.get(model, {})
    measured = {
        method["name"]: tuple(method["metrics"]["spearman"])
        for world in record.get("worlds", ())
        for method in world["methods"]
        if "spearman" in method["metrics"]
    }
    credits = {method: results[0].cell.settings.credit for method, results in groups.items()}
    return {method: measured[credit] for method, credit in credits.items() if credit in measured}


def _row_note(study: Study, model: str) -> str:
    row = credit_quality(study, model)
    if row is None:
        return f"The attention of {model_name(model)} was not measured."
    return (
        f"The attention row of {model_name(model)} is {row['level']}: rank correlation {row['spearman'][0]:.2f} "
        f"without signs, entropy {row['entropy']:.2f} of its maximum."
    )
