"""Data sets of few-shot classification, in the folder layouts of CoOp and Tip-Adapter, and the draw of the shots.

<root>/<folder>/ holds the images and a list `split_zhou_<Name>.json`:
{"train": [["path/of/image.jpg", label, "class name"], ...], "val": [...], "test": [...]}. Two of the eleven public sets
have lists of their own: FGVC Aircraft (variants.txt, images_variant_{train,val,test}.txt) and ImageNet (classnames.txt,
images/{train,val}/<synset>/). The mini data are written as one more set of the first kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dive_lib.class_images import SUFFIXES, ClassFolderError, ClassImages
from dive_lib.files import read_json
from dive_lib.paths import shorten

GUIDE = ("Get it as described at https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md, which also links the "
         "split_zhou_*.json")
SETS = {  # name: folder under the root, folder of the images in it, list
    "Pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "Flowers102": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "Aircraft": ("fgvc_aircraft", "images", ""),
    "DTD": ("dtd", "images", "split_zhou_DescribableTextures.json"),
    "EuroSAT": ("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "Cars": ("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "Food101": ("food-101", "images", "split_zhou_Food101.json"),
    "SUN397": ("sun397", "SUN397", "split_zhou_SUN397.json"),
    "Caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "UCF101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
    "ImageNet": ("imagenet", "images", ""),
    "digits": ("digits", "", "split_zhou_Digits.json"),
}
SPLITS = ("train", "val", "test")
TEMPLATES = {  # CoOp's phrasing of each set's classes; of others "a photo of a {}."
    "Pets": "a photo of a {}, a type of pet.", "Flowers102": "a photo of a {}, a type of flower.",
    "Aircraft": "a photo of a {}, a type of aircraft.", "DTD": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.", "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.", "digits": "a photo of {}"}


@dataclass
class FewShotSet:
    """classes: names in words, in the order of the labels. val may be empty in published sets: ImageNet has none.
    templates: phrasings with one {} for the name, over which a class's text is averaged."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: ClassImages
    val: ClassImages
    test: ClassImages


def read(root: Path | str, name: str, image_size: int) -> FewShotSet:
    """Reads the lists of one of SETS and checks that every image is there. Images are centre crops.

    A file `templates.txt` in the set's folder, a phrasing per line, takes the place of the one in TEMPLATES: the
    published program averages over one for Pets to dozens for ImageNet, those of CLIP's prompts.

    Raises ClassFolderError, naming the file, the record and where to get the set.
    """
    if name not in SETS:
        raise ClassFolderError(f"unknown few-shot data set {name!r}; choose one of {', '.join(SETS)}")
    folder, images, listed = SETS[name]
    folder = Path(root) / folder
    _require(folder, name)
    if name == "Aircraft":
        entries, classes = _read_aircraft(folder, name)
    elif name == "ImageNet":
        entries, classes = _read_imagenet(folder, name)
    else:
        entries, classes = _read_list(folder / listed, name)
    parts = {}
    for split in SPLITS:
        _check_images(folder / images, entries[split], name, split)
        labels = torch.tensor([label for _, label in entries[split]], dtype=torch.long)
        names = [path for path, _ in entries[split]]
        parts[split] = ClassImages(folder / images, classes, names, labels, image_size, 3)
    return FewShotSet(name, classes, read_templates(folder / "templates.txt", name), **parts)


def read_templates(path: Path, name: str) -> tuple[str, ...]:
    """The phrasings of a set: of its own file, or of TEMPLATES. Raises ClassFolderError for a line without one {}."""
    if not path.is_file():
        return (TEMPLATES.get(name, "a photo of a {}."),)
    lines = tuple(_lines(path, name))
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        raise ClassFolderError(f"{shorten(path)}: {wrong[0] if wrong else ''!r} has not one {{}} for the class's name; "
                               "write a phrasing per line, or remove the file")
    return lines


