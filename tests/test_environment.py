"""One environment: the lock, `environment.yml`, `pyproject.toml` and the imports of the code agree."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from ruamel.yaml import YAML

from dive_lib import paths

TOP_LEVEL_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "ruamel": "ruamel-yaml", "IPython": "ipython"}
"""Distributions whose import name differs from their own, apart from case and `_`."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock() -> dict[str, str]:
    lines = (paths.ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line)]
    assert not wrong, f"requirements.lock: not `name==version` without a local suffix: {wrong}"
    versions = {canonical(name): version for name, version in (line.split("==") for line in pins)}
    assert len(versions) == len(pins), "requirements.lock names a distribution twice"
    return versions


def conda() -> dict[str, str]:
    listed = YAML(typ="safe").load((paths.ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    return {canonical(name): version for name, version in (entry.split("==") for entry in pip)}


def project() -> dict:
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]


def test_conda_environment_has_the_versions_of_the_lock():
    pinned = lock()
    assert conda() == {name: pinned.get(name) for name in conda()}


def test_project_and_conda_environment_name_the_same_distributions():
    assert sorted(map(canonical, project()["dependencies"])) == sorted(conda())


def test_python_version_agrees():
    listed = YAML(typ="safe").load((paths.ROOT / "environment.yml").read_text())["dependencies"]
    assert "python=3.11" in listed
    assert project()["requires-python"] == ">=3.11"
    assert "(3, 11)" in (paths.ROOT / "Makefile").read_text()


def test_lock_is_complete():
    """Everything that a locked distribution needs here is locked too, in a version that it accepts."""
    Requirement = pytest.importorskip("packaging.requirements").Requirement

    pinned = lock()
    problems = []
    for name in pinned:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system, or an environment made without the lock
        for requirement in map(Requirement, needs):
            needed = canonical(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if re.match(r"nvidia-|cuda-|triton", needed):
                continue  # PyTorch's wheels for a GPU bring their own exact pins
            if needed not in pinned or not requirement.specifier.contains(pinned[needed], prereleases=True):
                problems.append(f"{name} needs {requirement}, locked is {pinned.get(needed)}")
    assert not problems


@pytest.mark.skipif(Path(sys.prefix) != paths.ROOT / ".venv", reason="tests run in another environment than .venv")
def test_installed_versions_are_the_locked_ones():
    pinned = lock()
    installed = {name: metadata.version(name).split("+")[0] for name in conda()}
    assert installed == {name: pinned[name] for name in installed}


def test_no_package_index_is_named():
    for name in ("requirements.lock", "environment.yml", "pyproject.toml", "Makefile"):
        text = (paths.ROOT / name).read_text()
        assert not re.search(r"index-url|find-links|https?://|git\+", text), name


def test_every_import_is_a_direct_dependency():
    sources = {path: path.read_text() for folder in ("dive_lib", "tests", "benchmarks")
               for path in sorted((paths.ROOT / folder).glob("*.py"))}
    for path in sorted(paths.notebooks().glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        sources[path] = re.sub(r"(?m)^\s*[%!].*$", "", code)
    direct, known = set(conda()), {*sys.stdlib_module_names, "dive_lib", "conftest", "tests", "benchmarks"}
    known |= {path.stem for path in sources if path.suffix == ".py" and path.parent.name != "dive_lib"}
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for top in {name.partition(".")[0] for name in names} - known:
                assert canonical(TOP_LEVEL_OF.get(top, top)) in direct, \
                    f"{paths.shorten(path)} imports {top}; name it in pyproject.toml, environment.yml and the lock"
