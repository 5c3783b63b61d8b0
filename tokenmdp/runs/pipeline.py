"""RLHF in stages and rounds: demonstrations, comparisons, a reward model, a policy trained on it, and again.

    sft/                    the start, where there are demonstrations
    round-K/pairs.jsonl     responses of the latest policy, compared by the judge
    round-K/comparisons.jsonl     those of all rounds so far, which the reward model learns from
    round-K/reward-model/   a run of its own; not with DPO, which learns from the comparisons themselves
    round-K/policy/         a run of its own
    round-K/judged.json     what the judge says about that policy on held-out prompts
    pipeline.json           the settings

Every stage is skipped once it is finished, and an unfinished one goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from tokenmdp.agents import algorithm
from tokenmdp.evaluation.policies import Evaluation, evaluate, load_evaluation, save_evaluation
from tokenmdp.files import locked, make_directory
from tokenmdp.preferences import Annotator, Preference, given_ratings, write_records
from tokenmdp.runs import training
from tokenmdp.runs.comparisons import Comparing, ask_model
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.directory import RunDirectory, RunError, claimed, refuse_other_settings, refuse_strangers
from tokenmdp.runs.environments import evaluation_envs, split_prompts
from tokenmdp.runs.opening import load_policy
from tokenmdp.runs.reward_model_run import RewardModelSettings
from tokenmdp.runs.settings import HELD_OUT, PRESETS, RunSettings, preset_settings

FORMAT = "tokenmdp-pipeline-1"
RECORD = "pipeline.json"
CHECKPOINT_EVERY = 10  # updates
SHOWN_SAMPLES = 6  # per policy, on the page


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Everything that decides what a pipeline computes.

    Raises:
        ValueError: an algorithm that trains no policy on preferences.
    """

    policy: str = "imdb-tiny"
    judge: str = "imdb-gold"
    demonstrations: str | None = None  # for SFT before the first round
    rounds: int = 1
    pairs_per_round: int = 4096
    temperature: float = 1.0  # of the judge
    error_rate: float = 0.0  # of the judge
    algorithm: str = "ppo"
    updates: int | None = None  # of the policy, per round; None: the preset's, or one pass over the comparisons
    credit: str = "red"
    config: dict[str, Any] = field(default_factory=dict)  # fields of the algorithm's configuration
    start: Literal["sft", "last"] = "sft"  # which policy each round trains
    reference: Literal["fixed", "moved"] = "fixed"  # the start, or the latest policy
    prompts: str | None = None  # None: the bundled ones
    max_new_tokens: int = 16
    eval_samples: int = 256
    seed: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if algorithm(self.algorithm).learns_from == "texts" or self.algorithm == "reward-model":
            raise ValueError(f"--algorithm {self.algorithm} trains no policy on preferences; choose ppo, rloo or dpo")
        Annotator(self.judge, given_ratings, self.temperature, self.error_rate)  # refuses what it cannot use


class Stage(NamedTuple):
    """A policy of the pipeline and what the judge says about it."""

    name: str
    policy: str
    evaluation: Evaluation  # scores are the judge's, gold those of the reward model that the policy was trained on


def rlhf(settings: PipelineSettings, out: Path, console: Console) -> list[Stage]:
    """Run the pipeline, or go on with it; the policies from the start to the last round.

    Raises:
        RunError: the directory holds another pipeline, or something else.
    """
    out = out.resolve()  # of its runs, which may be read from elsewhere
    make_directory(out)
    with locked(out, wait=False), claimed(out / RECORD, check(settings, out)):
        return play(settings, out, console)


def play(settings: PipelineSettings, out: Path, console: Console) -> list[Stage]:
    """The rounds of `rlhf`, in a directory that is claimed."""
    start = settings.policy
    if settings.demonstrations is not None:
        start = train_policy(settings, "sft", out / "sft", {"data": settings.demonstrations})
    stages = [judged(settings, "start", start, start, None, out / "start.json", console)]
    records: list[Preference] = []
    for number in range(1, settings.rounds + 1):
        console.rule(f"round {number} of {settings.rounds}")
        place, latest = out / f"round-{number}", stages[-1].policy
        # 1 Sample from the latest policy, and ask the judge.
        records += ask(settings, latest, place / "pairs.jsonl", number, console)
        # 2 A reward model of all comparisons so far; DPO does without.
        write_records(place / "comparisons.jsonl", records)
        source: dict[str, Any] = {"data": str(place / "comparisons.jsonl")}
        proxy = None
        if algorithm(settings.algorithm).learns_from == "episodes":
            proxy = train_reward_model(settings, start, place)
            source = {"reward_model": proxy}
        # 3 A policy, near its reference.
        source["policy"] = start if settings.start == "sft" else latest
        source["reference"] = start if settings.reference == "fixed" else latest
        policy = train_policy(settings, settings.algorithm, place / "policy", source)
        stages.append(judged(settings, f"round {number}", policy, start, proxy, place / "judged.json", console))
    return stages


