"""The TRL side, run by the Python of TRL's own environment: one JSON object a line in, one a line out.

    {"command": "start", ...}   builds PPOTrainer             -> {"versions": {..}}
    {"command": "iteration"}    generate, ppo_trainer.step    -> {"seconds": .., "generate_seconds": .., "tokens": ..}

It ends with its input.

Imports nothing of this project, which that environment does not hold.
"""

import json
import os
import sys
import time
import warnings
from importlib.metadata import version


class Trainer:
    """TRL's PPOTrainer with a value head and a reference model, and its usual loop as one call."""

    def __init__(self, order):
        import torch
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

        self.torch, self.order = torch, order
        torch.set_num_threads(order["threads"])
        torch.manual_seed(0)
        words = {"<eos>": 0} | {f"w{index}": index for index in range(1, order["model"]["vocab_size"])}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<eos>")), eos_token="<eos>", pad_token="<eos>"
        )
        lm = GPT2LMHeadModel(GPT2Config(**order["model"]))
        reference = GPT2LMHeadModel(lm.config)
        reference.load_state_dict(lm.state_dict())
        config = PPOConfig(
            batch_size=order["episodes"],
            mini_batch_size=order["minibatch"],
            ppo_epochs=order["update_epochs"],
            learning_rate=order["learning_rate"],
            log_with=None,
            accelerator_kwargs={"cpu": order["device"] == "cpu"},
        )
        self.trainer = PPOTrainer(
            config,
            AutoModelForCausalLMWithValueHead.from_pretrained(lm),
            AutoModelForCausalLMWithValueHead.from_pretrained(reference),
            tokenizer,
        )
        self.generator = torch.Generator().manual_seed(0)

    def iteration(self):
        """As TRL's own examples: batched generate, scores (here numbers at no cost), step."""
        torch, order, trainer = self.torch, self.order, self.trainer
        device = trainer.accelerator.device
        shape = (order["episodes"], order["prompt_tokens"])
        prompts = torch.randint(1, order["model"]["vocab_size"], shape, generator=self.generator)
        queries = list(prompts.to(device))
        scores = list(torch.rand(order["episodes"], generator=self.generator))
        start = self.now()
        responses = trainer.generate(
            queries, batch_size=order["episodes"], return_prompt=False, do_sample=True, top_k=0, top_p=1.0,
            min_new_tokens=order["response_tokens"], max_new_tokens=order["response_tokens"], pad_token_id=0,
        )  # fmt: skip
        generated = self.now()
        trainer.step(queries, responses, scores)
        end = self.now()
        return {
            "seconds": end - start,
            "generate_seconds": generated - start,
            "tokens": sum(len(response) for response in responses),
        }

    def now(self):
        """The clock, once the device has done what it was given."""
        if self.order["device"] != "cpu":
            self.torch.cuda.synchronize()
        return time.perf_counter()


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not land between the answers
    warnings.simplefilter("ignore")
    trainer = None
    for line in sys.stdin:
        order = json.loads(line)
        if order["command"] == "start":
            trainer = Trainer(order)
            answer = {"versions": {name: version(name) for name in ("torch", "trl", "transformers", "numpy")}}
        else:
            answer = trainer.iteration()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
