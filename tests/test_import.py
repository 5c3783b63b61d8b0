import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tokenmdp

PACKAGE = Path(tokenmdp.__file__).parent
PURE = ("types", "models.tokens", "envs.token_mdp", "credit", "returns", "divergences", "losses")
MODELS = ("reward_models", "models", "models.policy", "models.kv_cache", "models.kernels")
ADAPTERS = ("envs", "wrappers")


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def modules_after(statement):
    return set(json.loads(run(f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))")))


def test_import_adds_nothing_but_this_package_to_gymnasium():
    added = modules_after("import tokenmdp") - modules_after("import gymnasium")
    assert {name for name in added if name.split(".")[0] not in ("tokenmdp", "__future__", "importlib")} == set()


def test_making_an_env_needs_no_import():
    code = "import gymnasium; print(gymnasium.make('tokenmdp:TextGen-Toy-v0').reset(seed=0)[0]['input_ids'].shape)"
    assert run(code) == "(12,)\n"


def test_every_public_name_resolves_and_is_listed():
    for name in tokenmdp.__all__:
        assert name in dir(tokenmdp)
        assert getattr(tokenmdp, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        tokenmdp.nothing  # noqa: B018


def test_evaluation_is_there_as_module_and_function():
    code = "import tokenmdp; print(tokenmdp.evaluation.evaluate is tokenmdp.evaluate)"  # where nothing else imports it
    assert run(code) == "True\n"


def test_the_ids_are_registered_without_a_step_limit():
    registry = tokenmdp._gym.registry
    for name in ("IMDb", "Toy"):
        spec = registry[f"TextGen-{name}-v0"]
        assert spec.max_episode_steps is None
        assert (spec.entry_point, spec.vector_entry_point) == (
            "tokenmdp.envs.single:TextGenEnv", "tokenmdp.envs.vector:TextGenVectorEnv",
        )  # fmt: skip
    assert registry["TextGen-v0"].kwargs == {"tokenizer": None, "reward_model": None, "prompts": None}


def imports():
    """(module, what it imports, whether at import time) of every file; imports for type checkers do not count."""
    for file in [*PACKAGE.rglob("*.py"), *(PACKAGE / "agents").resolve().glob("*.py")]:
        folder = PACKAGE if PACKAGE in file.parents and file.parent.name != "agents" else file.parents[1]
        module = str(file.relative_to(folder).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((module, name, node in tree.body) for name in names)


def place(parts):
    """The folder of a module, or the file where the rules below speak of one."""
    return next((".".join(parts[:2]) for name in (*PURE, *MODELS) if ".".join(parts[:2]) == name), parts[0])


def test_imports_go_one_way():
    """Types, pure functions, adapters and models, rollouts and reports, agents, runs, commands: nothing looks ahead.

    A study stands between runs and commands: it runs what `train` runs, and `ablate` runs it.
    """
    found = set(imports())
    assert {module for module, *_ in found} >= {"types", "losses", "agents.ppo", "runs.training", "wrappers.vector"}
    ahead = set()
    for module, name, at_import in found:
        layer, (root, *parts) = place(module.split(".")), name.split(".")
        theirs = place(parts) if root == "tokenmdp" else None
        wrong = (
            (layer in PURE and theirs is not None and theirs not in PURE)
            or (layer in PURE and root in ("gymnasium", "transformers") and layer != "models.tokens")
            or (layer in (*ADAPTERS, *MODELS) and theirs in ("rollouts", "agents", "runs", "cli"))
            or (layer in MODELS and theirs in ADAPTERS)
            or (layer not in ("evaluation", "study", "runs", "cli") and theirs == "runs")
            or (layer not in ("__main__", "runs", "cli") and theirs == "cli")
            or (layer not in ("study", "report", "runs", "cli") and theirs == "study")
            or (layer not in ("agents", "study", "runs", "cli") and theirs == "agents")
            or (layer not in ("interop", "runs", "cli") and theirs == "interop")
            or (layer == "agents" and root in ("transformers", "safetensors", "agents"))
            or (layer != "interop" and root in ("stable_baselines3", "sb3_contrib", "torchrl", "tensordict"))
            or (root in ("datasets", "accelerate", "peft") and at_import)
            or (root == "transformers" and at_import and layer not in (*MODELS[2:], "runs", "cli"))
        )
        if wrong:
            ahead.add((module, name))
    assert ahead == set()
