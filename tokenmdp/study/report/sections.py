"""The parts of a study's page: each has figures with captions, or says why it has none."""

from __future__ import annotations

from collections.abc import Collection

from tokenmdp.study.directory import Study
from tokenmdp.study.labels import model_name, name_of, slug
from tokenmdp.study.outcomes import (
    BASELINE,
    KL_COEF,
    LENGTH,
    by_setting,
    last_tenth,
    length_of,
    window_for,
)
from tokenmdp.study.report.answers import (
    change_answer,
    growth_answer,
    leads_answer,
    sorted_by_sign,
    trend_answer,
)
from tokenmdp.study.report.critics import critic_section
from tokenmdp.study.report.figures import beta_sweep, diagnostics, learning_curves, length_study
from tokenmdp.study.report.parts import (
    Picture,
    Section,
    bands_of,
    caption_remarks,
    compared_grids,
    families,
    first_setting,
    lost_runs,
    main_grids,
    seeds_of,
    updates_of,
)
from tokenmdp.study.report.quality import quality_section
from tokenmdp.study.report.tradeoffs import (
    coefficient,
    diversity,
    gold_against_kl,
    score_against_kl,
)

MOST_SETTINGS = 4  # of one grid that get learning curves of their own


def sections(study: Study) -> list[Section]:
    """The sections about the figures, in the page's order; one without figures says what it lacks."""
    return [
        _curves(study),
        _beta(study),
        _length(study),
        _kl(study),
        critic_section(study),
        _gold(study),
        quality_section(study),
        _diversity(study),
        _diagnostics(study),
    ]


def _curves(study: Study) -> Section:
    section = Section(
        "curves",
        "How fast each method learns",
        "The score that the policy is trained on, and the KL that it spends for it.",
        missing="no run has finished",
    )
    for grid in main_grids(study):
        settings = by_setting(study, grid)
        for setting, groups in list(settings.items())[:MOST_SETTINGS]:
            figure, remarks = learning_curves(groups)
            updates = updates_of(groups)
            caption = (
                f"{leads_answer(groups, 'Mean score over training')} {seeds_of(groups)}; trailing means over "
                f"{window_for(updates)} updates. {bands_of(groups, updates)}"
                + caption_remarks([*remarks, *lost_runs({"": groups})])
            )
            section.pictures.append(
                Picture(
                    _name("curves", grid, setting, settings),
                    figure,
                    f"grid {grid}, {setting}: learning curves",
                    caption,
                )
            )
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
        missing="needs attention credit at several values of credit_beta: --credit-betas",
    )
    for grid in compared_grids(study):
        settings = by_setting(study, grid)
        for setting, groups in settings.items():
            values: dict[float, str] = {}  # credit_beta -> the first method with it
            for method, results in groups.items():
                if results[0].cell.settings.credit == "attention":
                    values.setdefault(results[0].cell.settings.credit_beta, method)
            swept = {method: groups[method] for method in values.values()}
            if len(swept) < 2:
                continue
            figure, remarks = beta_sweep(swept)
            caption = (
                f"{trend_answer(swept)} {seeds_of(swept)}. {bands_of(swept, updates_of(swept))} Right: mean with its "
                f"95% interval.{caption_remarks([*remarks, *lost_runs({'': swept})])}"
            )
            title = f"grid {grid}, {setting}: ABC over credit_beta"
            section.pictures.append(Picture(_name("beta", grid, setting, settings), figure, title, caption))
            if grid not in section.grids:
                section.grids.append(grid)
    return section


def _name(kind: str, grid: str, setting: str, settings: Collection[str]) -> str:
    """The name of a figure's files: with the setting, if the grid has several."""
    return f"{kind}-{slug(grid)}" + (f"-{slug(setting)}" if len(settings) > 1 else "")


def _length(study: Study) -> Section:
    section = Section(
        "length",
        "Does the advantage grow with length?",
        "The longer a response, the further the score at its end is from the tokens that earned it.",
        missing="needs several lengths: --lengths",
    )
    for grid, found, every in families(study, LENGTH, lambda groups: length_of(next(iter(groups.values()))[0].cell)):
        figure, remarks = length_study(found)
        shortest, *_, longest = sorted(found, key=lambda name: length_of(next(iter(found[name].values()))[0].cell))
        caption = (
            f"{growth_answer(found, shortest, longest)} {seeds_of(every)}. {bands_of(every, updates_of(every))} Below "
            f"left: mean with its 95% interval; right: difference to {BASELINE} under the same seeds with its own. A "
            "very wide one leaves the picture. Lengths are written without their upper end: 8-16 is 8 to 15 tokens."
            + caption_remarks([*remarks, *lost_runs(found)])
        )
        section.pictures.append(Picture(f"length-{slug(grid)}", figure, f"grid {grid}: response lengths", caption))
        section.grids.append(grid)
    return section


