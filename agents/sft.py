"""SFT, supervised fine-tuning: a policy learns to write given responses. The first stage of RLHF.

One update: the mean negative log-probability of the response tokens of a batch; one step. Reads top to bottom.

    from tokenmdp.agents.sft import SFT, SFTConfig
    from tokenmdp.models.loading import load_tokenizer
    from tokenmdp.preferences import read_demonstrations

    texts = read_demonstrations("reviews.jsonl", load_tokenizer("imdb-tiny"))
    agent = SFT("imdb-tiny", texts, SFTConfig(total_updates=100))
    agent.learn(100)

Source: Ouyang et al., "Training language models to follow instructions with human feedback", 2022, section 3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokenmdp.agents.data import DataConfig, Example
from tokenmdp.agents.policy_data import PolicyFromData
from tokenmdp.losses import sft_loss
from tokenmdp.preferences.demonstrations import Demonstration
from tokenmdp.training.checkpoint import Format
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class SFTConfig(DataConfig):
    """The numbers of one run. Defaults fit the bundled 4.5M-parameter policy."""


class SFT(PolicyFromData):
    """Supervised fine-tuning on response tokens; every token of a batch counts the same.

    Args:
        policy: Alias, directory or hub name of a causal language model, or such a model (trained in place).
        demonstrations: Prompts and responses, in the tokens of that model.
        config: The run's numbers.
        reference: Name or model that an evaluation measures the KL to; default ``policy`` as it starts.
        accelerator: For a run in several processes.
        tokenizer: Of a policy that is an object; that of a named one is loaded.
    """

    config_class = SFTConfig
    format = Format("sft", 1)
    learns_from = "texts"
    config: SFTConfig

    def __init__(
        self,
        policy: str | Any,
        demonstrations: Sequence[Demonstration],
        config: SFTConfig | None = None,
        reference: str | Any | None = None,
        accelerator: Accelerator | None = None,
        tokenizer: Any = None,
    ) -> None:
        examples = [Example(one.prompt_ids, (one.response_ids,), len(one.response_ids)) for one in demonstrations]
        super().__init__(policy, examples, config, reference, accelerator, tokenizer)

    def losses(self, rows: np.ndarray, episodes: Episode) -> dict[str, torch.Tensor]:
        """The mean over response tokens, nats per token."""
        return {"loss": sft_loss(self.logprobs(self.learner, episodes), episodes.response_mask)}
