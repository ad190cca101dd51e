"""The repository as a whole: small modules, nothing of one machine in tracked files, set-up commands in place."""

import os
import re
import subprocess

import pytest
from ruamel.yaml import YAML

from dive_lib import parameters, paths
from dive_lib.files import read_json

ROOT = paths.ROOT
LONGEST_MODULE = 350
LONGEST_LINE = 120
# Folders of a machine on which something was made; not after a letter, so addresses and relative paths pass.
MACHINE_PATH = re.compile(r"(?<![\w.:~/+-])/(?:work|root|home|tmp|Users)/(?!\.\.\.)")
IMAGE = re.compile(r"(?:base64,|\"image/png\": \")[A-Za-z0-9+/=\\n]+")


def tracked() -> list[str]:
    """Paths of the files that Git tracks, and of new ones that it does not ignore; skips outside a checkout."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a Git checkout")
    return sorted(name for name in set(listed.split("\0")) if name and (ROOT / name).is_file())


def text_of(name: str) -> str:
    """Content of a text file without embedded images; empty for a binary one."""
    content = (ROOT / name).read_bytes()
    return "" if b"\0" in content else IMAGE.sub("", content.decode("utf-8", errors="replace"))


def python_files() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for folder in ("dive_lib", "tests", "benchmarks")
            for path in sorted((ROOT / folder).rglob("*.py"))]


def test_modules_are_short_and_named_after_a_concept():
    modules = [name for name in python_files() if name.startswith("dive_lib/")]
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in modules}
    assert {name: length for name, length in lengths.items() if length > LONGEST_MODULE} == {}
    assert not {"utils.py", "util.py", "misc.py", "helpers.py", "common.py"} & {os.path.basename(m) for m in modules}


def test_modules_have_a_docstring():
    for name in python_files():
        source = (ROOT / name).read_text().lstrip()
        assert not source or source.startswith(('"""', 'r"""', "#!")), name


def test_nothing_is_left_open():
    marker = re.compile(r"\b(TODO|FIXME|XXX)\b")
    found = [name for name in python_files() if marker.search((ROOT / name).read_text())]
    assert [name for name in found if name not in ("tests/test_repository.py", "tests/test_notebooks_hygiene.py")] == []


def test_lines_are_readable():
    long = [f"{name}:{number}" for name in python_files()
            for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
            if len(line) > LONGEST_LINE]
    assert long == []


def test_no_machine_path_in_tracked_files():
    found = [f"{name}: {match.group(0)}{text[match.end():match.end() + 30]!r}"
             for name in tracked() if not name.startswith(".dvcstore/")
             for text in [text_of(name)] for match in MACHINE_PATH.finditer(text)]
    assert not found, "\n".join(found)


def test_no_machine_path_in_reports():
    """Also in reports that are not committed, since a visitor may be sent one."""
    pages = [path.relative_to(ROOT).as_posix() for suffix in ("html", "ipynb", "json", "csv")
             for path in (ROOT / "reports").rglob(f"*.{suffix}")]
    found = [name for name in pages if MACHINE_PATH.search(text_of(name)) or str(ROOT) + "/" in text_of(name)]
    assert found == []


@pytest.mark.parametrize("text, leaks", [
    ("File {}work/main/x.py", True), ("'{}home/me/x'", True), ("({}tmp/a)", True), ("\"{}root/a\"", True),
    ("https://example.org{}work/x", False), ("../runs{}tmp/x", False), ("iVBOR{}tmp/ab", False),
])
def test_the_machine_path_check_can_tell(text, leaks):
    assert bool(MACHINE_PATH.search(text.format("/"))) == leaks


def test_no_weights_or_pickles_are_tracked():
    heavy = re.compile(r"\.(pt|pth|ckpt|pkl|pickle|bin|npy|npz)$")
    assert [name for name in tracked() if heavy.search(name)] == []
    assert [name for name in tracked() if (ROOT / name).stat().st_size > 8 * 2**20] == []


def test_makefile_has_its_targets_and_explains_them():
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, check=True, text=True,
                           stdout=subprocess.PIPE).stdout
    for target in ("repro", "detect", "classify", "probe", "test", "lab", "help", "clean"):
        assert re.search(rf"^make {target} +\S", shown, re.MULTILINE), target


@pytest.mark.parametrize("target, command", [
    ("repro", "python -m dive_lib.lanes mini\n.venv/bin/dvc --wait-for-lock repro report@mini"),
    ("detect", "dvc --wait-for-lock repro ablation@mini steps@mini diagnosis@mini detectors@mini"),
    ("classify", "dvc --wait-for-lock repro classifiers@mini"),
    ("probe", "dvc --wait-for-lock repro features@mini few_shot@mini sketch_retrieval@mini segmentation@mini"),
    ("test", "pytest --nbval-lax --nbval-current-env notebooks"),
    ("lab", "jupyter lab"),
])
def test_make_targets_set_up_and_run(target, command):
    """On a machine without `.venv` each target makes it first; `make -W` asks as if the lock had just changed."""
    plan = subprocess.run(["make", "-n", "-W", "requirements.lock", target], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE).stdout
    assert plan.index("-m venv .venv") < plan.index("-r requirements.lock") < plan.index(command)


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[0].startswith("#!") and "make test" in script.read_text()


def test_dvc_is_quiet_and_its_store_travels_with_the_repository():
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config and "autostage = false" in config
    assert "url = ../.dvcstore" in config and "remote = store" in config


def test_data_is_in_the_store():
    """`dvc pull` on a fresh clone needs no network: every file that `data.dvc` names lies in `.dvcstore`."""
    (out,) = YAML(typ="safe").load((ROOT / "data.dvc").read_text())["outs"]
    hashes = [out["md5"]]
    store = ROOT / ".dvcstore" / "files" / "md5"
    listing = store / out["md5"][:2] / out["md5"][2:]
    assert listing.is_file(), "the listing of data/ is not in .dvcstore; run dvc push data.dvc"
    hashes += [entry["md5"] for entry in YAML(typ="safe").load(listing.read_text())]
    assert [digest for digest in hashes if not (store / digest[:2] / digest[2:]).is_file()] == []


def test_the_images_of_coco_that_results_are_reported_on_are_written_down():
    """val2017 serves as validation and test split: what tunes is never reported."""
    subsets = read_json(paths.ROOT / "reports" / "paper" / "evaluation_ids.json")
    assert {name: len(ids) for name, ids in subsets.items()} == {"evaluation": 500, "ablation": 100, "tuning": 100}
    assert all(ids == sorted(set(ids)) for ids in subsets.values())
    assert set(subsets["ablation"]) < set(subsets["evaluation"])
    assert not set(subsets["tuning"]) & set(subsets["evaluation"])
    wanted = parameters.load("paper")["data"]["subsets"]
    assert wanted == {name: len(ids) for name, ids in subsets.items()}
