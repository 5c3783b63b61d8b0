"""Text generation as a token MDP, one token at a time, without any learning.

python examples/mdp_by_hand.py
python examples/mdp_by_hand.py --prompt "the plot" --response "very good and not boring <eos>"
"""

from __future__ import annotations

import argparse

import gymnasium as gym
from rich.console import Console
from rich.table import Table

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.wrappers import AttentionCreditReward, SparseReward, UniformReward

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--prompt", default="the film was")
parser.add_argument("--response", default="dull but the actor was brilliant <eos>")


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    env = SparseReward(gym.make("TextGen-Toy-v0", render_mode="ansi"))
    tokenizer, horizon = env.unwrapped.tokenizer, env.unwrapped.task.max_new_tokens
    actions = tokenizer.encode(args.response, add_special_tokens=False)

    console.print(
        f"Actions are the {env.action_space.n} token ids; an episode ends with <eos> or after {horizon} tokens."
    )
    obs, _ = env.reset(seed=0, options={"prompt": args.prompt})
    slots = len(obs["input_ids"])
    console.print(f"A state is {slots} slots: the prompt on the left, the response from slot {slots - horizon} on.\n")

    for step, action in enumerate(actions):
        state, token = env.render(), tokenizer.decode([action])
        obs, reward, terminated, _, info = env.step(action)
        console.print(f"t={step}  state: {state}   action: {action} ({token})   reward: {reward}", markup=False)
        if terminated:
            break
    else:
        console.print(f"\nStill running after {len(actions)} of {horizon} tokens: end --response with <eos>.")
        return

    # The reward was 0 until the end, because the score is known only for a finished text. What each token deserves of
    # it is known only then too, so it comes afterwards, in the last info, as a vector with one entry per token.
    n_tokens = info["n_tokens"]
    console.print(f"\nThe score of the finished text is {info['score']:+.2f}. Who earned it?")
    wrappers = (SparseReward, UniformReward, AttentionCreditReward)
    columns = []
    for wrapper in wrappers:
        wrapped = wrapper(gym.make("TextGen-Toy-v0"))
        wrapped.reset(seed=0, options={"prompt": args.prompt})
        for action in actions[:n_tokens]:
            *_, info = wrapped.step(action)
        columns.append(info["token_rewards"][:n_tokens])
    table = Table("token", *(wrapper.__name__ for wrapper in wrappers))
    for action, *credits in zip(actions, *columns, strict=False):
        table.add_row(tokenizer.decode([action]), *(f"{credit:+.2f}" for credit in credits))
    table.add_section()
    table.add_row("sum", *(f"{column.sum():+.2f}" for column in columns))
    console.print(table)
    console.print("Every column sums to the score: a wrapper moves reward between tokens and adds none.")
    console.print("Attention says how much a token mattered, not which way: its credit always has the score's sign.")


if __name__ == "__main__":
    main()
