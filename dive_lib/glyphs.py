"""The raw input of the default profile: 1797 handwritten digits with a fixed, disjoint split.

`data/` (tracked by `data.dvc`) holds one grey atlas, `digits.png`, and one table, `digits.csv`. The glyphs
are the 8 x 8 images, grey levels 0..16, of the UCI data set "Optical Recognition of Handwritten Digits" that
scikit-learn ships; the atlas stores 15 times the level, which 8 bits hold exactly, so nothing is lost.
`export` wrote the folder and writes it again anywhere.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from dive_lib.files import atomic_path, read_csv, write_csv, write_text
from dive_lib.paths import shorten

SPLITS = {"train": 1300, "val": 200, "test": 297}
"""Glyphs per split. Each glyph belongs to one split."""

COUNT = sum(SPLITS.values())
SIDE = 8
LEVELS = 16  # a pixel counts the inked ones of 4 x 4, so it is 0..16
SCALE = 15  # grey value = SCALE * level, at most 240
COLUMNS = 40  # glyphs per line of the atlas
SEED = 0

README = """\
# Handwritten digits

1797 digits (8 x 8 pixels, grey levels 0 to 16) of "Optical Recognition of Handwritten Digits" by E. Alpaydin
and C. Kaynak, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49, licence CC BY 4.0, in the copy that
scikit-learn ships (`sklearn.datasets.load_digits`; the 13 writers of UCI's test set).

- `digits.png`: all glyphs in one grey image, 40 per line, line by line in the order of their index; grey
  value = 15 x level.
- `digits.csv`: `index` (place in the atlas and in scikit-learn's array), `label` (0 to 9), `split` (train
  1300, val 200, test 297; a seeded permutation). Each glyph is in one split. The source does not say who
  wrote which glyph, so a writer may occur in several splits.

Read with `dive_lib.glyphs.load("data", "train")`. Written by `dive_lib.glyphs.export("data")`, which gives
the same pixels and the same table again.
"""


def export(directory: str | Path) -> Path:
    """Writes `digits.png`, `digits.csv` and `README.md` into `directory` from scikit-learn's copy,
    deterministically.

    Returns the directory. Existing files are replaced.
    """
    from sklearn.datasets import load_digits  # only needed to write the folder, not to read it

    digits = load_digits()
    directory = Path(directory)
    levels = digits.images.round().astype(np.uint8)
    if levels.shape != (COUNT, SIDE, SIDE) or (levels != digits.images).any() or levels.max() != LEVELS:
        raise ValueError("sklearn.datasets.load_digits is not the known set of 1797 glyphs with levels "
                         "0..16; use the scikit-learn version of the lock file")
    with atomic_path(directory / "digits.png") as temporary:
        Image.fromarray(_to_atlas(levels * SCALE)).save(temporary, format="PNG", optimize=True)
    # RandomState rather than default_rng: NumPy guarantees its stream for ever.
    order = np.random.RandomState(SEED).permutation(COUNT)
    split_of = np.empty(COUNT, dtype=object)
    split_of[order] = np.repeat(list(SPLITS), list(SPLITS.values()))
    write_csv(directory / "digits.csv", [
        {"index": i, "label": int(label), "split": split} for i, (label, split) in enumerate(
            zip(digits.target, split_of, strict=True))])
    write_text(directory / "README.md", README)
    return directory


def load(directory: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the glyphs of one split.

    Returns glyphs (n, 8, 8) float32 in [0, 1] (0 = paper, 1 = ink) and labels (n,) int64, in the order of
    their index. Raises `FileNotFoundError` when the folder or a file is missing and `ValueError` when a file
    is not what `export` wrote; both name the file and the remedy.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the digits; choose one of {', '.join(SPLITS)}")
    directory = Path(directory)
    for path in (directory / "digits.png", directory / "digits.csv"):
        if not path.is_file():
            raise FileNotFoundError(f"{shorten(path)}: no such file; run `dvc pull data.dvc`")
    levels = _read_atlas(directory / "digits.png")
    labels, splits = _read_table(directory / "digits.csv")
    mine = splits == split
    return (levels[mine] / LEVELS).astype(np.float32), labels[mine]


def stretch(glyph: np.ndarray, width: int, height: int) -> np.ndarray:
    """A glyph (8, 8) in [0, 1], cropped to its strokes and resized bicubically, which may leave [0, 1] a little:
    (height, width) float32."""
    rows, columns = np.flatnonzero((glyph > 0.2).any(1)), np.flatnonzero((glyph > 0.2).any(0))
    crop = glyph[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].astype(np.float32)
    return np.asarray(Image.fromarray(crop).resize((width, height), Image.BICUBIC))


def _to_atlas(glyphs: np.ndarray) -> np.ndarray:
    """(n, 8, 8) to one image, `COLUMNS` glyphs per line; unused places are 0."""
    rows = -(-len(glyphs) // COLUMNS)
    padded = np.zeros((rows * COLUMNS, SIDE, SIDE), glyphs.dtype)
    padded[:len(glyphs)] = glyphs
    return padded.reshape(rows, COLUMNS, SIDE, SIDE).swapaxes(1, 2).reshape(rows * SIDE, COLUMNS * SIDE)


def _read_atlas(path: Path) -> np.ndarray:
    """Grey levels (1797, 8, 8) in 0..16."""
    try:
        with Image.open(path) as image:
            mode, atlas = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
        raise _damaged(path, f"cannot be decoded ({error})") from None
    rows = -(-COUNT // COLUMNS)
    if mode != "L" or atlas.shape != (rows * SIDE, COLUMNS * SIDE):
        raise _damaged(path, f"is a {atlas.shape[1]} x {atlas.shape[0]} image of mode {mode} instead of a "
                             f"grey one of {COLUMNS * SIDE} x {rows * SIDE}")
    levels, rest = np.divmod(atlas, SCALE)
    if rest.any() or levels.max() > LEVELS:
        raise _damaged(path, f"has grey values other than {SCALE} x (0..{LEVELS})")
    return levels.reshape(rows, SIDE, COLUMNS, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)[:COUNT]


def _read_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (1797,) int64 and split names (1797,)."""
    rows = read_csv(path)
    if len(rows) != COUNT or list(rows[0]) != ["index", "label", "split"]:
        raise _damaged(path, f"has {len(rows)} rows with columns {list(rows[0]) if rows else []} instead of "
                             f"{COUNT} with index, label, split")
    for i, row in enumerate(rows):
        if row["index"] != str(i) or row["label"] not in set("0123456789") or row["split"] not in SPLITS:
            raise _damaged(path, f"line {i + 2} is not a valid record: {','.join(map(str, row.values()))}")
    splits = np.array([row["split"] for row in rows])
    sizes = {name: int((splits == name).sum()) for name in SPLITS}
    if sizes != SPLITS:
        raise _damaged(path, f"has splits of {sizes} instead of {SPLITS}")
    return np.array([int(row["label"]) for row in rows], dtype=np.int64), splits


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"{shorten(path)}: {problem}; delete it and run `dvc pull data.dvc`")
