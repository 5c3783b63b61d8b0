"""Reward models by name, each loaded once per process."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import torch

from tokenmdp.models.hub import from_pretrained
from tokenmdp.models.loading import fingerprint, load_weights, tokenizer_home
from tokenmdp.models.names import ALIASES, ModelNotFound, resolve
from tokenmdp.reward_models.base import RewardModel
from tokenmdp.reward_models.classifier import HFRewardModel
from tokenmdp.reward_models.ensemble import EnsembleRewardModel, read_ensemble
from tokenmdp.reward_models.lexicon import load_lexicon, names_word_list
from tokenmdp.reward_models.scores import Score

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)

_loaded: dict[tuple[Any, ...], RewardModel] = {}
_lock = threading.RLock()


def _reload(name: str, options: dict[str, Any]) -> RewardModel:
    return load_reward_model(name, **options)


def load_reward_model(name: str, *, score: Score = "auto", dtype: str = "float32", device: str = "cpu") -> RewardModel:
    """The reward model of this name; loaded once per process, so that 64 environments share one.

    Names: the aliases "imdb-tiny" and "imdb-gold", and in a checkout "imdb-plain" and "imdb-uniform"; word lists:
    "lexicon" (sentiment words read with the bundled tokenizer), "restraint" (less the weight of every sentiment word,
    good or bad), either with ":TOKENIZER" behind it for another tokenizer, "toy-lexicon"; a directory with a sequence
    classifier, or an ensemble of them; a hub repository.

    In a worker process of environments, loading a classifier gives PyTorch one thread, unless OMP_NUM_THREADS or
    `torch.set_num_threads` has chosen another number; see `tokenmdp.models.loading.use_one_thread_in_workers`.

    Raises:
        ModelNotFound: nothing has this name, or the hub cannot be reached.
        CheckpointError: the directory is damaged or holds no trained sequence classifier.
        ValueError: the model has several labels and neither their names nor ``score`` say which is the score; or
            ``score`` of a word list.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name is a string, not {type(name).__name__}; wrap a model: HFRewardModel(model, tokenizer)")
    path = resolve("reward_model", name)
    if Path(path).is_dir() and name not in ALIASES:
        name = path  # absolute: a pickle may be opened from another working directory
    word_list = names_word_list(name)  # dtype and device have no meaning
    if word_list and score != "auto":
        raise ValueError(
            f"score={score!r} chooses among the outputs of a classifier, and {name} is a word list, which has one "
            "score; leave it out"
        )
    key = (name,) if word_list else (name, fingerprint(path), score, dtype, device)
    with _lock:
        if key not in _loaded:
            loaded: RewardModel
            if word_list:
                loaded = load_lexicon(name)
            elif (ensemble := read_ensemble(path)) is not None:
                members, penalty = ensemble
                one_by_one = [load_reward_model(one, score=score, dtype=dtype, device=device) for one in members]
                loaded = EnsembleRewardModel(one_by_one, penalty, name=name)
                loaded.options = {"score": score, "dtype": dtype, "device": device}
            else:
                loaded = load_classifier(name, score=score, dtype=dtype, device=device)
            loaded.reloader = _reload
            _loaded[key] = loaded
        return _loaded[key]


def check_placement(dtype: str, device: str) -> None:
    """Refuse what no classifier can be loaded with.

    Raises:
        ValueError: an unknown dtype or device, or a GPU that torch does not see.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is none that torch knows; pass 'cpu', 'cuda' or 'cuda:1'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asks for a GPU and torch sees none; pass 'cpu'")


def load_classifier(name: str, *, score: Score, dtype: str, device: str) -> HFRewardModel:
    """A sequence classifier and its tokenizer from an alias, a directory or a hub repository.

    Raises:
        ModelNotFound: nothing has this name, or the hub cannot be reached.
        CheckpointError: the directory is damaged or holds no trained classifier.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    check_placement(dtype, device)
    model = load_weights(AutoModelForSequenceClassification.from_pretrained, "reward_model", name, DTYPES[dtype])
    home, tokenizer = tokenizer_home("reward_model", name), None
    if home is not None:
        try:
            tokenizer = from_pretrained(AutoTokenizer.from_pretrained, "reward_model", home)
        except ModelNotFound:  # a hub repository without tokenizer files: sizes are compared instead
            tokenizer = None
    model.to(torch.device(device))  # type: ignore[arg-type]
    loaded = HFRewardModel(model, tokenizer, score=score, name=name)
    logger.info("the score of %s is %s", loaded, loaded.meaning)
    loaded.options = {"score": score, "dtype": dtype, "device": device}  # "cuda", not the "cuda:0" it became
    return loaded
