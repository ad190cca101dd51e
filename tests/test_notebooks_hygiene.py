"""Source notebooks: stripped, short, with one parameters cell, and free of what belongs to one machine."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from dive_lib import paths

MOST_CODE_CELLS = 22
LONGEST_CELL = 30
LONGEST_PARAMETERS_CELL = 10
LONGEST_LINE = 120  # but of parameters, of which each has its line

FORBIDDEN = {
    r"(?m)^\s*[!%]\s*(pip|conda|cd)\b|os\.chdir|subprocess": "environments and folders are not a notebook's business",
    r"CUDA_VISIBLE_DEVICES": "devices are chosen outside the notebook",
    r"(?m)^\s*(el)?if\b[^\n:]*\bprofile\b|\bif profile\b": "no branch on the profile: same code, other parameters",
    r"""["'](/|[A-Za-z]:\\|~/)[\w.]""": "absolute path; use dive_lib.paths",
    r"\btqdm\b": "tqdm leaves frozen bars in executed notebooks; use dive_lib.progress",
    r"\bsys\.path\b": "dive_lib is installed; no path tricks",
    r"\b(TODO|FIXME)\b": "finish it or write it down as a limit",
}


def problems(path: Path) -> list[str]:
    """Everything that is wrong with one notebook, in words."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if len(code) > MOST_CODE_CELLS:
        found.append(f"{len(code)} code cells, more than {MOST_CODE_CELLS}")
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or "?" not in first.source:
        found.append("the first cell must be markdown that asks the notebook's question")
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        found.append(f"{len(tagged)} cells tagged `parameters`, not one")
    elif len(tagged[0].source.splitlines()) > LONGEST_PARAMETERS_CELL:
        found.append(f"parameters cell longer than {LONGEST_PARAMETERS_CELL} lines")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernelspec is not python3")
    if set(notebook.metadata) - {"kernelspec", "language_info"}:
        found.append(f"volatile metadata: {sorted(set(notebook.metadata) - {'kernelspec', 'language_info'})}")
    for number, cell in enumerate(notebook.cells):
        where = f"cell {number}"
        if set(cell.metadata) - {"tags"}:
            found.append(f"{where}: metadata {sorted(set(cell.metadata) - {'tags'})}")
        for pattern, reason in FORBIDDEN.items():
            if cell.cell_type == "code" and re.search(pattern, cell.source):
                found.append(f"{where}: {re.search(pattern, cell.source).group(0).strip()!r}: {reason}")
        if cell.cell_type == "code":
            if cell.outputs or cell.execution_count is not None:
                found.append(f"{where}: has outputs or a count; run nbstripout {paths.shorten(path)}")
            if len(cell.source.splitlines()) > LONGEST_CELL:
                found.append(f"{where}: {len(cell.source.splitlines())} lines, more than {LONGEST_CELL}")
            longest = max(map(len, cell.source.splitlines()), default=0)
            if longest > LONGEST_LINE and cell not in tagged:
                found.append(f"{where}: a line of {longest} characters, more than {LONGEST_LINE}")
            if not cell.source.strip():
                found.append(f"{where}: empty")
    parameters = {name for cell in tagged for name in assigned(cell.source)}
    for cell in code:
        overwritten = parameters & assigned(cell.source) if cell not in tagged else set()
        found += [f"overwrites the parameter {name}, which the provenance then shows" for name in sorted(overwritten)]
    return found


def assigned(source: str) -> set[str]:
    """Names that a cell binds for those after it: not in functions or comprehensions."""
    own = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    try:
        waiting = [ast.parse(source)]
    except SyntaxError:  # a magic command, which is told above
        return set()
    names = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, own)]
    return names


def test_every_notebook_is_clean():
    found = {path.name: problems(path) for path in sorted(paths.notebooks().glob("*.ipynb"))}
    assert not any(found.values()), "\n".join(f"{name}: {problem}" for name in found for problem in found[name])


def test_notebooks_are_numbered_without_gaps():
    names = sorted(path.name for path in paths.notebooks().glob("*.ipynb"))
    assert [name[:3] for name in names] == [f"{number:02d}_" for number in range(1, len(names) + 1)]


def test_every_parameter_has_a_comment():
    for path in sorted(paths.notebooks().glob("*.ipynb")):
        (cell,) = [cell for cell in nbformat.read(path, as_version=4).cells
                   if "parameters" in cell.metadata.get("tags", [])]
        lines = cell.source.splitlines()
        for statement in ast.parse(cell.source).body:
            own = lines[statement.lineno - 1:statement.end_lineno]
            assert any("#" in line for line in own), f"{path.name}: no comment beside `{own[0]}`"


GOOD = ['profile = "smoke"  # size\nsteps = 1  # steps', "print(profile, steps)"]


def write(folder, code, question="# How well?", **changes):
    """A notebook with `code` cells, the first of them the parameters."""
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.cells = [nbformat.v4.new_markdown_cell(question)]
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in code]
    notebook.cells[1].metadata["tags"] = ["parameters"]
    for name, value in changes.items():
        notebook.cells[-1][name] = value
    nbformat.write(notebook, folder / "01_toy.ipynb")
    return folder / "01_toy.ipynb"


def test_the_checks_accept_a_good_notebook(tmp_path):
    assert problems(write(tmp_path, GOOD)) == []
    assert problems(write(tmp_path, [*GOOD, "print([steps for steps in range(3)])\n\ndef f():\n    steps = 2"])) == []


@pytest.mark.parametrize("code, word", [
    ([*GOOD, "!pip install x"], "pip"),
    ([*GOOD, "%cd .."], "cd"),
    ([*GOOD, "import os\nos.chdir('..')"], "chdir"),
    ([*GOOD, "open('/data/x')"], "absolute"),
    ([*GOOD, 'if profile == "mini":\n    pass'], "branch"),
    ([*GOOD, 'x = 1 if profile == "mini" else 2'], "branch"),
    ([*GOOD, "\n".join(["x = 1"] * 31)], "31 lines"),
    (GOOD + ["x = 1"] * 21, "23 code cells"),
    (["profile = 'smoke'\n" + "\n".join(f"a{n} = 1" for n in range(10))], "longer than 10"),
    ([*GOOD, "from tqdm.auto import tqdm"], "tqdm"),
    ([*GOOD, "x = " + 117 * "1"], "121 characters"),
    ([*GOOD, ""], "empty"),
    ([*GOOD, "for steps in range(3):\n    print(steps)"], "parameter steps"),
])
def test_the_checks_refuse_bad_code(tmp_path, code, word):
    assert any(word in problem for problem in problems(write(tmp_path, code)))


def test_the_checks_refuse_outputs_counts_metadata_and_a_missing_question(tmp_path):
    output = nbformat.v4.new_output("stream", text="x")
    assert any("nbstripout" in p for p in problems(write(tmp_path, GOOD, outputs=[output])))
    assert any("nbstripout" in p for p in problems(write(tmp_path, GOOD, execution_count=3)))
    assert any("metadata" in p for p in problems(write(tmp_path, GOOD, metadata={"papermill": {}})))
    assert any("question" in p for p in problems(write(tmp_path, GOOD, question="# Detection")))


@pytest.mark.parametrize("path", sorted(paths.notebooks().glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_committed_report_is_an_execution_of_this_notebook(path):
    """Whoever changes a notebook runs it again: `dvc repro report@mini`."""
    executed = nbformat.read(paths.ROOT / "reports" / "mini" / path.name, as_version=4)
    shown = [cell.source for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    assert shown == [cell.source for cell in nbformat.read(path, as_version=4).cells]
