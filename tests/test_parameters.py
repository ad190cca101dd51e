"""Strict parameters: profiles agree, notebooks and `params.yaml` agree, wrong values stop with a message."""

import nbformat
import pytest

from dive_lib import parameters, paths
from dive_lib.parameters import ParameterError

CELL = '''profile = "smoke"  # size of the run
steps = 20             # optimisation steps
rate = 1e-3            # learning rate
model = {"width": 32, "levels": [1, 2], "dropout": 0.0}
limit = None           # use this many images'''

PARAMS = """
smoke:
  toy: {steps: 20, rate: 1e-3, model: {width: 32, levels: [1, 2], dropout: 0.0}, limit: null}
large:
  toy: {steps: 400, rate: 1, model: {width: 64, levels: [1, 2, 4], dropout: 1}, limit: 5}
"""


@pytest.fixture
def toy(tmp_path):
    """Paths of a notebook and a parameter file that agree."""
    return make(tmp_path, CELL), write(tmp_path, PARAMS)


def make(folder, *sources, name="05_toy.ipynb"):
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / name)
    return folder / name


def write(folder, text):
    (folder / "params.yaml").write_text(text)
    return folder / "params.yaml"


def all_notebooks():
    return sorted(paths.notebooks().glob("*.ipynb"))


def test_profiles_of_this_repository_have_the_same_keys():
    profiles = parameters.load_all()
    assert set(profiles) == {"smoke", "mini", "paper"}


def test_every_group_belongs_to_one_notebook():
    assert sorted(parameters.load("smoke")) == sorted(parameters.group_name(path) for path in all_notebooks())


def test_notebook_defaults_are_the_smoke_profile():
    for notebook in all_notebooks():
        assert parameters.resolve(notebook, "smoke") == parameters.declared(notebook), notebook.name
        assert repr(parameters.resolve(notebook, "smoke")) == repr(parameters.declared(notebook)), notebook.name


def test_every_profile_resolves_for_every_notebook():
    for notebook in all_notebooks():
        for profile in parameters.load_all():
            assert parameters.resolve(notebook, profile)["profile"] == profile


def test_values_are_those_of_the_profile_in_the_order_of_the_cell(toy):
    notebook, params = toy
    values = parameters.resolve(notebook, "large", path=params)
    assert list(values) == ["profile", "steps", "rate", "model", "limit"]
    assert values == {"profile": "large", "steps": 400, "rate": 1.0, "limit": 5,
                      "model": {"width": 64, "levels": [1, 2, 4], "dropout": 1.0}}
    assert isinstance(values["rate"], float) and isinstance(values["model"]["dropout"], float)
    assert parameters.resolve(notebook, "smoke", path=params) == parameters.declared(notebook)


def test_overrides(toy):
    notebook, params = toy
    values = parameters.resolve(notebook, "smoke", ["steps=5", "rate=1e-4", "model.width=8", "limit=null"], params)
    assert (values["steps"], values["rate"], values["model"]["width"], values["limit"]) == (5, 1e-4, 8, None)
    assert parameters.declared(notebook)["model"]["width"] == 32


@pytest.mark.parametrize("override, message", [
    ("stepz=5", "stepz: unknown parameter; choose one of steps"),
    ("model.depth=5", "unknown parameter"),
    ("steps.x=5", "steps is not a dict"),
    ("profile=large", "unknown parameter"),
    ("steps=5.5", "5.5 is of type float"),
    ("steps=", "empty"),
    ("steps=true", "of type bool"),
    ("model={width: 1}", "keys differ .* dropout, levels"),
    ("model.levels=[1, a]", r"levels\[1\]: 'a' is of type str"),
    ("rate=fast", "of type str"),
    ("steps=[1", "not a value"),
    ("steps", "expected name=value"),
])
def test_wrong_overrides_stop(toy, override, message):
    notebook, params = toy
    with pytest.raises(ParameterError, match=message):
        parameters.resolve(notebook, "smoke", [override], params)


@pytest.mark.parametrize("old, new, message", [
    ("steps: 20", "stepz: 20", "smoke lacks steps|smoke.toy lacks steps|lacks stepz"),
    ("width: 32", "wide: 32", "lacks wid"),
    ("steps: 20", "steps: '20'", "smoke.toy.steps: '20' is of type str"),
    ("steps: 20", "steps: true", "of type bool"),
    ("steps: 20", "steps: ", "smoke.toy.steps: None is empty"),
    ("width: 32", "width: 32.5", "smoke.toy.model.width: 32.5 is of type float"),
    ("  toy: {steps: 20", "  toy: {steps: 20, steps: 21", "not valid YAML"),
    ("smoke:", "tiny:", "no profile 'smoke'; choose one of tiny, large"),
])
def test_wrong_parameter_files_stop(tmp_path, old, new, message):
    params = write(tmp_path, PARAMS.replace(old, new, 1))
    assert params.read_text() != PARAMS
    with pytest.raises(ParameterError, match=message):
        parameters.resolve(make(tmp_path, CELL), "smoke", path=params)


def test_notebook_and_file_must_name_the_same_parameters(tmp_path):
    params = write(tmp_path, PARAMS)
    with pytest.raises(ParameterError, match="extra, which .*05_toy.ipynb declares"):
        parameters.resolve(make(tmp_path, CELL + "\nextra = 1"), "smoke", path=params)
    with pytest.raises(ParameterError, match="rate unknown to the parameters cell"):
        parameters.resolve(make(tmp_path, CELL.replace("rate =", "rat =")), "smoke", path=params)
    with pytest.raises(ParameterError, match="smoke.other is missing"):
        parameters.resolve(make(tmp_path, CELL, name="06_other.ipynb"), "smoke", path=params)


@pytest.mark.parametrize("sources, message", [
    ([], "0 cells are tagged"),
    ([CELL, CELL], "2 cells are tagged"),
    ([CELL + "\ntwice = steps * 2"], "line 6: expected `name = literal`"),
    (["steps = 1"], "must set `profile`"),
    ([CELL + "\nimport os"], "line 6"),
])
def test_wrong_parameter_cells_stop(tmp_path, sources, message):
    with pytest.raises(ParameterError, match=message):
        parameters.declared(make(tmp_path, *sources))


def test_group_names():
    assert parameters.group_name("notebooks/05_detection.ipynb") == "detection"
    assert parameters.group_name("03_layout_ldm.ipynb") == "layout_ldm"