def _kl(study: Study) -> Section:
    section = Section(
        "kl",
        "Is the score bought with KL?",
        "A method that moves further from the reference has a higher score for that alone. So each method is trained "
        "under several KL coefficients, and compared where it spends the same.",
        missing="needs several fixed KL coefficients: --kl-coefs",
    )
    for grid, found, every in families(study, KL_COEF, coefficient):
        last = name_of(list(dict.fromkeys(method for groups in found.values() for method in groups))[-1])
        figure, remarks, leads = score_against_kl(found)
        answer = sorted_by_sign(leads, "more with", "less with") if leads else "nothing can be compared"
        caption = (
            f"Score at equal KL: {answer}. {seeds_of(every)}; means over the last tenth of the updates with their 95% "
            "intervals. The numbers "
            f"beside the points of {last} are the KL coefficients. A point below the front spends more KL than "
            "another for no more score. Right: each seed's points joined by straight lines, the mean difference over "
            "the KL that all seeds of both methods cover, 95% t interval, not corrected for the number of pairs."
        )
        caption += caption_remarks(remarks)
        section.pictures.append(Picture(f"kl-{slug(grid)}", figure, f"grid {grid}: score against KL", caption))
        section.grids.append(grid)
    return section


def _gold(study: Study) -> Section:
    section = Section(
        "gold",
        "Would another reward model agree?",
        "A second reward model scores held-out texts; no policy is trained on it. Where the first score rises and the "
        "second falls, the policy exploits the first.",
        missing="needs a second reward model: --gold",
    )
    if found := first_setting(study, "gold", "kl"):
        grid, setting, groups = found
        gold = next(iter(groups.values()))[0].cell.gold
        figure, remarks = gold_against_kl(groups)
        caption = (
            f"{change_answer(groups, 'gold', 'the second score', since=2 / 3)} {seeds_of(groups)}; second reward "
            f"model: {model_name(str(gold))}. Left and middle: KL and score on held-out prompts from the first "
            "evaluation after the start to the last, means over runs; bar at the end: 95% interval of the mean score. "
            "Where the left score rises and the middle one falls with more KL, the policy over-optimises. "
            f"{bands_of(groups)}{caption_remarks(remarks)}"
        )
        title = f"grid {grid}, {setting}: both scores against the root of the KL"
        section.pictures.append(Picture(f"gold-{slug(grid)}", figure, title, caption))
    return section


def _diversity(study: Study) -> Section:
    section = Section(
        "diversity",
        "Do the texts stay varied?",
        "A collapsed policy writes the same few words: distinct-2 falls and self-BLEU rises. Perplexity says how odd "
        "the reference finds the texts; far below its start they are bland, far above they are strange.",
        missing="no run has evaluated its texts",
    )
    if found := first_setting(study, "distinct_2", "self_bleu", "perplexity"):
        grid, setting, groups = found
        samples = next(iter(groups.values()))[0].cell.eval_samples
        caption = (
            f"{change_answer(groups, 'distinct_2', 'distinct-2')} {seeds_of(groups)}; {samples} responses to held-out "
            f"prompts in each evaluation. {bands_of(groups)}"
        )
        title = f"grid {grid}, {setting}: diversity over training"
        section.pictures.append(Picture(f"diversity-{slug(grid)}", diversity(groups), title, caption))
    return section


def _diagnostics(study: Study) -> Section:
    section = Section(
        "diagnostics",
        "Where would a difference come from?",
        "Training from inside. A policy whose entropy falls early explores no longer; much clipping says that the "
        "learning rate is high for the method; returns that the critic does not explain leave noisy advantages, "
        "but methods differ in that by themselves, since sparse's return is the same at every token; attention that is "
        "spread evenly makes ABC all but uniform, and with none on the response it is uniform.",
        missing="no run has finished",
    )
    if found := first_setting(study):
        grid, setting, groups = found
        figure, remarks = diagnostics(groups)
        caption = (
            f"{leads_answer(groups, 'Entropy in the last tenth', lambda result: last_tenth(result, 'entropy'))} "
            f"{seeds_of(groups)}; trailing means as above. {bands_of(groups, updates_of(groups))} "
            "Attention on the response: the share of the row that credit is read from; of ABC-D, whose credit averages "
            "columns, it may exceed 1." + caption_remarks(remarks)
        )
        title = f"grid {grid}, {setting}: diagnostics over training"
        section.pictures.append(Picture(f"diagnostics-{slug(grid)}", figure, title, caption))
    return section
