"""TorchRL's own PPO loss and GAE on a causal language model, with attention credit.

python examples/torchrl_ppo.py
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import torch
from torchrl.collectors import Collector
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from transformers import GPT2Config, GPT2LMHeadModel

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.evaluation import evaluate
from tokenmdp.interop.torchrl import actor_critic, make_env, relabel
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.returns import explained_variance
from tokenmdp.wrappers import vector

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="TextGen-Toy-v0")
parser.add_argument("--policy", help="a causal model for the environment's tokenizer; default: a small untrained GPT-2")
parser.add_argument("--updates", type=int, default=10)
parser.add_argument("--num-envs", type=int, default=32)
parser.add_argument("--num-steps", type=int, default=32, help="steps of each row in an update")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--vf-learning-rate", type=float, default=3e-3, help="of the value head, which starts at zero")
parser.add_argument("--seed", type=int, default=1)


def untrained(tokenizer) -> GPT2LMHeadModel:
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, **special)
    )


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)

    # TorchRL resets ended rows itself. The wrapper's token rewards ride in the frame that ends an episode.
    env = make_env(args.env, vector.AttentionCreditReward, num_envs=args.num_envs)
    env.set_seed(args.seed)
    eval_envs = gym.make_vec(args.env, num_envs=args.num_envs)
    task = eval_envs.unwrapped.task
    policy = CausalLMPolicy.for_task(args.policy or untrained(task.tokenizer), task)
    actor, critic = actor_critic(policy)

    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, critic_coeff=0.5, normalize_advantage=True)
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic, deactivate_vmap=True)
    optimizer = torch.optim.Adam(policy.parameter_groups(args.learning_rate, args.vf_learning_rate))

    print("before:", evaluate(eval_envs, policy, episodes=128))
    frames = args.num_envs * args.num_steps
    collector = Collector(
        env,
        actor,
        frames_per_batch=frames,
        total_frames=frames * args.updates,
        auto_register_policy_transforms=False,
    )
    for update, batch in enumerate(collector, start=1):
        relabel(batch)  # without this line every wrapper trains like SparseReward
        ended = batch["next", "terminated"].squeeze(-1)
        with torch.no_grad():
            advantage(batch)
        learned = batch[batch["collector", "mask"]]  # (F,): the frames whose credit is decided
        explained = explained_variance(learned["state_value"], learned["value_target"], torch.ones(()).bool())
        for _ in range(4):
            for rows in torch.randperm(len(learned)).split(256):
                losses = loss(learned[rows])
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
                for group in optimizer.param_groups:  # apart: a wrong value must not shrink the policy's step
                    torch.nn.utils.clip_grad_norm_(group["params"], 0.5)
                optimizer.step()
        print(
            f"update {update}: score {batch['next', 'score'][ended].mean():+.2f}, explained variance {explained:.2f}",
            flush=True,
        )
    collector.shutdown()
    print("after:", evaluate(eval_envs, policy, episodes=128))


if __name__ == "__main__":
    main()
