"""The parts of a study's page: each has figures with captions, or says why it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenmdp.report.drawing import name_of
from tokenmdp.report.study_figures import BASELINE, Groups, beta_sweep, learning_curves, length_study
from tokenmdp.report.study_tradeoffs import (
    coefficient,
    diversity,
    faithful_study,
    gold_against_proxy,
    has_evaluations,
    score_against_kl,
)
from tokenmdp.study.claims import MAIN_GRIDS
from tokenmdp.study.outcomes import apart_from, credit_quality, length_of, window_for
from tokenmdp.study.results import CellResult, Study, slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SETTINGS = 4  # of one grid that get learning curves of their own
BAND = "Bands: 95% t interval of the mean over seeds."


@dataclass
class Picture:
    """A figure of the page."""

    name: str  # of its files
    figure: Figure
    title: str  # what it shows, in a line
    caption: str


@dataclass
class Section:
    """A part of the page; without pictures and tables it is only a line that says why."""

    id: str
    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    grids: list[str] = field(default_factory=list)  # whose table of methods follows
    missing: str = ""


def sections(study: Study) -> list[Section]:
    """Every section that has figures, in the page's order."""
    return [
        _curves(study),
        _beta(study),
        _length(study),
        _kl(study),
        _gold(study),
        _quality(study),
        _diversity(study),
    ]


def by_setting(study: Study, grid: str) -> dict[str, dict[str, list[CellResult]]]:
    """Setting -> method -> finished cells."""
    found: dict[str, dict[str, list[CellResult]]] = {}
    for (setting, method), results in study.select(grid).items():
        found.setdefault(setting, {})[method] = results
    return found


def main_grids(study: Study) -> list[str]:
    """The grids of the paper's main comparison that have finished cells, the best first."""
    return [grid for grid in MAIN_GRIDS if study.select(grid)]


def family(settings: Mapping[str, Groups], varied: Sequence[str]) -> dict[str, Groups]:
    """The settings that differ in nothing but ``varied``: the largest such family."""
    families: dict[str, dict[str, Groups]] = {}
    for name, groups in settings.items():
        first = groups.get(BASELINE, next(iter(groups.values())))[0]
        families.setdefault(apart_from(first, varied), {})[name] = groups
    return max(families.values(), key=len, default={})


def seeds_of(groups: Groups) -> str:
    """Such as ``10 seeds`` or ``2 to 3 seeds``."""
    counts = sorted({len(results) for results in groups.values()})
    plural = "" if counts[-1] == 1 else "s"
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{plural}"


def _curves(study: Study) -> Section:
    section = Section(
        "curves",
        "How fast each method learns",
        "The score that the policy is trained on, and the KL that it spends for it. The arrows say after what share of "
        f"{BASELINE}'s steps another method stands where {BASELINE}'s curve is highest.",
        missing="no finished cell of a main grid: tokenmdp ablate --preset imdb, or quick",
    )
    for grid in main_grids(study):
        settings = by_setting(study, grid)
        for setting, groups in list(settings.items())[:MOST_SETTINGS]:
            figure, remarks = learning_curves(groups)
            name = f"curves-{grid}" if len(settings) == 1 else f"curves-{grid}-{slug(setting)}"
            window = window_for(min(len(result.metrics["update"]) for results in groups.values() for result in results))
            caption = (
                f"{seeds_of(groups)}; mean over seeds, as a trailing mean over {window} updates. {BAND}"
                + "".join(f" {remark}." for remark in remarks)
            )
            section.pictures.append(Picture(name, figure, f"grid {grid}, {setting}: learning curves", caption))
        if len(settings) > MOST_SETTINGS:
            section.pictures[
                -1
            ].caption += f" The other {len(settings) - MOST_SETTINGS} settings of the grid are in the table below."
        section.grids.append(grid)
    return section


def _beta(study: Study) -> Section:
    section = Section(
        "beta",
        "Does more of the score on the attended tokens help?",
        "credit_beta is the share of the score that is spread by attention; the rest stays on the last token.",
        missing="needs several values of credit_beta: tokenmdp ablate --preset beta",
    )
    for grid in ("beta", "custom"):
        for setting, groups in by_setting(study, grid).items():
            values: dict[float, str] = {}  # credit_beta -> the first method with it
            for method, results in groups.items():
                if results[0].cell.settings.credit == "attention":
                    values.setdefault(results[0].cell.settings.credit_beta, method)
            swept = {method: groups[method] for method in values.values()}
            if len(swept) < 2:
                continue
            caption = f"{seeds_of(swept)}. {BAND} Right: mean with 95% bootstrap interval."
            name = "beta" if grid == "beta" else f"beta-{slug(setting)}"
            title = f"grid {grid}, {setting}: ABC over credit_beta"
            section.pictures.append(Picture(name, beta_sweep(swept), title, caption))
            if grid not in section.grids:
                section.grids.append(grid)
    return section


