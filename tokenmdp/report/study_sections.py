"""The parts of a study's page: each has figures with captions, or says why it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenmdp.report.drawing import name_of
from tokenmdp.report.study_figures import beta_sweep, diagnostics, learning_curves, length_study
from tokenmdp.report.study_tradeoffs import (
    coefficient,
    diversity,
    faithful_study,
    gold_against_proxy,
    has_evaluations,
    score_against_kl,
)
from tokenmdp.study.claims import FEWEST_SEEDS, MAIN_GRIDS
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import model_name, slug
from tokenmdp.study.outcomes import (
    BASELINE,
    KL_COEF,
    LENGTH,
    REWARD_MODEL,
    Groups,
    by_setting,
    credit_quality,
    family,
    length_of,
    window_for,
)
from tokenmdp.wording import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SETTINGS = 4  # of one grid that get learning curves of their own


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
    """The sections about the figures, in the page's order; one without figures says what it lacks."""
    return [
        _curves(study),
        _beta(study),
        _length(study),
        _kl(study),
        _gold(study),
        _quality(study),
        _diversity(study),
        _diagnostics(study),
    ]


def main_grids(study: Study) -> list[str]:
    """The grids of the paper's main comparison that have finished cells, the best first."""
    return [grid for grid in MAIN_GRIDS if study.select(grid)]


def seeds_of(groups: Groups) -> str:
    """Such as ``10 seeds`` or ``2 to 3 seeds``."""
    counts = sorted({len(results) for results in groups.values()})
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else count(counts[0], "seed")


def bands_of(groups: Groups) -> str:
    """What is drawn around the means of a figure: as `draw_band` does."""
    counts = {len(results) for results in groups.values()}
    parts = ["Bands: 95% t interval of the mean over seeds."] if max(counts) >= FEWEST_SEEDS else []
    parts += ["Faint lines: the two seeds of a method that has no more."] if 2 in counts else []
    return " ".join(parts or ["No bands."])


def told(remarks: Sequence[str]) -> str:
    """Sentences at the end of a caption."""
    return "".join(f" {remark}." for remark in remarks)


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
                f"{seeds_of(groups)}; mean over seeds, as a trailing mean over {window} updates. {bands_of(groups)}"
                + told(remarks)
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
            figure, remarks = beta_sweep(swept)
            caption = f"{seeds_of(swept)}. {bands_of(swept)} Right: mean with its 95% interval.{told(remarks)}"
            name = "beta" if grid == "beta" else f"beta-{slug(setting)}"
            title = f"grid {grid}, {setting}: ABC over credit_beta"
            section.pictures.append(Picture(name, figure, title, caption))
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
        found = family(by_setting(study, grid), LENGTH)
        if len({length_of(next(iter(groups.values()))[0].cell) for groups in found.values()}) < 2:
            continue
        every = {f"{method} {name}": results for name, groups in found.items() for method, results in groups.items()}
        figure, remarks = length_study(found)
        caption = (
            f"{seeds_of(every)}. {bands_of(every)} Below left: mean with its 95% interval; right: difference to "
            f"{BASELINE} under the same seeds with its own. A very wide one leaves the picture. Lengths "
            "as the paper writes them, without their upper end." + told(remarks)
        )
        section.pictures.append(Picture("length", figure, f"grid {grid}: response lengths", caption))
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
        found = family(by_setting(study, grid), KL_COEF)
        if len({coefficient(groups) for groups in found.values()}) < 2:
            continue
        every = {f"{method} {name}": results for name, groups in found.items() for method, results in groups.items()}
        last = name_of(list(dict.fromkeys(method for groups in found.values() for method in groups))[-1])
        caption = (
            f"{seeds_of(every)}; means over the last tenth of the updates with their 95% intervals. The numbers "
            f"beside the points of {last} are the KL coefficients. A point below the front spends more KL than "
            "another for no more score. Right: each seed's points joined by straight lines, the mean difference over "
            "the KL that all seeds of both methods cover, 95% t interval."
        )
        figure, remarks = score_against_kl(found)
        caption += told(remarks)
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
                f"{seeds_of(groups)}; second reward model: {model_name(str(gold))}. Left: lines as named on the "
                f"right; an arrowhead points on in time. {bands_of(groups)}"
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
        found = family(by_setting(study, grid), REWARD_MODEL)
        models = {next(iter(groups.values()))[0].cell.settings.reward_model: groups for groups in found.values()}
        if len(models) < 2:
            continue
        figure, remarks = faithful_study(models, {model: correlations(study, model, models[model]) for model in models})
        every = {f"{model} {method}": results for model, groups in models.items() for method, results in groups.items()}
        notes = [_row_note(study, model) for model in models]
        caption = (
            f"{seeds_of(every)}. {bands_of(every)} Scores of different reward models have different scales. Right: "
            "Spearman's rank correlation of each token's credit with the drop in score when the token is left out, "
            "mean over texts with 95% bootstrap interval, measured with all of the score spread "
            f"(credit_beta 1, where training leaves part of it on the last token). {' '.join(notes)}{told(remarks)}"
        )
        section.pictures.append(Picture("quality", figure, f"grid {grid}: credit quality and learning", caption))
        section.grids.append(grid)
        break
    return section


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
                caption = (
                    f"{seeds_of(groups)}; {samples} responses to held-out prompts an evaluation. {bands_of(groups)}"
                )
                title = f"grid {grid}, {setting}: diversity over training"
                section.pictures.append(Picture(f"diversity-{grid}", diversity(groups), title, caption))
                return section
    return section


def _diagnostics(study: Study) -> Section:
    section = Section(
        "diagnostics",
        "Where would a difference come from?",
        "Training from inside. A policy whose entropy falls early explores no longer; much clipping says that the "
        "learning rate is high for the method; returns that the value head does not explain leave noisy advantages; "
        "attention that is spread evenly makes ABC all but uniform, and without attention on the response it is.",
        missing="no finished cell of a main grid: tokenmdp ablate --preset imdb, or quick",
    )
    for grid in main_grids(study):
        for setting, groups in by_setting(study, grid).items():
            figure, remarks = diagnostics(groups)
            caption = (
                f"{seeds_of(groups)}; trailing means as above. {bands_of(groups)} Attention on the response: the share "
                "of the row that credit is read from; of ABC-D, whose credit averages columns, it may exceed 1."
                + told(remarks)
            )
            title = f"grid {grid}, {setting}: diagnostics over training"
            section.pictures.append(Picture(f"diagnostics-{grid}", figure, title, caption))
            return section
    return section
