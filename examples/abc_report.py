"""The claims of the ABC paper, judged on a study: its page with the claims first, and the verdicts as JSON.

    tokenmdp ablate --plan examples/abc_study/imdb.json --out runs/study      # beta, length, kl, faithful: as well
    python examples/abc_report.py runs/study                                  # writes runs/study/report
    python examples/abc_report.py docs/study_results                          # of the first edition, which is shipped

The paper is Chan, Sun, Holt and van der Schaar, "Dense reward for free in RLHF" (ICML 2024).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from abc_study.claims import (
    INCONCLUSIVE,
    NOT_MEASURED,
    NOT_REPRODUCED,
    REPRODUCED,
    Verdict,
    corrected,
    multiplicity,
    p_text,
)
from abc_study.verdicts import verdicts

from tokenmdp.files import write_text
from tokenmdp.study.directory import Study, load_study
from tokenmdp.study.labels import model_name
from tokenmdp.study.report.page import write_report
from tokenmdp.study.report.parts import Section, typeset
from tokenmdp.study.tables import markdown

TITLE = "Dense reward for free: the claims, tried again"
VERDICT_HEADINGS = ("claim", "paper", "ours", "95% interval", "p", "p (Holm)", "verdict", "refuted if", "where", "rule")
MARKS = {REPRODUCED: "✓", NOT_REPRODUCED: "✗", INCONCLUSIVE: "?", NOT_MEASURED: "\N{EN DASH}"}
ANSWERS = {REPRODUCED: "yes", NOT_REPRODUCED: "no", INCONCLUSIVE: "open", NOT_MEASURED: NOT_MEASURED}
CLASSES = {REPRODUCED: "yes", NOT_REPRODUCED: "no", INCONCLUSIVE: "open", NOT_MEASURED: "none"}
ABOUT = {  # a bundled model -> what its results depend on
    "imdb-tiny": "The reward model imdb-tiny was trained, after its scores, to attend to the tokens that the score "
    "hangs on (leave-one-out). imdb-plain is the same model before that. imdb-gold, the second reward model, has "
    "another architecture and seed, but was trained on the same labels.",
}
STYLE = """<style>
:root { --yes: #005f94; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --yes: #7cc4f2; } }
:root[data-theme=dark] { --yes: #7cc4f2; }
.claims small { display: block; color: var(--faint); }
.claims { min-width: 48rem; } .claims tbody th { width: 20%; } .claims td:last-child { width: 22%; }
.claims details { margin: .1rem 0 0; font-size: .78rem; }
.interval { white-space: nowrap; }
.verdict { white-space: nowrap; font-weight: 600; }
.yes { color: var(--yes); } .no { color: var(--no); } .open, .none { color: var(--faint); }
.none { font-weight: 400; }
</style>"""


def main(arguments: list[str] | None = None) -> None:
    """Write the report of the study that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="directory of `tokenmdp ablate --out`")
    parser.add_argument("--out", type=Path, help="default: STUDY/report")
    args = parser.parse_args(arguments)
    print(report(load_study(args.study), args.out or args.study / "report"))


def report(study: Study, out: Path) -> Path:
    """Write the page, the tables and ``verdicts.json``; returns the page."""
    decided = verdicts(study)
    write_text(out / "verdicts.json", json.dumps([asdict(verdict) for verdict in decided], indent=1) + "\n")
    table = markdown(VERDICT_HEADINGS, map(verdict_texts, decided, corrected(decided)))
    section = Section("claims", "The claims", html=STYLE + _claims(decided), markdown=table)
    return write_report(study, out, title=TITLE, intro=_summary(study, decided), first=[section])


def verdict_texts(verdict: Verdict, holm: float | None) -> tuple[str, ...]:
    """A verdict as the texts under `VERDICT_HEADINGS`."""
    return (
        verdict.claim,
        verdict.paper,
        verdict.ours,
        verdict.interval,
        p_text(verdict.p),
        p_text(holm),
        verdict.verdict,
        verdict.refuted,
        verdict.where,
        verdict.rule,
    )


def _summary(study: Study, decided: Sequence[Verdict]) -> str:
    used = (name for cell in study.cells.values() for name in (cell.settings.policy, cell.settings.reward_model))
    models = [model_name(name) for name in dict.fromkeys(used)]
    return (
        "<p>Chan et al. (ICML 2024) spread a reward model's score over the tokens by the model's own attention (ABC: "
        "attention-based credit) and report faster and steadier learning than with the score at the last token "
        "(sparse) or in equal parts (uniform). ABC-D and ABC-D2 read the policy's attention instead. RED, which is not "
        "in the paper, pays each token the change of the score of the text so far. Here is what became of their claims "
        f"on the models {escape(', '.join(models))}, with questions that they left open. {_counted(decided)}</p>"
        f"{''.join(f'<p>{escape(note)}</p>' for model, note in ABOUT.items() if model in models)}"
    )


def _counted(decided: Sequence[Verdict]) -> str:
    parts = []
    for own, what in ((False, "claims of the paper"), (True, "questions of our own")):
        asked = sorted((verdict for verdict in decided if verdict.own == own), key=_rank)
        counts = Counter(map(_answer, asked))
        parts.append(f"{len(asked)} {what}: {', '.join(f'<b>{number}</b> {kind}' for kind, number in counts.items())}.")
    return " ".join(parts)


def _rank(verdict: Verdict) -> int:
    return list(MARKS).index(verdict.verdict)


def _answer(verdict: Verdict) -> str:
    """The verdict as the page has it: a question is answered, not reproduced."""
    return ANSWERS[verdict.verdict] if verdict.own else verdict.verdict


def _claims(decided: Sequence[Verdict]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(verdict.claim)}</th>'
        f'<td><span class="verdict {CLASSES[verdict.verdict]}">{MARKS[verdict.verdict]} {_answer(verdict)}</span></td>'
        f"<td>{escape(typeset(verdict.ours)) or '&ndash;'}<details><summary>{escape(verdict.where) or 'why'}</summary>"
        f'{escape(typeset(verdict.rule))}{_refuted(verdict)}</details></td><td class="interval">'
        f"{escape(typeset(verdict.interval)).replace('; ', '<br>') or '&ndash;'}</td>"
        f'<td class="interval">{p_text(verdict.p) or "&ndash;"}<br>{p_text(holm)}</td>'
        f"<td>{escape(typeset(verdict.paper))}</td></tr>"
        for verdict, holm in sorted(zip(decided, corrected(decided), strict=True), key=lambda pair: pair[0].own)
    )
    return (
        "<p>A claim is reproduced if the whole 95% interval lies on its side, not reproduced (refuted) if all of "
        "it lies on the other, else inconclusive. Open the small line below a number to read what was measured, how it "
        "was decided and what would refute the claim. The first claim is the primary one, over the paper's own window: "
        "its own p counts. It was declared so after the first edition's runs had been seen, and before those of the "
        "second. Seeds vary the prompts and the noise around one policy and one reward model, so the intervals say "
        "nothing about other models. The paper's scores are of another reward model: compare signs and orders, "
        f"not sizes. Questions that are not the paper's come last. {escape(multiplicity(decided))}</p>"
        '<div class="scroll"><table class="claims"><thead><tr>'
        '<th scope="col">claim</th><th scope="col">verdict</th><th scope="col">here</th>'
        '<th scope="col">95% interval</th><th scope="col">p, and Holm\'s</th><th scope="col">the paper</th>'
        "</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _refuted(verdict: Verdict) -> str:
    return f"; refuted if {escape(typeset(verdict.refuted))}" if verdict.refuted else ""


if __name__ == "__main__":
    main()
