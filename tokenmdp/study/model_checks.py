"""Whether the models of a study load and fit together, before its first run."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmdp.evaluation.texts import self_bleu
from tokenmdp.runs.environments import make_envs, split_prompts
from tokenmdp.runs.settings import TOY_POLICY
from tokenmdp.study.results import Cell


def check_models(cells: Sequence[Cell]) -> None:
    """Load every combination of models once, at its longest, so that a wrong name does not fail every cell.

    Raises:
        ValueError: models that do not fit together or do not fit the lengths.
        OSError: a name that resolves to nothing.
        gymnasium.error.DependencyNotInstalled: an evaluation needs a library that is not installed.
    """
    self_bleu([[0, 1], [0, 1]])
    longest: dict[tuple[str | None, ...], Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.settings.max_new_tokens):
        settings = cell.settings
        longest[settings.policy, settings.tokenizer, settings.reward_model, settings.prompts, cell.gold] = cell
    for cell in longest.values():
        envs = make_envs(cell.settings, 1, split_prompts(cell.settings).training)
        task = envs.unwrapped.task  # type: ignore[attr-defined]
        if cell.gold is not None:
            task.load_reward_model(cell.gold)
        if cell.settings.policy != TOY_POLICY:
            task.load_policy(cell.settings.policy)
        envs.close()
