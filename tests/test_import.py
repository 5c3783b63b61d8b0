import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import tokenmdp
from tokenmdp.reward_models import load_reward_model

PACKAGE = Path(tokenmdp.__file__).parent
PURE = ("types", "envs.token_mdp", "credit", "returns", "divergences", "losses")
OF_TRANSFORMERS = (
    "models.policy",
    "models.kv_cache",
    "models.recorded_steps",
    "models.kernels",
)  # and of commands, which need it anyway


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


def modules_after(statement):
    return set(json.loads(run(f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))")))


def test_import_adds_nothing_but_this_package_to_gymnasium():
    added = modules_after("import tokenmdp") - modules_after("import gymnasium")
    assert {name for name in added if name.split(".")[0] not in ("tokenmdp", "__future__", "importlib")} == set()


def test_loading_and_credit_import_no_library_before_they_need_it():
    code = (
        "import sys, tokenmdp.models.loading, tokenmdp.reward_models, tokenmdp.credit\n"
        "tokenmdp.credit.DeepLiftCredit()\nprint({'transformers', 'captum'} & set(sys.modules))"
    )
    assert run(code) == "set()\n"


FRESH = """
import sys, gymnasium
print(gymnasium.make("tokenmdp:TextGen-Toy-v0").reset(seed=0)[0]["input_ids"].shape)
import tokenmdp
print("tokenmdp.evaluation" in sys.modules, tokenmdp.evaluation.evaluate is tokenmdp.evaluate)
import pickle
print(pickle.load(open(sys.argv[1], "rb")).name)
"""


@pytest.mark.slow
def test_a_fresh_process_makes_an_env_finds_the_evaluation_and_reads_a_pickle(tmp_path):
    """In this order: nothing was imported before that the line does not import by itself."""
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(load_reward_model("imdb-tiny")))
    first, second, third = run(FRESH, tmp_path / "model.pickle").splitlines()
    assert first == "(12,)"
    assert second == "False True"  # as a module and as a function
    assert third == "imdb-tiny"


def test_every_public_name_resolves_and_is_listed():
    for name in tokenmdp.__all__:
        assert name in dir(tokenmdp)
        assert getattr(tokenmdp, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        tokenmdp.nothing  # noqa: B018


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
    inner = ".".join(parts[:2])
    return inner if inner in (*PURE, *OF_TRANSFORMERS) else parts[0]


def test_other_libraries_are_imported_where_they_belong():
    """Imports between the modules of this package are checked in test_house.py."""
    found = set(imports())
    assert {module for module, *_ in found} >= {"types", "losses", "agents.ppo", "runs.training", "wrappers.vector"}
    wrong = set()
    for module, name, at_import in found:
        layer, root = place(module.split(".")), name.split(".")[0]
        if (
            (layer in PURE and root in ("gymnasium", "transformers"))
            or (layer == "agents" and root in ("transformers", "safetensors", "agents"))
            or (layer != "interop" and root in ("stable_baselines3", "sb3_contrib", "torchrl", "tensordict"))
            or (root in ("datasets", "accelerate", "peft") and at_import)
            or (root == "transformers" and at_import and layer not in (*OF_TRANSFORMERS, "runs", "cli"))
        ):
            wrong.add((module, name))
    assert wrong == set()
