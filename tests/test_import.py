import json
import subprocess
import sys

import pytest

import tokenmdp


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def modules_after(statement):
    return set(json.loads(run(f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))")))


def test_import_adds_nothing_but_this_package_to_gymnasium():
    added = modules_after("import tokenmdp") - modules_after("import gymnasium")
    assert {name for name in added if name.split(".")[0] not in ("tokenmdp", "__future__", "importlib")} == set()


def test_import_takes_at_most_twice_as_long_as_gymnasium():
    def seconds(statement):
        code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
        return min(float(run(code)) for _ in range(5))

    assert seconds("import tokenmdp") < 2 * seconds("import gymnasium")


def test_making_an_env_needs_no_import():
    code = "import gymnasium; print(gymnasium.make('tokenmdp:TextGen-Toy-v0').reset(seed=0)[0]['input_ids'].shape)"
    assert run(code) == "(12,)\n"


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
            "tokenmdp.env:TextGenEnv", "tokenmdp.vector_env:TextGenVectorEnv",
        )  # fmt: skip
    assert registry["TextGen-v0"].kwargs == {"tokenizer": None, "reward_model": None, "prompts": None}
