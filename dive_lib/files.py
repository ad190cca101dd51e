"""Atomic writing and checked reading of small files (JSON, CSV, text).

A reader sees the old content or the new one, never half a file: everything is written to a hidden neighbour
`.<stem>.<process id>.tmp<suffix>` and renamed into place.  A killed process can leave such a neighbour behind; Git and
DVC ignore the pattern.  Text is UTF-8 with `\\n` line ends, so that equal content means equal bytes on every system.
"""

import contextlib
import csv
import fcntl
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dive_lib.paths import shorten


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path next to `path`; when the block ends well, rename it to `path`.

    The temporary name keeps the suffix, because savers such as `Figure.savefig` choose the format by it.  Parent
    folders are made.  If the block raises, nothing changes at `path`.  A block that wrote nothing is an error
    (`FileNotFoundError`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(f"{shorten(path)}: nothing was written to the temporary file {temporary.name}")
        with open(temporary, "rb") as handle:  # the data must be on the disk before its name is
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text` atomically and return the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | os.PathLike, obj: Any) -> Path:
    """Write `obj` atomically as indented JSON (one final newline, key order kept).

    NumPy and PyTorch scalars and arrays become numbers and lists.  NaN and infinity are refused with `ValueError`,
    because JSON has no such numbers; store `None` instead.
    """
    return write_text(path, json_text(obj, path))


def json_text(obj: Any, path: str | os.PathLike = "value") -> str:
    """The text that `write_json` writes; `path` only names the record in an error message."""
    try:
        return json.dumps(_plain(obj), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        where = _first_bad(_plain(obj))
        raise type(error)(f"{path}: cannot be written as JSON at {where}: {error}; store a number, text or null") \
            from error


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.  A missing or damaged file raises an error that names it and says what to do."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{shorten(path)}: no such file; run the stage that writes it (dvc repro)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{shorten(path)}: not valid JSON ({error}); delete it and run the stage again") from None


def merge_json(path: str | os.PathLike, update: Mapping) -> dict:
    """Merge `update` into the JSON object at `path` (made if absent), atomically, and return the result.

    Nested objects are merged key by key, other values replaced; keys are sorted so that the order in which stages
    ran leaves no trace.  Several processes may call this at once on one machine (a lock file serialises them).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.stem}.lock.tmp"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged = _sorted(_merged(read_json(path) if path.exists() else {}, _plain(update)))
        write_json(path, merged)
    return merged


def write_csv(path: str | os.PathLike, rows: Iterable[Mapping] | Any, columns: list[str] | None = None) -> Path:
    """Write a tidy table atomically: a header line, then one line per row.

    `rows` is a list of mappings or a pandas DataFrame (its index is not written).  `columns` fixes the order; by
    default it is that of first appearance.  Missing values and None become empty cells; floats are written with all
    their digits, so that reading gives back the same number.  A key outside `columns` is a `ValueError`.
    """
    if hasattr(rows, "to_dict"):
        columns = columns or list(rows.columns)
        rows = rows.to_dict("records")
    rows = [_plain(dict(row)) for row in rows]
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for number, row in enumerate(rows):
        try:
            writer.writerow({key: "" if _missing(value) else value for key, value in row.items()})
        except ValueError as error:
            raise ValueError(f"{shorten(path)}: row {number}: {error}; name the column in `columns`") from None
    return write_text(path, text.getvalue())


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """Read a table written by `write_csv` as a list of rows of strings (use pandas for typed columns)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{shorten(path)}: no such file; run the stage that writes it (dvc repro)")
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def _plain(obj: Any) -> Any:
    """Python values for NumPy and PyTorch ones, recursively; other objects are left for `json` to refuse."""
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, os.PathLike):
        raise TypeError(f"a path ({obj}) would tie the file to this machine; store a name")
    if hasattr(obj, "tolist"):
        return obj.tolist()
    return obj


def rounded(value: Any, digits: int = 4) -> Any:
    """Floats with so many decimals, as tracked files keep them; in mappings, lists and arrays, recursively."""
    value = _plain(value)
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry, digits) for entry in value]
    return round(value, digits) + 0.0 if isinstance(value, float) else value  # + 0.0: no negative zero


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _first_bad(obj: Any, where: str = "top level") -> str:
    """Place of the first value that JSON cannot hold, as keys joined by dots."""
    children = obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, list) else ()
    for key, value in children:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            return _first_bad(value, str(key) if where == "top level" else f"{where}.{key}")
    return where


def _merged(old: dict, new: dict) -> dict:
    both = dict(old)
    for key, value in new.items():
        nested = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = _merged(both[key], value) if nested else value
    return both


def _sorted(obj: Any) -> Any:
    return {key: _sorted(obj[key]) for key in sorted(obj)} if isinstance(obj, dict) else obj
