"""Names in files, tables and figures that show no directory of one machine."""

from __future__ import annotations

import re
from pathlib import Path


def slug(label: str) -> str:
    """A label as part of a file name.

    >>> slug("8-16 tokens, kl_coef=0.1")
    '8-16-tokens-kl_coef-0.1'
    """
    return re.sub(r"[^\w.-]+|=", "-", label).strip("-.")


def model_name(name: str) -> str:
    """What tables, figures and labels call a model: its name, of an absolute path only the last part.

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
