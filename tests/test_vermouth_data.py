"""The data of Vermouth's tasks: drawn images, and the loaders of the public layouts on tiny folders like them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dive_lib import colour_scenes, digit_renderings, few_shot_data, glyphs, paths, segmentation_data, sketch_data
from dive_lib import vermouth_data
from dive_lib.class_images import ClassFolderError
from dive_lib.files import write_json, write_text

COUNTS = {"photo": {"train": 3, "val": 1, "test": 2}, "sketch": {"train": 2, "val": 1, "test": 1},
          "scene": {"train": 12, "val": 3, "test": 6}}
UNSEEN = ["two", "four", "six", "eight", "nine"]
SETTINGS = {"few_shot": ["digits"], "sketches": {"sets": ["digits"], "splits": ["train", "val", "test"], "held_out": 2},
            "segmentation": {"train": ["scenes", "train", "val"], "tests": ["scenes/test"]},
            "image_sizes": {"few_shot": 64, "sketches": 64, "segmentation": 64}, "seed": 0}


@pytest.fixture
def digits(tmp_path_factory, monkeypatch):
    folder = glyphs.export(tmp_path_factory.mktemp("digits"))
    monkeypatch.setattr(paths, "data", lambda: folder)
    return folder


def picture(path, side=12, colour=(200, 10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side + 3), colour).save(path)


def test_mini_data_are_described_once_and_loaded_again(tmp_path, digits):
    root = vermouth_data.make_mini(tmp_path / "made", COUNTS, UNSEEN, 0)
    made = vermouth_data.describe("x", root, **SETTINGS)
    again = vermouth_data.load("x")
    assert again.digests == made.digests and len(again.digits.train) == 30 and len(again.digits.test) == 20
    part = again.sketches["digits"]
    assert part.test.classes == tuple(UNSEEN) and set(part.held_out) < set(part.train.classes)
    assert not set(part.train.classes) & set(part.test.classes) and part.val.classes == part.held_out
    assert again.summary()[0]["train"] == 30
    with pytest.raises(FileNotFoundError, match="14_vermouth_data"):
        vermouth_data.load("y")


def test_the_same_seed_gives_the_same_images_and_another_replaces_them(tmp_path, digits):
    first, second = (vermouth_data.make_mini(tmp_path / name, COUNTS, UNSEEN, 0) for name in "ab")
    for name in ("digits/train/photo/one/00001.png", "digits/test/sketch/nine/00000.png",
                 "scenes/images/val/00002.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    before = (first / "digits/train/photo/one/00001.png").read_bytes()
    vermouth_data.make_mini(first, COUNTS, UNSEEN, 1)
    assert (first / "digits/train/photo/one/00001.png").read_bytes() != before


def test_unseen_combinations_occur_in_test_scenes_only(tmp_path, digits):
    counts = COUNTS | {"scene": {"train": 60, "val": 20, "test": 60}}
    root = vermouth_data.make_mini(tmp_path, counts, UNSEEN, 0)
    parts = {split: segmentation_data.read(root, "scenes", split, 64) for split in ("train", "val", "test")}
    unseen = [parts["train"].classes.index(name) for name in parts["train"].unseen]
    assert len(unseen) == 20
    pixels = {split: part.class_pixels()[unseen].sum().item() for split, part in parts.items()}
    assert pixels["train"] == pixels["val"] == 0 < pixels["test"]
    for words in (colour_scenes.COLOURS, colour_scenes.CLASSES):  # every word is met in training
        assert all(any(word in name.split() for name in parts["train"].classes if name not in parts["train"].unseen)
                   for word in words)


def test_a_label_map_has_the_names_of_its_digits(digits):
    glyph, labels = glyphs.load(digits, "val")
    pixels, values = colour_scenes.draw_scene(glyph, labels, np.random.default_rng(0), set(colour_scenes.NAMES))
    assert pixels.shape == (64, 64, 3) and values.shape == (64, 64)
    assert (values == 0).any() and (values > 0).any() and values.max() < len(colour_scenes.NAMES)


def test_sketches_are_thin(digits):
    filled = np.zeros((20, 30), bool)
    filled[5:15, 4:26] = True
    line = digit_renderings.thin(filled)
    assert line.any() and not (line & ~filled).any() and line.sum() < 40
    glyph, labels = glyphs.load(digits, "val")
    sketch = digit_renderings.draw_sketch(8, glyph, labels, np.random.default_rng(0))
    assert sketch.shape == (64, 64, 3) and 0.01 < (sketch[..., 0] > 128).mean() < 0.15


def test_shots_are_balanced_and_nested():
    labels = torch.arange(40) % 4
    few, more = few_shot_data.draw_shots(labels, 2, 3), few_shot_data.draw_shots(labels, 4, 3)
    assert torch.bincount(labels[few]).tolist() == [2] * 4 and set(few) < set(more)
    assert few_shot_data.draw_shots(labels, 2, 4) != few
    with pytest.raises(ValueError, match="10 training images, fewer than 11"):
        few_shot_data.draw_shots(labels, 11, 0)


def pets(root, **changes):
    listed = {split: [[f"{word}_{split}.jpg", label, word] for label, word in enumerate(("a_b", "c"))]
              for split in few_shot_data.SPLITS}
    for split in listed:
        for file, _, _ in listed[split]:
            picture(root / "oxford_pets" / "images" / file)
    write_json(root / "oxford_pets" / "split_zhou_OxfordPets.json", listed | changes)


def test_zhou_lists(tmp_path):
    pets(tmp_path)
    part = few_shot_data.read(tmp_path, "Pets", 8)
    assert part.classes == ("a b", "c") and part.train.load_images([0, 1]).shape == (2, 3, 8, 8)
    assert part.templates == ("a photo of a {}, a type of pet.",)


def test_a_set_may_have_phrasings_of_its_own(tmp_path):
    pets(tmp_path)
    own = tmp_path / "oxford_pets" / "templates.txt"
    own.write_text("a {}.\n\nmy {}\n")
    assert few_shot_data.read(tmp_path, "Pets", 8).templates == ("a {}.", "my {}")
    own.write_text("a {}.\nno name\n")
    with pytest.raises(ClassFolderError, match="templates.txt: 'no name' has not one {}"):
        few_shot_data.read(tmp_path, "Pets", 8)
    assert all(text.count("{}") == 1 for text in few_shot_data.TEMPLATES.values())
    assert few_shot_data.TEMPLATES.keys() <= few_shot_data.SETS.keys()


@pytest.mark.parametrize("name, images, listed", [  # as CoOp's DATASETS.md lays them out
    ("Pets", "oxford_pets/images", "OxfordPets"), ("Flowers102", "oxford_flowers/jpg", "OxfordFlowers"),
    ("DTD", "dtd/images", "DescribableTextures"), ("EuroSAT", "eurosat/2750", "EuroSAT"),
    ("Cars", "stanford_cars", "StanfordCars"), ("Food101", "food-101/images", "Food101"),
    ("SUN397", "sun397/SUN397", "SUN397"), ("Caltech101", "caltech-101/101_ObjectCategories", "Caltech101"),
    ("UCF101", "ucf101/UCF-101-midframes", "UCF101")])
def test_every_public_few_shot_set_with_a_zhou_list_is_read(tmp_path, name, images, listed):
    files = {split: [[f"{word}/{split}.jpg", label, word] for label, word in enumerate(("x_ray", "yak"))]
             for split in few_shot_data.SPLITS}
    for split in files:
        for file, label, _ in files[split]:
            picture(tmp_path / images / file, colour=(100 * label, 0, 0))
    write_json(tmp_path / images.split("/")[0] / f"split_zhou_{listed}.json", files)
    part = few_shot_data.read(tmp_path, name, 8)
    assert part.classes == ("x ray", "yak") and part.test.labels.tolist() == [0, 1] and len(part.val) == 2
    assert part.test.load_images([0, 1])[:, 0].flatten(1).mean(1).diff().item() > 0.5


@pytest.mark.parametrize("changes, message", [
    ({"train": [["a.jpg", "0", "a"]]}, r"train\[0\] is .*not \[path, label, class name\]"),
    ({"val": [["a_b_val.jpg", 0, "other"]]}, r"val\[0\] calls label 0 'other'"),
    ({"test": []}, "lists no test image"),
    ({"test": [["gone.jpg", 0, "a_b"]]}, "gone.jpg: missing"),
    ({"test": [["a_b_test.jpg", 7, "z"]]}, "labels must be 0 to K - 1"),
])
def test_bad_zhou_lists_stop(tmp_path, changes, message):
    pets(tmp_path, **changes)
    with pytest.raises(ClassFolderError, match=message):
        few_shot_data.read(tmp_path, "Pets", 8)


def test_missing_few_shot_sets_say_where_to_get_them(tmp_path):
    with pytest.raises(ClassFolderError, match="dtd: missing.*DATASETS.md"):
        few_shot_data.read(tmp_path, "DTD", 8)
    with pytest.raises(ClassFolderError, match="unknown few-shot data set 'CIFAR'"):
        few_shot_data.read(tmp_path, "CIFAR", 8)
    pets(tmp_path)
    (tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json").write_text("{")
    with pytest.raises(ClassFolderError, match="not valid JSON.*DATASETS.md"):
        few_shot_data.read(tmp_path, "Pets", 8)


def test_aircraft_and_imagenet_have_lists_of_their_own(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    for split in few_shot_data.SPLITS:
        picture(folder / "images" / f"1{split}.jpg")
        write_text(folder / f"images_variant_{split}.txt", f"1{split} 707-320\n")
    write_text(folder / "variants.txt", "707-320\n727-200\n")
    assert few_shot_data.read(tmp_path, "Aircraft", 8).train.names == ["1train.jpg"]
    write_text(folder / "images_variant_val.txt", "1val A380\n")
    with pytest.raises(ClassFolderError, match="line 1: 'A380'"):
        few_shot_data.read(tmp_path, "Aircraft", 8)
    for split in ("train", "val"):
        for synset in ("n01", "n02"):
            picture(tmp_path / "imagenet" / "images" / split / synset / "x.JPEG")
    write_text(tmp_path / "imagenet" / "classnames.txt", "n01 tench\nn02 great white shark\n")
    part = few_shot_data.read(tmp_path, "ImageNet", 8)
    assert part.classes == ("tench", "great white shark") and part.test.labels.tolist() == [0, 1] and len(part.val) == 0


def sketchy(root):
    for word in ("cat", "dog", "owl", "cow"):
        for kind in ("sketch", "photo"):
            picture(root / "sketchy" / kind / word / "1.png")
    write_text(root / "sketchy" / "seen.txt", "cat\ndog\nowl\n")
    write_text(root / "sketchy" / "unseen.txt", "cow\n")


def test_sketch_folders(tmp_path):
    sketchy(tmp_path)
    part = sketch_data.read(tmp_path, "Sketchy", 8, held_out=1)
    assert part.test.classes == ("cow",) and len(part.val.classes) == 1 and len(part.train.photos) == 3
    assert part.train.sketches.load_image(0).shape == (3, 8, 8)
    write_text(tmp_path / "sketchy" / "unseen.txt", "cow\ncat\n")
    with pytest.raises(ClassFolderError, match="'cat' is in seen.txt too"):
        sketch_data.read(tmp_path, "Sketchy", 8, held_out=1)
    write_text(tmp_path / "sketchy" / "unseen.txt", "bee\n")
    with pytest.raises(ClassFolderError, match="sketch/bee: no images.*Sketchy database"):
        sketch_data.read(tmp_path, "Sketchy", 8, held_out=1)
    with pytest.raises(ClassFolderError, match="seen.txt: no such file.*QuickDraw Extended"):
        sketch_data.read(tmp_path, "QuickDraw", 8, held_out=1)


@pytest.mark.parametrize("name, folder", [("Sketchy", "sketchy"), ("TU-Berlin", "tu_berlin"),
                                          ("QuickDraw", "quickdraw")])
def test_every_public_sketch_set_is_read(tmp_path, name, folder):
    sketchy(tmp_path)
    (tmp_path / "sketchy").rename(tmp_path / folder)
    part = sketch_data.read(tmp_path, name, 8, held_out=2)
    assert part.name == name and part.train.classes == ("cat", "dog", "owl") and len(part.test.sketches) == 1
    assert part.test.photos.load_images([0]).shape == (1, 3, 8, 8)


def voc(root, values=((1, 20), (255, 0)), names=tuple(f"thing {k}" for k in range(20))):
    picture(root / "voc20" / "images" / "val" / "a.jpg")
    place = root / "voc20" / "annotations" / "val" / "a.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(place)
    write_json(root / "voc20" / "classes.json", {"names": names, "first": 1})
    return root


def test_label_maps(tmp_path):
    part = segmentation_data.read(voc(tmp_path), "VOC-20", "val", 2)
    assert part.load_label(0).tolist() == [[0, 19], [-1, -1]] and part.load_images([0]).shape == (1, 3, 2, 2)
    assert part.check("val") == part.check("val") and part.class_pixels().sum() == 2
    Image.fromarray(np.array([[300, 847], [1, 0]], np.uint16)).save(tmp_path / "voc20/annotations/val/a.png")
    assert segmentation_data.read(tmp_path, "VOC-20", "val", 2).load_label(0).tolist() == [[-1, -1], [0, -1]]


@pytest.mark.parametrize("name, folder, classes, first, depth", [
    ("COCO-Stuff", "coco_stuff", 171, 0, np.uint8), ("ADE-150", "ade150", 150, 1, np.uint8),
    ("ADE-847", "ade847", 847, 0, np.uint16), ("PC-59", "pc59", 59, 1, np.uint8),
    ("PC-459", "pc459", 459, 1, np.uint16), ("VOC-20", "voc20", 20, 1, np.uint8)])
def test_every_public_segmentation_set_is_read(tmp_path, name, folder, classes, first, depth):
    voc(tmp_path)
    place = (tmp_path / "voc20").rename(tmp_path / folder)
    last = first + classes - 1
    Image.fromarray(np.array([[first, last], [last + 1, first]], depth)).save(place / "annotations" / "val" / "a.png")
    write_json(place / "classes.json", {"names": [f"thing {k}" for k in range(classes)], "first": first})
    part = segmentation_data.read(tmp_path, name, "val", 2)
    assert part.load_label(0).tolist() == [[0, classes - 1], [-1, 0]] and part.class_pixels().sum() == 3
    assert part.load_images([0]).shape == (1, 3, 2, 2)


def test_bad_segmentation_folders_stop(tmp_path):
    with pytest.raises(ClassFolderError, match="classes.json: missing.*ADE20K"):
        segmentation_data.read(tmp_path, "ADE-150", "val", 8)
    voc(tmp_path, names=("one",))
    with pytest.raises(ClassFolderError, match="1 names.*VOC-20 has 20"):
        segmentation_data.read(tmp_path, "VOC-20", "val", 8)
    part = segmentation_data.read(voc(tmp_path, values=((0, 255), (0, 0))), "VOC-20", "val", 8)
    with pytest.raises(ClassFolderError, match="no pixel has one of the 20"):
        part.check("val")
    picture(tmp_path / "voc20/annotations/val/a.png")
    with pytest.raises(ClassFolderError, match="mode RGB"):
        part.load_label(0)
    (tmp_path / "voc20/annotations/val/a.png").write_bytes(b"no image")
    with pytest.raises(ClassFolderError, match="a.png: cannot be decoded"):
        part.load_label(0)
    (tmp_path / "voc20/annotations/val/a.png").unlink()
    with pytest.raises(ClassFolderError, match="no such label map"):
        segmentation_data.read(tmp_path, "VOC-20", "val", 8)
    listed = json.loads((tmp_path / "voc20" / "classes.json").read_text())
    write_json(tmp_path / "voc20" / "classes.json", listed | {"unseen": ["nothing"]})
    with pytest.raises(ClassFolderError, match="unseen has 'nothing'"):
        segmentation_data.read(tmp_path, "VOC-20", "val", 8)