def ask(settings: PipelineSettings, policy: str, path: Path, number: int, console: Console) -> list[Preference]:
    """New comparisons of a policy's responses."""
    make_directory(path.parent)
    asked = Comparing(
        policy=policy,
        out=path,
        judge=settings.judge,
        pairs=settings.pairs_per_round,
        temperature=settings.temperature,
        error_rate=settings.error_rate,
        seed=1000 * settings.seed + number,
        prompts=settings.prompts,
        max_new_tokens=settings.max_new_tokens,
        device=settings.device,
    )
    return ask_model(console, asked)


def train_reward_model(settings: PipelineSettings, start: str, place: Path) -> str:
    """A reward model that begins as the start policy; its directory."""
    own = RewardModelSettings(
        data=str(place / "comparisons.jsonl"), policy=start, held_out=HELD_OUT, seed=settings.seed,
        device=settings.device,
    )  # fmt: skip
    out = place / "reward-model"
    if not finished(out):
        training.train(own, out, None, CHECKPOINT_EVERY)
    return str(RunDirectory(out).checkpoint)


def train_policy(settings: PipelineSettings, name: str, out: Path, source: dict[str, Any]) -> str:
    """Train a policy in a run directory of its own; the directory of its checkpoint."""
    own = replace(run_settings(settings, name), **source)
    if not finished(out):
        training.train(own, out, None if name == "sft" else updates(settings), CHECKPOINT_EVERY)
    return str(RunDirectory(out).checkpoint)


def updates(settings: PipelineSettings) -> int | None:
    """Updates of the policy in each round; None: one pass over the comparisons."""
    if settings.updates is None and algorithm(settings.algorithm).learns_from == "episodes":
        return PRESETS["quick"].updates
    return settings.updates


def run_settings(settings: PipelineSettings, name: str) -> RunSettings:
    """The settings of a policy's run, apart from what it learns from."""
    base = preset_settings("quick", name)
    changes: dict[str, Any] = {
        "policy": settings.policy,
        "tokenizer": settings.policy,
        "reward_model": settings.judge,
        "judge": settings.judge if algorithm(name).learns_from == "episodes" else None,
        "held_out": 0.0,  # DPO, too, learns from all comparisons
        "eval_every": 0,
        "config": base.config | (settings.config if name == settings.algorithm else {}),
    }
    changes |= {key: getattr(settings, key) for key in ("seed", "device", "max_new_tokens", "eval_samples")}
    if settings.prompts is not None:
        changes |= {"prompts": settings.prompts, "eval_prompts": None}
    if algorithm(name).uses_credit:
        changes |= {"credit": settings.credit, "credit_beta": default_beta(settings.credit)}
    return replace(base, **changes)


def judged(
    settings: PipelineSettings, name: str, policy: str, start: str, proxy: str | None, path: Path, console: Console
) -> Stage:
    """What the judge, and the reward model ``proxy``, say about a policy on held-out prompts; KL to the start."""
    if path.exists():
        return Stage(name, policy, load_evaluation(path))
    own = run_settings(settings, "rloo")
    split = split_prompts(own)
    with console.status(f"the judge reads texts of {name}"):
        envs = evaluation_envs(own, settings.eval_samples, split.held_out)
        trained, reference = (load_policy(one, envs, settings.config, settings.device) for one in (policy, start))
        task = envs.unwrapped.task  # type: ignore[attr-defined]
        second = None if proxy is None else task.load_reward_model(proxy)
        found = evaluate(
            trained, reference, envs, samples=settings.eval_samples, shown=SHOWN_SAMPLES, judge=second,
            tint=lambda rollout: rollout.logprobs - rollout.ref_logprobs,
        )  # fmt: skip
        envs.close()
    save_evaluation(path, found)
    return Stage(name, policy, found)


def runs_of(settings: PipelineSettings, out: Path) -> list[tuple[str, int, Path]]:
    """The directories of a pipeline's runs, with the kind and the round of each; SFT comes before the first round."""
    kinds = ("reward model", "policy") if algorithm(settings.algorithm).learns_from == "episodes" else ("policy",)
    runs = [] if settings.demonstrations is None else [("SFT", 0, out / "sft")]
    for number in range(1, settings.rounds + 1):
        runs += [(kind, number, out / f"round-{number}" / kind.replace(" ", "-")) for kind in kinds]
    return runs


def finished(out: Path) -> bool:
    """Whether a run has trained to its end and written its report."""
    return (RunDirectory(out).report / "summary.json").exists()


def check(settings: PipelineSettings, out: Path) -> dict[str, Any]:
    """What ``pipeline.json`` holds, or will hold.

    Raises:
        RunError: other settings, or something else in the directory.
    """
    record = {key: value for key, value in asdict(settings).items() if key not in ("device", "rounds")}
    # With the preset's fields for the policy's algorithm, so that a change of them is refused.
    record |= {"config": run_settings(settings, settings.algorithm).config, "updates": updates(settings)}
    content, path = {"format": FORMAT, "settings": record}, out / RECORD
    refuse_strangers(path, "a pipeline")
    if not path.exists():
        return content
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); choose another --out") from error
    refuse_other_settings(f"{out} holds a pipeline", stored, record)
    return content
