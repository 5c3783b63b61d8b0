"""On a GPU and on the CPU the same runs, with the same random numbers; test_device_placement.py is their CPU twin.

No line of this has run on a GPU yet. Each test records its largest difference, which `benchmarks/gpu_check.py` reads.
"""

import math

import pytest
import torch
from placement_cases import RUNS, credited, make_agent, make_envs, reward_model, timeless

from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.runs.environments import toy_policy
from tokenmdp.types import lay_out

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TOLERANCE = 1e-3


def difference(here, there):
    """The largest one of two lists of numbers, relative where they are large."""
    pairs = list(zip(here, there, strict=True))
    assert all(math.isfinite(one) and math.isfinite(other) for one, other in pairs)
    return max(abs(one - other) / (1 + abs(one)) for one, other in pairs)


def learnt(name, device):
    """The metrics of three updates with random numbers of the CPU, and the agent."""
    run = RUNS[name]
    envs = credited(make_envs(reward_model(run.reward_model, device), **run.env), run.credit, run.options, device)
    agent = make_agent(run, envs, device)
    agent.generator = torch.Generator().manual_seed(1)  # also draws the minibatches
    return timeless(agent.learn(3).history), agent


@pytest.mark.parametrize("name", RUNS)
def test_a_gpu_learns_what_the_cpu_learns(name, record_property, tmp_path):
    (here, _), (there, agent) = learnt(name, CPU), learnt(name, GPU)
    assert agent.policy.lm.device == GPU
    assert [list(metrics) for metrics in there] == [list(metrics) for metrics in here]
    found = difference(*([number for metrics in run for number in metrics.values()] for run in (here, there)))
    record_property("largest difference", found)
    assert found < (1e-1 if name in ("bfloat16", "copied") else TOLERANCE)  # bfloat16 rounds differently
    agent.save(tmp_path / "run")
    assert type(agent).load(tmp_path / "run", agent.envs).learn(1).policy.lm.device == GPU


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("needs", ["", "attention", "prefix_scores"])
def test_reward_models_score_alike(kind, needs, record_property):
    episodes = lay_out([[3, 4], [5, 6, 7, 8], [9]], [[1, 2, 30], [11], [12, 13, 14, 15, 16]])
    models = [reward_model(kind, device) for device in (CPU, GPU)]
    wanted = frozenset(filter(None, [needs])) & models[0].provides
    here, there = (model.evaluate(episodes, wanted) for model in models)
    found = max(
        difference(ours.flatten().tolist(), theirs.flatten().tolist())
        for ours, theirs in zip(here, there, strict=True)
        if ours is not None
    )
    record_property("largest difference", found)
    assert found < TOLERANCE


def test_padding_before_a_prompt_gives_no_nan():
    """Queries that see nothing: fused attention may give NaN for them, which a weight of 0 does not remove."""
    policy = CausalLMPolicy.for_task(toy_policy(seed=0), make_envs(reward_model("gpt2", CPU)).unwrapped.task).to(GPU)
    ids = torch.randint(0, 30, (3, 9), device=GPU)
    mask = torch.arange(9, device=GPU) >= torch.tensor([[0], [4], [6]], device=GPU)
    for dtype in (torch.float32, torch.bfloat16):
        policy.compute_dtype = dtype
        scores = policy.evaluate(ids, mask, 7)
        (scores.logprobs.sum() + scores.values.sum()).backward()
        assert all(bool(weight.grad.isfinite().all()) for weight in policy.parameters() if weight.grad is not None)
        state = policy.prefill(ids, mask)
        assert bool(policy.append(state, ids[:, 0]).logits.isfinite().all())