def _length(study: Study) -> Section:
    section = Section(
        "length",
        "Does the advantage grow with length?",
        "The longer a response, the further the score at its end is from the tokens that earned it.",
        missing="needs several lengths: tokenmdp ablate --preset length",
    )
    for grid in ("length", "custom", "gpt2"):
        found = family(by_setting(study, grid), ("horizon_range", "min_new_tokens", "max_new_tokens"))
        if len({length_of(next(iter(groups.values()))[0]) for groups in found.values()}) < 2:
            continue
        every = {f"{method} {name}": results for name, groups in found.items() for method, results in groups.items()}
        caption = (
            f"{seeds_of(every)}. {BAND} Below left: mean with 95% bootstrap interval; right: difference to {BASELINE} "
            "under the same seeds with its 95% t interval. Lengths as the paper writes them, without their upper end."
        )
        section.pictures.append(Picture("length", length_study(found), f"grid {grid}: response lengths", caption))
        section.grids.append(grid)
        break
    return section


def _kl(study: Study) -> Section:
    section = Section(
        "kl",
        "Is the score bought with KL?",
        "A method that moves further from the reference has a higher score for that alone. So each method is trained "
        "under several KL coefficients, and compared where it spends the same.",
        missing="needs several fixed KL coefficients: tokenmdp ablate --preset kl",
    )
    for grid in ("kl", "custom"):
        found = family(by_setting(study, grid), ("kl_coef", "kl_target"))
        if len({coefficient(groups) for groups in found.values()}) < 2:
            continue
        every = {f"{method} {name}": results for name, groups in found.items() for method, results in groups.items()}
        last = name_of(list(dict.fromkeys(method for groups in found.values() for method in groups))[-1])
        caption = (
            f"{seeds_of(every)}; means over the last tenth of the updates with 95% bootstrap intervals. The numbers "
            f"beside the points of {last} are the KL coefficients. A point below the front spends more KL than "
            "another for no more score. Right: each seed's points joined by straight lines, the mean difference over "
            "the KL that both methods cover, 95% t interval."
        )
        figure, remarks = score_against_kl(found)
        caption += "".join(f" {remark}." for remark in remarks)
        section.pictures.append(Picture("kl", figure, f"grid {grid}: score against KL", caption))
        section.grids.append(grid)
        break
    return section


def _gold(study: Study) -> Section:
    section = Section(
        "gold",
        "Would another reward model agree?",
        "A second reward model, of another architecture and seed, scores held-out texts and is never trained on. Where "
        "the first score rises and the second falls, the policy exploits the first.",
        missing="needs a second reward model in a main grid: tokenmdp ablate --preset imdb",
    )
    for grid in main_grids(study):
        for setting, groups in by_setting(study, grid).items():
            if not has_evaluations(groups, "gold"):
                continue
            gold = next(iter(groups.values()))[0].cell.gold
            caption = (
                f"{seeds_of(groups)}; second reward model: {gold}. Left: lines as named on the right; an arrowhead "
                f"points on in time. {BAND}"
            )
            title = f"grid {grid}, {setting}: gold against proxy"
            section.pictures.append(Picture(f"gold-{grid}", gold_against_proxy(groups), title, caption))
            return section
    return section


def _quality(study: Study) -> Section:
    section = Section(
        "quality",
        "Does the gain follow the quality of the credit?",
        "Attention credit is as good as the attention that it reads. The same grid on reward models whose attention "
        "follows the score's sources to different degrees, with the measured quality beside each curve.",
        missing="needs two reward models: tokenmdp ablate --preset faithful",
    )
    for grid in ("faithful", "custom"):
        found = family(by_setting(study, grid), ("reward_model",))
        models = {next(iter(groups.values()))[0].cell.settings.reward_model: groups for groups in found.values()}
        if len(models) < 2:
            continue
        figure = faithful_study(models, {model: correlations(study, model, models[model]) for model in models})
        every = {f"{model} {method}": results for model, groups in models.items() for method, results in groups.items()}
        notes = [_row_note(study, model) for model in models]
        caption = (
            f"{seeds_of(every)}. {BAND} Scores of different reward models have different scales. Right: Spearman's "
            "rank correlation of each token's credit with the drop in score when the token is left out, mean over "
            f"texts with 95% bootstrap interval. {' '.join(notes)}"
        )
        section.pictures.append(Picture("quality", figure, f"grid {grid}: credit quality and learning", caption))
        section.grids.append(grid)
        break
    return section


def correlations(study: Study, model: str, groups: Groups) -> dict[str, tuple[float, float, float]]:
    """Method -> rank correlation of its credit with leave-one-out, for the methods that were measured."""
    record = study.quality.get(slug(model), study.quality.get(model, {}))
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
        return f"The attention of {model} was not measured."
    return (
        f"The attention row of {model} is {row['level']}: rank correlation {row['spearman'][0]:.2f} without signs, "
        f"entropy {row['entropy']:.2f} of its maximum."
    )


def _diversity(study: Study) -> Section:
    section = Section(
        "diversity",
        "Do the texts stay varied?",
        "A collapsed policy writes the same few words: distinct-2 falls and self-BLEU rises. Perplexity says how odd "
        "the reference finds the texts; far below its start they are bland, far above they are strange.",
        missing="needs evaluations in a main grid: tokenmdp ablate --preset imdb",
    )
    for grid in main_grids(study):
        for setting, groups in by_setting(study, grid).items():
            if has_evaluations(groups, "distinct_2", "self_bleu", "perplexity"):
                samples = next(iter(groups.values()))[0].cell.eval_samples
                caption = f"{seeds_of(groups)}; {samples} responses to held-out prompts an evaluation. {BAND}"
                title = f"grid {grid}, {setting}: diversity over training"
                section.pictures.append(Picture(f"diversity-{grid}", diversity(groups), title, caption))
                return section
    return section
