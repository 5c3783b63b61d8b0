"""Names in files, tables and figures, without the directories of the machine."""

from __future__ import annotations

import re
from pathlib import Path

NAMES = {  # of methods in the paper
    "attention": "ABC",
    "abc-d": "ABC-D",
    "abc-d2": "ABC-D2",
    "red": "RED",
    "position": "position",
    "sparse": "sparse",
    "uniform": "uniform",
}


def name_of(method: str) -> str:
    """The name of a method in figures: the paper's name, with its options.

    >>> name_of("attention credit_beta=0.4"), name_of("vine")
    ('ABC credit_beta=0.4', 'vine')
    """
    head, blank, options = method.partition(" ")
    return NAMES.get(head, head) + blank + options


def slug(label: str) -> str:
    """A label as part of a file name.

    >>> slug("8-16 tokens, kl_coef=0.1")
    '8-16-tokens-kl_coef-0.1'
    """
    return re.sub(r"[^\w.-]+|=", "-", label).strip("-.")


def model_name(name: str) -> str:
    """The name of a model in tables, figures and labels; of an absolute path only the last part.

    >>> model_name("lvwerra/gpt2-imdb"), model_name("/home/me/models/reward"), model_name("lexicon:/home/me/policy")
    ('lvwerra/gpt2-imdb', 'reward', 'lexicon:policy')
    """
    kind, colon, place = name.rpartition(":")
    return f"{kind}{colon}{Path(place).name}" if Path(place).is_absolute() else name


def without_directories(text: str) -> str:
    """The text with the last part of each absolute path in it: the directories are those of one machine.

    >>> without_directories('File "/home/me/credit.py", line 3: no /home/me/models/reward, see https://a.org/b/c')
    'File "credit.py", line 3: no reward, see https://a.org/b/c'
    """
    quoted = re.sub(r"""(["'])/(?:[^"'/\n]+/)+(?=[^"'/\n]*\1)""", r"\1", text)
    return re.sub(r"(?<![\w.~/-])/(?:[^\s/\"':]+/)+", "", quoted)
