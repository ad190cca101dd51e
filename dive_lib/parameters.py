"""Parameters of notebooks and profiles, compared strictly.

A notebook declares its parameters in the one code cell tagged `parameters`: literal assignments whose values are those
of the smallest profile (`smoke`), among them `profile = "smoke"`.  `params.yaml` gives every profile a group of values
for every notebook; the group is named after the notebook without its number (`05_detection.ipynb` -> `detection`):

    mini:
      detection: {steps: 400, learning_rate: 0.1}

Papermill by itself only warns about a misspelt name and reads `1e-4` as text.  Here an unknown, missing or ill-typed
parameter stops the run before a kernel starts.  The types are those of the notebook's defaults:

* int, str and bool must match exactly; an int is taken where the default is a float (and becomes one);
* a list's items are compared with the default's first item, a dict's keys and values with the default's; an empty
  list or dict as default accepts any content;
* a default of None accepts None, a bool, a number or a text; None is accepted nowhere else, because an empty value in
  the YAML file (`steps:`) is None too.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dive_lib.files import read_json
from dive_lib.paths import ROOT, shorten

PARAMS = ROOT / "params.yaml"
NAMED = ("architectures", "searches", "class_searches")
"""Top-level keys of `params.yaml` that are no profile: settings with names, which the profiles refer to."""
DOWNLOADS = ("downloads/", "checkpoints/")
"""Folders of what no stage makes."""
LANES = "lanes"
"""The other one: stages that `make repro` runs side by side (`dive_lib.lanes`)."""


class ParameterError(ValueError):
    """A parameter file, notebook or command line is wrong; the message names the place and the remedy."""


def load(profile: str, path: Path | None = None) -> dict[str, dict[str, Any]]:
    """The groups of `profile` in `params.yaml`, for example `{"detection": {"steps": 400}}`.

    All profiles must have the same groups and keys, nested ones included, because they are one pipeline at different
    sizes; `ParameterError` names the first difference, or the known profiles if `profile` is none of them.
    """
    every = load_all(path)
    _need(profile, every, path)
    return every[profile]


def load_all(path: Path | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """All profiles: `{profile: {group: {name: value}}}`, checked as described at `load`."""
    return _profiles(_read(path), path)


def _profiles(everything: dict[str, Any], path: Path | None) -> dict[str, dict[str, dict[str, Any]]]:
    every = {key: value for key, value in everything.items() if key not in (*NAMED, LANES)}
    path = path or PARAMS
    first = next(iter(every), "")
    for profile, groups in every.items():
        for group, values in (groups or {"": None}).items() if isinstance(groups, dict) else [("", None)]:
            if not isinstance(values, dict):
                raise ParameterError(f"{shorten(path)}: {profile}.{group} must be a mapping of names to values")
        _same_keys(every[first], groups, first, profile, shorten(path))
    return every


def _need(profile: str, every: Mapping[str, Any], path: Path | None) -> None:
    if profile not in every:
        raise ParameterError(f"{shorten(path or PARAMS)}: no profile {profile!r}; choose one of {', '.join(every)}")


def _read(path: Path | None) -> dict[str, Any]:
    path = path or PARAMS
    if not path.is_file():
        raise ParameterError(f"{shorten(path)}: no such file; restore it with git checkout")
    try:
        every = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ParameterError(f"{shorten(path)}: not valid YAML: {error}") from None
    if not isinstance(every, dict) or not every:
        raise ParameterError(f"{shorten(path)}: expected `profile: group: name: value`")
    return every


def named(kind: str, family: str, name: str, path: Path | None = None) -> dict[str, Any]:
    """Named settings, for example `named("architectures", "layout_ldm", "LDM-8")`; notebooks get the name alone."""
    families = _read(path).get(kind, {})
    if name not in families.get(family, {}):
        known = ", ".join(families.get(family, {})) or "none"
        raise ParameterError(f"{shorten(path or PARAMS)}: no {kind}.{family}.{name}; choose one of {known}")
    return families[family][name]


def lanes(profile: str, path: Path | None = None) -> list[list[str]]:
    """Rounds of lanes of a profile, [["layout_ldm", "classifiers vermouth_data"]]; none for a profile without any."""
    everything = _read(path)
    profiles, every = _profiles(everything, path), everything.get(LANES) or {}
    place = f"{shorten(path or PARAMS)}: {LANES}"
    _need(profile, profiles, path)
    if not isinstance(every, dict) or not every.keys() <= profiles.keys():
        raise ParameterError(f"{place} must name profiles, of which there are {', '.join(profiles)}")
    rounds = every.get(profile) or []
    well = isinstance(rounds, list) and all(isinstance(lanes, list) and lanes for lanes in rounds) and \
        all(isinstance(lane, str) and lane.split() for lanes in rounds for lane in lanes)
    stages = " ".join(lane for lanes in rounds for lane in lanes).split() if well else []
    if not well or len(stages) > len(set(stages)):
        raise ParameterError(f"{place}.{profile} must be a list of rounds, each a list of lanes, each the names of "
                             "stages with spaces between them; and no stage twice")
    return rounds


def missing_downloads(profile: str, path: Path | None = None) -> list[str]:
    """What a profile reads in `downloads/` and `checkpoints/` and is not there, relative to the repository root.

    Of the profile's groups and of the classifiers that it names: the other named settings have no files.
    """
    groups = load(profile, path)
    networks = groups.get("classifiers", {}).get("networks")
    asked = [groups, named("architectures", "classifiers", networks, path) if networks else {}]
    return [text for text in dict.fromkeys(_texts(asked))
            if text.startswith(DOWNLOADS) and not (ROOT / text).exists()]


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _same_keys(one: Any, other: Any, one_at: str, other_at: str, path: str) -> None:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return
    for here, there, at in ((one, other, other_at), (other, one, one_at)):
        missing = [key for key in here if key not in there]
        if missing:
            names = ", ".join(map(str, missing))
            raise ParameterError(f"{path}: {at} lacks {names}; every profile needs the same keys")
    for key in one:
        _same_keys(one[key], other[key], f"{one_at}.{key}", f"{other_at}.{key}", path)


def group_name(notebook: str | Path) -> str:
    """`notebooks/05_detection.ipynb` -> `detection`."""
    return re.sub(r"^\d+_", "", Path(notebook).stem)


def declared(notebook: str | Path) -> dict[str, Any]:
    """The defaults of a notebook's parameters cell, in order, as Python values.

    The cell is read, not run: each line is `name = literal`.  `ParameterError` if there is no such cell or several,
    or if it holds anything else.
    """
    path = Path(notebook)
    if not path.is_file():
        raise ParameterError(f"{shorten(path)}: no such notebook")
    cells = [cell for cell in read_json(path)["cells"]  # nbformat takes a second to load, and every notebook asks
             if cell["cell_type"] == "code" and "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"{shorten(path)}: {len(cells)} cells are tagged `parameters`; tag exactly one")
    values: dict[str, Any] = {}
    for statement in ast.parse("".join(cells[0]["source"])).body:
        try:
            if isinstance(statement, ast.AnnAssign):
                (target,) = [statement.target]
            else:
                (target,) = statement.targets
            values[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError, TypeError):
            raise ParameterError(f"{shorten(path)}: parameters cell, line {statement.lineno}: expected "
                                 "`name = literal`; compute derived values in the next cell") from None
    if "profile" not in values:
        raise ParameterError(f"{shorten(path)}: the parameters cell must set `profile`")
    return values


def resolve(notebook: str | Path, profile: str, overrides: Mapping[str, str] | Iterable[str] = (),
            path: Path | None = None) -> dict[str, Any]:
    """The values with which to run `notebook`: those of `profile`, then `overrides` (`"steps=400"` or a mapping of
    names to text; `model.width=32` reaches into a dict), checked against the notebook's declaration and in its order.
    """
    defaults = declared(notebook)
    group = group_name(notebook)
    groups = load(profile, path)
    where = f"{shorten(path or PARAMS)}: {profile}.{group}"
    if group not in groups:
        raise ParameterError(f"{where} is missing; {shorten(notebook)} needs a group of that name")
    given = groups[group]
    expected = {name: value for name, value in defaults.items() if name != "profile"}
    unknown = [name for name in given if name not in expected]
    missing = [name for name in expected if name not in given]
    if unknown:
        raise ParameterError(f"{where}: {', '.join(unknown)} unknown to the parameters cell of {shorten(notebook)}, "
                             f"which has {', '.join(expected) or 'none'}")
    if missing:
        raise ParameterError(f"{where} lacks {', '.join(missing)}, which {shorten(notebook)} declares")
    values = {name: checked(given[name], default, f"{where}.{name}") for name, default in expected.items()}
    values["profile"] = profile
    for name, text in assignments(overrides).items():
        _set(values, defaults, name, text, where=f"--set {name}")
    return {name: values[name] for name in defaults}


def assignments(overrides: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    """`["steps=400"]` -> `{"steps": "400"}`; a mapping is returned as it is."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    pairs = {}
    for item in overrides:
        name, equals, text = item.partition("=")
        if not (equals and name) or name in pairs:
            raise ParameterError(f"--set {item}: expected name=value, each name once")
        pairs[name] = text
    return pairs


