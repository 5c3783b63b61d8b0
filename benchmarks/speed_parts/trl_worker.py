"""The TRL side, run by the Python of TRL's own environment: one JSON object per line in, one per line out.

    {"command": "start", ...}       builds PPOTrainer                   -> {"versions": {..}}
    {"command": "iteration"}        generate, score, ppo_trainer.step   -> {"seconds": .., "generate_seconds": .., ..}
    {"command": "score", "texts": [[3, 5]]}                             -> {"scores": [0.4]}

What ``start`` takes:

    "threads", "device", "seed"
    "ppo"            fields of TRL's PPOConfig
    "response"       (least, most) new tokens
    "model"          arguments of a GPT2Config: random weights, and prompts of "prompt_tokens" random tokens
    "policy"         instead of "model": a directory with a language model and its tokenizer
    "prompts"        with "policy": token ids to draw prompts from, each as likely as the others
    "reward_model"   with "policy": a directory with a causal classifier; without one a score is a free random number

It ends with its input.

Imports nothing of this project, which that environment does not hold.
"""

import json
import os
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path


class Trainer:
    """TRL's PPOTrainer with a value head and a reference model, and its usual loop as one call."""

    def __init__(self, order):
        import torch
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

        self.torch, self.order = torch, order
        torch.set_num_threads(order["threads"])
        torch.manual_seed(order["seed"])
        policy, reference, tokenizer, vocab_size = pretrained(order) if "policy" in order else made_up(order)
        self.vocab_size, self.reward_model = vocab_size, None
        if "reward_model" in order:
            self.reward_model = classifier(order["reward_model"]).to(order["device"])
        accelerator = {"cpu": order["device"] == "cpu"}
        config = PPOConfig(**order["ppo"], seed=order["seed"], log_with=None, accelerator_kwargs=accelerator)
        models = [AutoModelForCausalLMWithValueHead.from_pretrained(model) for model in (policy, reference)]
        self.trainer = PPOTrainer(config, *models, tokenizer)
        self.generator = torch.Generator().manual_seed(order["seed"])
        self.before_update = {}
        compute_advantages = self.trainer.compute_advantages

        def kept(values, rewards, mask):
            result = compute_advantages(values, rewards, mask)
            self.before_update = {"values": result[0], "returns": result[2], "mask": mask.bool()}
            return result

        self.trainer.compute_advantages = kept

    def iteration(self):
        """As TRL's own examples: batched generate, scores, step; then, untimed, the update's statistics."""
        trainer, device = self.trainer, self.trainer.accelerator.device
        queries = [query.to(device) for query in self.prompts()]
        least, most = self.order["response"]
        start = self.now()
        responses = trainer.generate(
            queries, batch_size=len(queries), return_prompt=False, do_sample=True, top_k=0, top_p=1.0,
            min_new_tokens=least, max_new_tokens=most, pad_token_id=trainer.tokenizer.pad_token_id,
        )  # fmt: skip
        generated = self.now()
        texts = [self.torch.cat(text) for text in zip(queries, responses, strict=True)]
        scores = self.scores(texts)
        stats = trainer.step(queries, responses, list(scores))
        end = self.now()
        return {
            "seconds": end - start,
            "generate_seconds": generated - start,
            "tokens": sum(len(response) for response in responses),
            "kl": float(stats["objective/kl"]),
            "entropy": float(stats["ppo/policy/entropy"]),
            "explained_variance": self.explained_variance(),
            "scores": scores.tolist(),
            "texts": [text.tolist() for text in texts],
        }

    def prompts(self):
        """Token ids of the next batch's prompts."""
        torch, order = self.torch, self.order
        size = order["ppo"]["batch_size"]
        if "prompts" in order:
            drawn = torch.randint(len(order["prompts"]), (size,), generator=self.generator).tolist()
            return [torch.tensor(order["prompts"][index]) for index in drawn]
        return list(torch.randint(1, self.vocab_size, (size, order["prompt_tokens"]), generator=self.generator))

    def scores(self, texts):
        """The reward model's scores of whole texts (a list of token ids each), at each text's last token; (N,)."""
        torch = self.torch
        if self.reward_model is None:
            return torch.rand(len(texts), generator=self.generator)
        model = self.reward_model
        # The model is causal, so what is right of a text changes nothing in it.
        batch = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # (N, L)
        last = torch.tensor([len(text) - 1 for text in texts], device=batch.device)
        with torch.no_grad():
            hidden = model.base_model(batch, use_cache=False)[0]  # (N, L, C)
            logits = model.score(hidden[torch.arange(len(texts), device=batch.device), last])
        return logits[:, 0] if logits.shape[-1] == 1 else logits[:, 1] - logits[:, 0]

    def explained_variance(self):
        """``1 - Var(returns - values) / Var(returns)`` over response tokens, as they were before the update.

        TRL's own number uses the values during the update, while its minibatches are learning the same returns.
        """
        mask = self.before_update["mask"]
        values, returns = self.before_update["values"][mask], self.before_update["returns"][mask]
        return 1 - float((returns - values).var(unbiased=False) / returns.var(unbiased=False))

    def now(self):
        """The clock, once the device has done what it was given."""
        if self.order["device"] != "cpu":
            self.torch.cuda.synchronize()
        return time.perf_counter()


def pretrained(order):
    """Policy and reference in float32, the tokenizer with the directory's special tokens, the vocabulary's size."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    directory = Path(order["policy"])
    policy, reference = (AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32) for _ in range(2))
    # Not AutoTokenizer: a newer transformers may have written the name of a class that this one does not know.
    special = json.loads((directory / "tokenizer_config.json").read_text())
    # Padding on the right: GPT-2's positions count from the left in `step`. (`generate` pads on the left by itself.)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), eos_token=special["eos_token"],
        pad_token=special.get("pad_token", special["eos_token"]), padding_side="right",
    )  # fmt: skip
    return policy, reference, tokenizer, policy.config.vocab_size


def made_up(order):
    """The same four for a GPT-2 with random weights and a vocabulary of made-up words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocab_size = order["model"]["vocab_size"]
    words = {"<eos>": 0} | {f"w{index}": index for index in range(1, vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<eos>")), eos_token="<eos>", pad_token="<eos>"
    )
    policy = GPT2LMHeadModel(GPT2Config(**order["model"]))
    reference = GPT2LMHeadModel(policy.config)
    reference.load_state_dict(policy.state_dict())
    return policy, reference, tokenizer, vocab_size


def classifier(directory):
    """The reward model, frozen, in float32."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, torch_dtype=torch.float32)
    return model.eval().requires_grad_(False)


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
        elif order["command"] == "score":
            device = trainer.trainer.accelerator.device
            texts = [trainer.torch.tensor(text, device=device) for text in order["texts"]]
            answer = {"scores": trainer.scores(texts).tolist()}
        else:
            answer = trainer.iteration()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
