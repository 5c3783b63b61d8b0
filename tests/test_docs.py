"""The Python blocks of the pages run, and the recipes for other libraries give each row its own token's reward."""

import re
from pathlib import Path

import numpy as np
import pytest
from known_credit import position, single, true_reward

ROOT = Path(__file__).parents[1]
PAGES = {  # and the sections, where only those have blocks that can run as they stand
    "README.md": ("## The contract\n", "## Use it with your own tools\n"),
    "agents/README.md": ("",),
    "docs/bring_your_own_agent.md": ("",),
    "docs/study.md": ("",),
}
# Without doctests, which pytest collects itself.
BLOCK = re.compile(r"^```python(?: needs=(\S+))?\n(?!>>>)(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = {"num_updates=150": "num_updates=1", "num_envs=64": "num_envs=4"}


def blocks():
    for page, headings in PAGES.items():
        path = ROOT / page
        if not path.exists():
            yield pytest.param("", None, id=page, marks=pytest.mark.skip(f"{page} is not beside the tests"))
            continue
        text = path.read_text(encoding="utf-8")
        if headings != ("",):
            text = "\n".join(text.split(heading)[1].split("\n## ")[0] for heading in headings)
        for number, (needs, code) in enumerate(BLOCK.findall(text), start=1):
            yield pytest.param(code, needs, id=f"{page}-{number}{'-' * bool(needs)}{needs}")


def run(code, needs, replaced=(), **names):
    if needs == "network":
        pytest.skip("asks the Hugging Face hub")
    if needs:
        pytest.importorskip(needs, reason=f"the recipe needs {needs}, which is not installed")
    for old, new in (*SMALLER.items(), *replaced):
        code = code.replace(old, new)
    exec(compile(code, "<page>", "exec"), names)
    return names


def recipe(needs):
    found = [block.values for block in blocks() if block.values[1] == needs]
    if not found:
        pytest.skip("the pages are not beside the tests")
    return found[0][0]


@pytest.mark.parametrize(("code", "needs"), list(blocks()))
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_block_runs(code, needs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a checkpoint
    run(code, needs)


def test_tianshous_buffer_holds_the_true_rewards():
    wrapped = 'AttentionCreditReward(gym.make("tokenmdp:TextGen-Toy-v0"))'
    buffer = run(recipe("tianshou"), "tianshou", [(wrapped, "single()")], single=single)["buffer"]
    rows = buffer[buffer.sample_indices(0)]
    expected = true_reward(rows.act, position(rows.obs))
    np.testing.assert_allclose(rows.rew, expected, rtol=1e-6)
    assert len(rows) > 1000


@pytest.mark.filterwarnings("ignore")
def test_rllibs_advantages_are_made_of_the_true_rewards(monkeypatch):
    pytest.importorskip("ray.rllib", reason="the recipe needs ray, which is not installed")
    from ray.rllib.connectors.learner import GeneralAdvantageEstimation

    compared = []

    def look(self, *, rl_module, batch, episodes, **kwargs):
        for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False):
            tokens = np.array(episode.get_actions())[:-1]  # without the artificial step
            compared.append((np.array(episode.get_rewards())[:-1], true_reward(tokens, np.arange(len(tokens)))))
        column = np.asarray(batch["default_policy"]["rewards"])
        compared.append((column.sum(), sum(true.sum() for _, true in compared)))
        return computed(self, rl_module=rl_module, batch=batch, episodes=episodes, **kwargs)

    computed = GeneralAdvantageEstimation.__call__
    monkeypatch.setattr(GeneralAdvantageEstimation, "__call__", look)
    wrapped = 'AttentionCreditReward(gym.make("tokenmdp:TextGen-Toy-v0"))'
    names = run(
        recipe("ray"),
        "ray",
        [(wrapped, "single()"), ("train_batch_size=256", "train_batch_size=1100")],
        single=single,
    )
    names["algorithm"].stop()
    assert sum(np.size(rewards) for rewards, _ in compared) > 1000
    for rewards, expected in compared:
        np.testing.assert_allclose(rewards, expected, rtol=1e-4)
