"""What a name stands for: an alias of the bundle, a local directory, a name of the hub, or something made by code."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gymnasium.error import Error

from tokenmdp.files import expand_home, recover_directory

Kind = Literal["tokenizer", "reward_model", "policy", "prompts"]

ASSETS = Path(__file__).parents[1] / "assets" / "imdb"
STUDY_MODELS = Path(__file__).parents[2] / "examples" / "abc_study" / "models"  # of a checkout; not in the wheel
ALIASES: dict[str, dict[Kind, Path]] = {
    "imdb-tiny": {
        "policy": ASSETS / "policy",
        "tokenizer": ASSETS / "policy",
        "reward_model": ASSETS / "reward_model",
        "prompts": ASSETS / "prompts.json",
    },
    "imdb-gold": {"reward_model": ASSETS / "reward_model_gold"},  # another architecture, never used to train a policy
    "imdb-plain": {"reward_model": STUDY_MODELS / "imdb-plain"},  # before its attention row was trained
    "imdb-uniform": {"reward_model": STUDY_MODELS / "imdb-uniform"},  # the same scores, a row that says nothing
}
# Names answered by code, not by files.
BUILT_IN: dict[Kind, tuple[str, ...]] = {"tokenizer": ("toy",), "reward_model": ("lexicon", "toy-lexicon", "restraint")}
CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json")
PATH_STARTS = ("/", "./", "../", "~")


class ModelNotFound(Error, OSError):
    """No alias, directory or reachable hub repository has this name; the message says how to get it."""


def resolve(kind: Kind, name: str) -> str:
    """The path of an alias's bundled file, the absolute path of a local directory, or the name unchanged.

    The directory of a run stands for its checkpoint/, which holds the model. Unchanged stay hub names and `BUILT_IN`
    names, also where the working directory has a folder of that name.

    Raises:
        ModelNotFound: the name is empty.
        ValueError: it begins with ``~`` and a user who does not exist.

    >>> resolve("prompts", "imdb-tiny").endswith("prompts.json"), resolve("policy", "lvwerra/gpt2-imdb")
    (True, 'lvwerra/gpt2-imdb')
    """
    if not name.strip():
        raise ModelNotFound(f"the name of the {words(kind)} is empty; bundled: {bundled(kind)}")
    if (alias := ALIASES.get(name, {}).get(kind)) is not None:
        return str(alias)
    if name in BUILT_IN.get(kind, ()):
        return name
    directory = recover_directory(expand_home(name))
    if not directory.is_dir():
        return name
    if kind != "prompts" and not any((directory / file).exists() for file in CONFIGS):
        checkpoint = recover_directory(directory / "checkpoint")
        directory = checkpoint if (checkpoint / CONFIGS[0]).exists() else directory
    return str(directory.resolve())


def check_name(kind: Kind, name: str) -> None:
    """Refuse names that need no request to the hub: a path without a directory, a name that means something else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    what = words(kind)
    if others := [words(other) for other, names in BUILT_IN.items() if name in names]:
        toy = (kind, name) == ("policy", "toy")
        hint = "; only `tokenmdp train` has an untrained policy of this name" if toy else ""
        raise ModelNotFound(f"{name!r} is a bundled {others[0]} and no {what}{hint}. Bundled: {bundled(kind)}")
    missing = f"no {what} {name!r}: there is no such directory"
    if name.startswith(PATH_STARTS):
        raise ModelNotFound(f"{missing}; check the path. Bundled: {bundled(kind)}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelNotFound(f"{missing}, and a hub name is OWNER/NAME. Bundled: {bundled(kind)}") from error


def words(kind: Kind) -> str:
    """The kind as messages spell it."""
    return kind.replace("_", " ")


def bundled(kind: Kind) -> str:
    """The names that need no file and no hub."""
    aliases = [alias for alias, kinds in ALIASES.items() if kind in kinds and kinds[kind].exists()]
    return ", ".join([*aliases, *BUILT_IN.get(kind, ())])
