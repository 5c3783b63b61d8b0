"""Credit quality on the reward models of a study, measured once for its report."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from gymnasium.error import Error as GymnasiumError
from rich.console import Console

from tokenmdp.cli.quality import Quality, measured
from tokenmdp.credit import CREDIT_METHODS
from tokenmdp.evaluation.credit_quality import tables as quality_report
from tokenmdp.files import write_text
from tokenmdp.runs.settings import TOY_POLICY
from tokenmdp.study.directory import load_study, quality_file
from tokenmdp.study.grid import register
from tokenmdp.study.results import StudyError


def measure_credit_quality(out: Path, num: int, device: str, console: Console) -> None:
    """Where credit lands, for each method on each reward model of the study; measured once on ``num`` texts or more.

    A study of the toy policy has none: that policy is made in code and writes no words.
    """
    study = load_study(out)
    # Reward model -> policy that writes the texts, which output is the score, credit methods.
    methods: dict[str, tuple[str, str | None, set[str]]] = {}
    for cell in study.cells.values():
        if cell.settings.policy != TOY_POLICY:
            settings = cell.settings
            *_, names = methods.setdefault(settings.reward_model, (settings.policy, settings.score, set()))
            names.add(settings.credit)
    for reward_model, (policy, score, names) in methods.items():
        for name in names:
            with contextlib.suppress(StudyError):  # a class of an earlier command, which this one cannot import
                register(name)
        known = [name for name in CREDIT_METHODS if name in names]
        before = study.quality.get(reward_model, {"arguments": {"methods": [], "num": 0}})["arguments"]
        if set(known) <= set(before["methods"]) and num <= before["num"] and score == before.get("score"):
            continue
        texts = max(num, before["num"])
        asked = Quality(
            reward_model=reward_model,
            score=score,
            num=texts,
            methods=tuple(known),  # type: ignore[arg-type]  # mypy does not see that the registry has these names
            policy=policy,
            device=device,
        )
        said = f"measuring credit quality on {reward_model}, {texts} texts (--quality-texts): {', '.join(known)}"
        console.print(said, highlight=False, soft_wrap=True)
        try:
            results = [result for result, _ in measured(asked, console)]
        except (ValueError, OSError, RuntimeError, GymnasiumError) as error:
            console.print(f"credit quality on {reward_model} was not measured: {error}", highlight=False)
            continue
        given = {
            "reward_model": reward_model,
            "policy": policy,
            "num": texts,
            "methods": known,
            "credit_beta": asked.credit_beta,
        }
        if score is not None:
            given["score"] = score
        text = json.dumps(quality_report.record(results, given), indent=1)
        write_text(quality_file(out, reward_model), text + "\n")
