"""The raw digits: what was exported is what scikit-learn has, and damaged copies are refused."""

import csv

import numpy as np
import pytest
from PIL import Image

from dive_lib import glyphs, paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return glyphs.export(tmp_path_factory.mktemp("digits"))


def test_splits_hold_each_glyph_once(folder):
    from sklearn.datasets import load_digits
    digits = load_digits()
    with open(folder / "digits.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    covered = []
    for split, size in glyphs.SPLITS.items():
        index = [int(row["index"]) for row in rows if row["split"] == split]
        images, labels = glyphs.load(folder, split)
        assert images.shape == (size, 8, 8) and images.dtype == np.float32
        assert labels.shape == (size,) and labels.dtype == np.int64
        assert (images * 16 == digits.images[index]).all(), "the atlas must give the grey levels back exactly"
        assert (labels == digits.target[index]).all()
        assert set(labels) == set(range(10))
        covered += index
    assert sorted(covered) == list(range(1797))


def test_export_is_deterministic(folder, tmp_path):
    glyphs.export(tmp_path)
    for name in ("digits.png", "digits.csv", "README.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 3, "no temporary file stays"


def test_tracked_folder_is_the_exported_one(folder):
    if not (paths.data() / "digits.png").exists():
        pytest.skip("data/ is not here; run `dvc pull data.dvc`")
    assert (paths.data() / "digits.csv").read_bytes() == (folder / "digits.csv").read_bytes()
    for split in glyphs.SPLITS:
        assert (glyphs.load(paths.data(), split)[0] == glyphs.load(folder, split)[0]).all()


def test_missing_folder_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"digits\.png: no such file; run `dvc pull data\.dvc`"):
        glyphs.load(tmp_path / "absent", "train")


def test_unknown_split(folder):
    with pytest.raises(ValueError, match="unknown split 'valid'.*train, val, test"):
        glyphs.load(folder, "valid")


def _replace(old, new):
    def damage(folder):
        text = (folder / "digits.csv").read_text()
        assert old in text
        (folder / "digits.csv").write_text(text.replace(old, new, 1))
    return damage


def _cut(folder):
    path = folder / "digits.png"
    path.write_bytes(path.read_bytes()[:2000])


def _repaint(change):
    def damage(folder):
        atlas = np.asarray(Image.open(folder / "digits.png"))
        Image.fromarray(change(atlas.copy())).save(folder / "digits.png")
    return damage


def _brighten(atlas):
    atlas[0, 0] = 7
    return atlas


@pytest.mark.parametrize("damage, message", [
    (_cut, r"digits\.png: cannot be decoded"),
    (_repaint(lambda atlas: atlas[:-8]), r"digits\.png: is a 320 x 352 image .* 320 x 360"),
    (_repaint(lambda atlas: np.stack([atlas] * 3, -1)), r"digits\.png: .* of mode RGB"),
    (_repaint(_brighten), r"digits\.png: has grey values other"),
    (_replace("label", "class"), r"digits\.csv: .*columns \['index', 'class', 'split'\]"),
    (_replace("\n0,0,", "\n0,12,"), r"digits\.csv: line 2 is not a valid record: 0,12"),
    (_replace("\n5,5,", "\n6,5,"), r"digits\.csv: line 7 is not a valid record"),
    (_replace(",train\n", ",test\n"), r"digits\.csv: has splits of .*'train': 1299"),
    (lambda folder: (folder / "digits.csv").write_text(""), r"digits\.csv: has 0 rows"),
])
def test_damaged_copy_is_refused(damage, message, tmp_path):
    glyphs.export(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message + ".*dvc pull"):
        glyphs.load(tmp_path, "train")
