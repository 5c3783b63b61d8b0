"""What gets installed, and that the files which describe the project agree with one another."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "agents").is_dir(), reason="needs a checkout, not an installed package")
BUILT_FROM = ("tokenmdp", "agents", "pyproject.toml", "README.md", "LICENSE")


def build(source, kind, target):
    """Build an sdist or a wheel of ``source`` without a network; returns the file."""
    program = f"from setuptools import build_meta as b; print('BUILT', b.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / re.search(r"^BUILT (.+)$", done.stdout, re.M)[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout to build in, symlink included."""
    copy = tmp_path_factory.mktemp("build") / "source"
    copy.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def shipped(names):
    """The package's files in a wheel, without the metadata folder."""
    return sorted(name for name in names if ".dist-info/" not in name)


@pytest.mark.slow
def test_sdist_and_wheel_hold_agents_once_and_every_asset(source, wheel, tmp_path):
    sdist = build(source, "sdist", tmp_path)
    names = shipped(zipfile.ZipFile(wheel).namelist())

    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tokenmdp").rglob("*.py")}  # follows no symlink
    modules |= {f"tokenmdp/{path.relative_to(ROOT)}" for path in (ROOT / "agents").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert len(names) == len(set(names))
    assert all(name.startswith("tokenmdp/") for name in names)  # no top-level agents: it is another distribution's
    data = (path for path in (ROOT / "tokenmdp" / "assets").rglob("*") if path.is_file())
    assert {str(path.relative_to(ROOT)) for path in data} <= set(names)
    assert "tokenmdp/py.typed" in names
    assert wheel.stat().st_size <= 22e6

    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it from 3.11.4 on
        archive.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "again").mkdir()
    again = build(unpacked, "wheel", tmp_path / "again")
    assert shipped(zipfile.ZipFile(again).namelist()) == names


@pytest.mark.slow
def test_checkout_without_symlinks_builds_the_same_wheel(source, tmp_path):
    plain = shutil.copytree(source, tmp_path / "plain", symlinks=True)
    (plain / "tokenmdp" / "agents").unlink()
    (plain / "tokenmdp" / "agents").write_text("../agents")  # what git writes where it cannot make a symlink
    names = shipped(zipfile.ZipFile(build(plain, "wheel", tmp_path)).namelist())
    assert "tokenmdp/agents/ppo.py" in names
    assert "tokenmdp/agents" not in names


@pytest.mark.slow
def test_installed_wheel_imports_agents_from_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys, tokenmdp.agents.ppo as ppo, tokenmdp.runs.settings, tokenmdp.report.heatmap\n"
        "assert 'agents' not in sys.modules\nprint(ppo.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "site" / "tokenmdp" / "agents" / "ppo.py"


def test_checkout_has_one_copy_of_the_agents():
    import tokenmdp.agents.ppo

    assert (ROOT / "tokenmdp" / "agents").is_symlink()
    assert Path(tokenmdp.agents.ppo.__file__).resolve() == ROOT / "agents" / "ppo.py"


def test_every_package_folder_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "tokenmdp").rglob("__init__.py")}
    assert listed == folders | {"tokenmdp.agents"}


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted} - {"tokenmdp"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if re.fullmatch(r"[\w-]+==[\w.]+", line)}
    assert names <= pinned
    assert all(line.startswith("#") or line.split("==")[0] in pinned for line in lines)


def test_ci_runs_what_the_readme_says():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    install, test = 'pip install -c constraints.txt -e ".[test]"', "pytest"
    assert f"{install} && {test}\n" in readme
    assert f"\n{install}\n" in ci
    assert ci.endswith(f"\n{test}\n")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_commit_hooks_share_make_check():
    makefile, hooks = (ROOT / "Makefile").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    targets = re.search(r"^check: (.+?)\s*(?:##.*)?$", makefile, re.M)[1].split()
    assert sorted(re.findall(r"entry: make (\w+)", hooks)) == sorted(targets)