def draw_shots(labels: torch.Tensor, shots: int, seed: int) -> list[int]:
    """Indices of `shots` images of every class of a training split; with one seed, those of fewer shots are among those
    of more. Raises ValueError for a class with fewer images, of which only the number is known here.
    """
    rng = np.random.RandomState(seed)  # NumPy guarantees RandomState's stream for ever
    chosen = []
    for label in range(int(labels.max()) + 1):
        own = np.flatnonzero(labels.numpy() == label)
        if len(own) < shots:
            raise ValueError(f"class {label} has {len(own)} training images, fewer than {shots} shots; lower the "
                             "shots or add images")
        chosen += rng.permutation(own)[:shots].tolist()
    return chosen


def _require(path: Path, name: str) -> Path:
    if not path.exists():
        raise ClassFolderError(f"{shorten(path)}: missing, a part of the few-shot data set {name}. {GUIDE}")
    return path


def _read_list(path: Path, name: str) -> tuple[dict, tuple[str, ...]]:
    try:
        content = read_json(_require(path, name))
    except ValueError as error:
        raise ClassFolderError(f"{error}. {GUIDE}") from None
    if not isinstance(content, dict) or set(SPLITS) - set(content):
        raise ClassFolderError(f"{shorten(path)}: must be an object with the lists train, val and test. {GUIDE}")
    names: dict[int, str] = {}
    entries: dict[str, list] = {}
    for split in SPLITS:
        entries[split] = []
        for number, record in enumerate(content[split]):
            where = f"{shorten(path)}: {split}[{number}]"
            if not (isinstance(record, list) and [type(value) for value in record] == [str, int, str]):
                raise ClassFolderError(f"{where} is {record!r}, not [path, label, class name]; download the list again")
            file, label, word = record
            if names.setdefault(label, word) != word:
                raise ClassFolderError(f"{where} calls label {label} {word!r}, earlier ones {names[label]!r}; download "
                                       "the list again")
            entries[split].append((file, label))
    if sorted(names) != list(range(len(names))) or not names:
        raise ClassFolderError(f"{shorten(path)}: labels must be 0 to K - 1, found {sorted(names)[:5]} ...; download "
                               "the list again")
    return entries, tuple(names[label].replace("_", " ") for label in sorted(names))


def _read_aircraft(folder: Path, name: str) -> tuple[dict, tuple[str, ...]]:
    classes = tuple(_lines(folder / "variants.txt", name))
    entries = {}
    for split in SPLITS:
        path = folder / f"images_variant_{split}.txt"
        entries[split] = []
        for number, line in enumerate(_lines(path, name), start=1):
            image, _, variant = line.partition(" ")
            if variant not in classes:
                raise ClassFolderError(f"{shorten(path)}: line {number}: {variant!r} is not in variants.txt; download "
                                       "both again")
            entries[split].append((f"{image}.jpg", classes.index(variant)))
    return entries, classes


def _read_imagenet(folder: Path, name: str) -> tuple[dict, tuple[str, ...]]:
    """classnames.txt: "n01440764 tench" per line. Published: val is the test split."""
    pairs = [line.partition(" ")[::2] for line in _lines(folder / "classnames.txt", name)]
    entries: dict[str, list] = {"val": []}
    for split, where in (("train", "train"), ("test", "val")):
        entries[split] = [(f"{where}/{synset}/{entry.name}", label) for label, (synset, _) in enumerate(pairs)
                          for entry in sorted(_require(folder / "images" / where / synset, name).iterdir())
                          if entry.suffix.lower() in SUFFIXES]
    return entries, tuple(word for _, word in pairs)


def _lines(path: Path, name: str) -> list[str]:
    return [line.strip() for line in _require(path, name).read_text(encoding="utf-8").splitlines() if line.strip()]


def _check_images(folder: Path, entries: Sequence, name: str, split: str) -> None:
    if not entries and split != "val":
        raise ClassFolderError(f"{shorten(folder)}: the few-shot data set {name} lists no {split} image. {GUIDE}")
    missing = [path for path, _ in entries if not (folder / path).is_file()]
    if missing:
        raise ClassFolderError(f"{shorten(folder / missing[0])}: missing, with {len(missing) - 1} other {split} images "
                               f"of {name}. {GUIDE}")
