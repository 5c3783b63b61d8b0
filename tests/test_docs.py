"""The Python blocks of the pages run, links lead somewhere, and recipes give each row its own token's reward."""

import importlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from known_credit import position, single, true_reward

from tokenmdp.credit import CREDIT_METHODS

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "agents/README.md",
    "benchmarks/README.md",
    "docs/README.md",
    "docs/algorithms.md",
    "docs/behaviours.md",
    "docs/bring_your_own_agent.md",
    "docs/command.md",
    "docs/contract.md",
    "docs/credit.md",
    "docs/critic.md",
    "docs/preferences.md",
    "docs/processes_and_memory.md",
    "docs/reliability.md",
    "docs/rlhf.md",
    "docs/study.md",
    "examples/abc_study/README.md",
    "tokenmdp/assets/imdb/README.md",
)
IN_A_CHECKOUT = (ROOT / ".pre-commit-config.yaml").exists()
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|^ {4}.*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# Without doctests, which pytest collects itself.
BLOCK = re.compile(r"^```python(?: needs=(\S+))?\n(?!>>>)(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = {
    "num_updates=150": "num_updates=1",
    "num_updates=5,": "num_updates=1,",
    "num_envs=64": "num_envs=4",
    "num_envs=256": "num_envs=4",
    "num_updates=40": "num_updates=1",
    "episodes=64": "episodes=4",
    "n_steps=32,": "n_steps=8,",
    "model.learn(256": "model.learn(64",
    ".learn(2048": ".learn(512",
}


def blocks():
    for page in PAGES:
        path = ROOT / page
        if not path.exists():
            yield pytest.param("", None, id=page, marks=pytest.mark.skip(f"{page} is not beside the tests"))
            continue
        text = path.read_text(encoding="utf-8")
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


def anchors(page):
    """The fragments of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.skipif(not IN_A_CHECKOUT, reason="the pages are not beside the tests")
def test_every_page_is_listed():
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in (".", "agents", "benchmarks", "docs", "examples", "examples/abc_study", "tokenmdp/assets/imdb")
        for path in (ROOT / folder).glob("*.md")
    ]
    assert sorted(found) == sorted(PAGES)
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / target).resolve() for target in LINK.findall(index)}
    assert {path.resolve() for path in (ROOT / "docs").glob("*.md")} <= linked | {ROOT / "docs/README.md"}


@pytest.mark.skipif(not IN_A_CHECKOUT, reason="the pages are not beside the tests")
@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_a_file_and_a_heading(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in LINK.findall(CODE.sub("", text)):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if fragment:
            assert fragment in anchors(path.read_text(encoding="utf-8")), f"{page} links to {target}"


@pytest.mark.skipif(not IN_A_CHECKOUT, reason="the pages are not beside the tests")
def test_what_a_command_line_imports_is_there():
    found = 0
    for page in PAGES:
        for line in re.findall(r'python -c "(.*?)"', (ROOT / page).read_text(encoding="utf-8")):
            for module, names in re.findall(r"from (tokenmdp[\w.]*) import ([\w, ]+)", line):
                for name in names.split(","):
                    assert hasattr(importlib.import_module(module), name.strip()), f"{page}: {line}"
                    found += 1
    assert found


@pytest.mark.skipif(not IN_A_CHECKOUT, reason="the pages are not beside the tests")
def test_readme_has_a_row_for_every_credit_method():
    rows = re.findall(r"^\| (`.+?`) \| ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(CREDIT_METHODS) <= {name for row in rows for name in re.findall("`(.+?)`", row)}


@pytest.mark.skipif(not IN_A_CHECKOUT, reason="the pages are not beside the tests")
def test_the_page_of_the_command_has_the_options_of_today():
    """If not: python docs/command_tables.py."""
    spec = importlib.util.spec_from_file_location("command_tables", ROOT / "docs/command_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.page() == tables.PAGE.read_text(encoding="utf-8")
    assert "| `--kl-coef` | `0.45` | Weight of the KL to the reference" in tables.page()


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