def _set(values: dict, defaults: dict, name: str, text: str, where: str) -> None:
    head, _, tail = name.partition(".")
    if head not in defaults or head == "profile":
        known = ", ".join(key for key in defaults if key != "profile")
        raise ParameterError(f"{where}: unknown parameter; choose one of {known}")
    if tail:
        if not isinstance(defaults[head], dict):
            raise ParameterError(f"{where}: {head} is not a dict")
        values[head] = dict(values[head])
        _set(values[head], defaults[head], tail, text, where)
    else:
        values[head] = parse(text, defaults[head], where)


def parse(text: str, default: Any, where: str = "value") -> Any:
    """The value that `text` stands for where the notebook's default is `default` (YAML 1.2, so `1e-4` is a float)."""
    if isinstance(default, str):
        return text
    try:
        value = YAML(typ="safe").load(text)
    except YAMLError:
        raise ParameterError(f"{where}: {text!r} is not a value") from None
    return checked(value, default, where)


def checked(value: Any, default: Any, where: str = "value") -> Any:
    """`value` if it has the type of `default` (rules in the module's docstring), else `ParameterError`.

    An int becomes a float where the default is one, inside lists and dicts too.
    """
    if default is None and not isinstance(value, (dict, list)):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, tuple):
        default = list(default)
    if type(value) is not type(default):
        raise ParameterError(f"{where}: {value!r} is {_kind(value)}, but the notebook's default {default!r} is "
                             f"{_kind(default)}")
    if isinstance(default, list) and default:
        return [checked(item, default[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(default, dict) and default:
        different = sorted(set(map(str, value)) ^ set(map(str, default)))
        if different:
            raise ParameterError(f"{where}: keys differ from the notebook's default in {', '.join(different)}")
        return {key: checked(value[key], default[key], f"{where}.{key}") for key in default}
    return value


def _kind(value: Any) -> str:
    return "empty (null)" if value is None else f"of type {type(value).__name__}"
