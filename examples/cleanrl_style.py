"""PPO in one file, in the manner of CleanRL: a small recurrent net from scratch, the native vector environment.

python examples/cleanrl_style.py
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.evaluation import evaluate
from tokenmdp.interop.arrays import mark_token_rewards_read, relabel
from tokenmdp.returns import explained_variance
from tokenmdp.wrappers import vector

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="TextGen-Toy-v0")
parser.add_argument("--updates", type=int, default=12)
parser.add_argument("--num-envs", type=int, default=32)
parser.add_argument("--num-steps", type=int, default=32)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--gamma", type=float, default=1.0)
parser.add_argument("--gae-lambda", type=float, default=0.95)
parser.add_argument("--num-minibatches", type=int, default=4)
parser.add_argument("--update-epochs", type=int, default=4)
parser.add_argument("--clip-coef", type=float, default=0.2)
parser.add_argument("--ent-coef", type=float, default=0.01)
parser.add_argument("--vf-coef", type=float, default=0.5)
parser.add_argument("--max-grad-norm", type=float, default=0.5)
parser.add_argument("--seed", type=int, default=1)


class Agent(nn.Module):
    """Embedding, GRU, two heads."""

    def __init__(self, vocab_size: int, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.actor, self.critic = nn.Linear(width, vocab_size), nn.Linear(width, 1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """Observations (N, S) to a distribution over the next token and a value (N,)."""
        seen = self.embedding(input_ids) * attention_mask.unsqueeze(-1)  # (N, S, C); padding reads as zeros
        hidden, _ = self.gru(seen)
        last = (torch.arange(input_ids.shape[1]) * attention_mask).argmax(1)  # (N,) the slot of the newest token
        state = hidden[torch.arange(len(last)), last]  # (N, C)
        return Categorical(logits=self.actor(state)), self.critic(state).squeeze(-1)

    @torch.no_grad()
    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Sampled tokens (N,); all that `evaluate` asks of an agent."""
        return self(*tensors(obs))[0].sample().numpy()


def tensors(obs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(obs["input_ids"]), torch.as_tensor(obs["attention_mask"])


def compute_gae(rewards, values, terminations, next_value, gamma, gae_lambda):
    """Advantages (num_steps, num_envs); ``terminations[t]`` says that step t ended an episode."""
    advantages, carried = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(rewards) else next_value
        goes_on = 1.0 - terminations[t]
        delta = rewards[t] + gamma * following * goes_on - values[t]
        advantages[t] = carried = delta + gamma * gae_lambda * goes_on * carried
    return advantages


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)

    envs = gym.make_vec(args.env, num_envs=args.num_envs, autoreset_mode="SameStep")
    envs = vector.AttentionCreditReward(envs)
    mark_token_rewards_read(envs)
    agent = Agent(int(envs.single_action_space.n))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    eval_envs = gym.make_vec(args.env, num_envs=args.num_envs)
    print("before:", evaluate(eval_envs, agent, episodes=128))

    shape = (args.num_steps, args.num_envs)
    slots = envs.single_observation_space["input_ids"].shape
    ids, masks = torch.zeros((*shape, *slots), dtype=torch.int64), torch.zeros((*shape, *slots), dtype=torch.int8)
    actions = torch.zeros(shape, dtype=torch.int64)
    logprobs, rewards, values, terminations = (torch.zeros(shape) for _ in range(4))
    known = torch.zeros(shape, dtype=torch.bool)

    next_ids, next_mask = tensors(envs.reset(seed=args.seed)[0])
    for update in range(1, args.updates + 1):
        scores = []
        for step in range(args.num_steps):
            ids[step], masks[step] = next_ids, next_mask
            with torch.no_grad():
                policy, values[step] = agent(next_ids, next_mask)
            actions[step] = policy.sample()
            logprobs[step] = policy.log_prob(actions[step])
            obs, reward, terminated, _, infos = envs.step(actions[step].numpy())
            rewards[step], terminations[step] = torch.as_tensor(reward), torch.as_tensor(terminated)
            relabel(rewards, step, infos, known)  # without this line every wrapper trains like SparseReward
            next_ids, next_mask = tensors(obs)
            scores.extend(reward[terminated].tolist())

        with torch.no_grad():
            _, next_value = agent(next_ids, next_mask)
        advantages = compute_gae(rewards, values, terminations, next_value, args.gamma, args.gae_lambda)
        returns = advantages + values

        # Tokens of episodes that are still running have no credit yet, so minibatches are made of the others.
        b_ids, b_masks, b_actions, b_logprobs, b_advantages, b_returns = (
            array[known] for array in (ids, masks, actions, logprobs, advantages, returns)
        )
        for _ in range(args.update_epochs):
            for rows in torch.randperm(len(b_actions)).tensor_split(args.num_minibatches):
                policy, value = agent(b_ids[rows], b_masks[rows])
                ratio = (policy.log_prob(b_actions[rows]) - b_logprobs[rows]).exp()
                advantage = b_advantages[rows]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = torch.max(-advantage * ratio, -advantage * clipped).mean()
                value_loss = 0.5 * (value - b_returns[rows]).square().mean()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        explained = explained_variance(values, returns, known)
        print(f"update {update}: score {np.mean(scores):+.2f}, explained variance {explained:.2f}", flush=True)
    print("after:", evaluate(eval_envs, agent, episodes=128))


if __name__ == "__main__":
    main()
