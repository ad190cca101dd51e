"""The COCO-format reader: each refusal names file, record and remedy; counts and scaling are right."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dive_lib import coco, dataset
from dive_lib.coco import CocoLayouts, DatasetError, read_split


def _content():
    """Two images with objects, one without; category ids with gaps; one crowd."""
    def box(i, image, category, bbox, crowd=0):
        return {"id": i, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": crowd,
                "area": bbox[2] * bbox[3]}
    return {
        "images": [{"id": 7, "file_name": "b.png", "width": 20, "height": 40},
                   {"id": 3, "file_name": "a.png", "width": 32, "height": 32},
                   {"id": 9, "file_name": "c.png", "width": 10, "height": 10}],
        "annotations": [box(11, 7, 5, [5, 10, 10, 20]), box(12, 3, 2, [0, 0, 16, 16]),
                        box(13, 3, 9, [8.0, 8.0, 24, 24.0]), box(14, 3, 5, [1, 2, 3, 4]),
                        box(15, 3, 5, [0, 0, 32, 32], 1)],
        "categories": [{"id": 9, "name": "fox"}, {"id": 2, "name": "ant"}, {"id": 5, "name": "bee"}],
    }


@pytest.fixture
def make(tmp_path):
    """Writes a folder after a change of its content; returns its root."""
    def write(change=lambda content: None):
        content = _content()
        for number, entry in enumerate(content["images"]):
            pixels = np.random.RandomState(number).randint(0, 256, (entry["height"], entry["width"], 3))
            (tmp_path / "val").mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "val" / entry["file_name"])
        change(content)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
        return tmp_path
    return write


def _set(kind, position, key, value):
    def change(content):
        content[kind][position][key] = value
    return change


def _drop(kind, position, key):
    return lambda content: content[kind][position].pop(key)


def test_reads_images_in_the_order_of_their_ids(make):
    split = read_split(make(), "val")
    assert [image.id for image in split.images] == [3, 7, 9]
    assert split.categories == coco.Categories((2, 5, 9), ("ant", "bee", "fox"))
    assert split.images[0].class_ids.tolist() == [0, 2, 1]
    assert split.images[0].boxes_xyxy.tolist() == [[0, 0, 16, 16], [8, 8, 32, 32], [1, 2, 4, 6]]
    assert split.counts == {"crowd_excluded": 1, "clipped": 0, "degenerate_dropped": 0}
    assert CocoLayouts(split, 64, 2).summary() == {
        "images": 3, "objects": 4, "crowd_excluded": 1, "clipped": 0, "degenerate_dropped": 0,
        "overfull_images": 1, "images_without_objects": 1}


@pytest.mark.parametrize("change, record, problem", [
    (_set("annotations", 1, "category_id", 4), "annotation id 12", "unknown category id 4"),
    (_set("annotations", 1, "category_id", [2]), "annotation id 12", "unknown category"),
    (_set("annotations", 2, "image_id", 99), "annotation id 13", "image id 99, which is not in the list"),
    (_set("annotations", 3, "id", 12), "annotation id 12", "duplicate id"),
    (_set("annotations", 3, "id", "x"), "annotation number 4 of the list", "not a whole number"),
    (_set("annotations", 0, "bbox", [1, 2, float("nan"), 4]), "annotation id 11", "not finite"),
    (_set("annotations", 4, "bbox", [1, 2, 3, float("inf")]), "annotation id 15", "not finite"),
    (_set("annotations", 4, "bbox", [1, 2, 10**400, 4]), "annotation id 15", "not finite"),
    (_set("annotations", 0, "bbox", [1, 2, 3]), "annotation id 11", "not a list of 4 numbers"),
    (_set("annotations", 0, "bbox", [1, 2, 3, "4"]), "annotation id 11", "not a list of 4 numbers"),
    (_set("annotations", 0, "bbox", None), "annotation id 11", "not a list of 4 numbers"),
    (_drop("annotations", 0, "bbox"), "annotation id 11", 'has no "bbox"'),
    (_drop("annotations", 0, "category_id"), "annotation id 11", 'has no "category_id"'),
    (_set("images", 1, "id", 7), "image id 7", "duplicate id"),
    (_set("images", 1, "width", 33), "image id 3", r"a\.png: has 32 x 32 pixels, .* 33 x 32"),
    (_set("images", 1, "height", 0), "image id 3", "size 32 x 0"),
    (_set("images", 1, "file_name", ""), "image id 3", "file name ''"),
    (_set("images", 2, "file_name", "gone.png"), "image id 9", r"val/gone\.png: is missing"),
    (_set("categories", 1, "id", 9), "category id 9", "duplicate id"),
    (lambda content: content["images"].append("x"), "image number 4 of the list", "not a JSON object"),
    (lambda content: content["images"].clear(), '"images"', "empty"),
    (lambda content: content["categories"].clear(), '"categories"', "empty"),
    (lambda content: content.pop("annotations"), '"annotations"', "missing or not a list"),
])
def test_refused_with_file_record_and_remedy(make, change, record, problem):
    with pytest.raises(DatasetError, match=rf"instances_val\.json: {record}: .*{problem}.*; \w+ ") as caught:
        read_split(make(change), "val")
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_missing_folder_split_and_file(make):
    root = make()
    with pytest.raises(DatasetError, match=r"nowhere: folder: does not exist; .*instances_val\.json"):
        read_split(root / "nowhere", "val")
    with pytest.raises(DatasetError, match="test2017: folder: does not exist"):
        read_split(root, "test2017")
    (root / "train").mkdir()
    with pytest.raises(DatasetError, match=r"instances_train\.json: file: does not exist; put"):
        read_split(root, "train")


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "\udcff"])
def test_invalid_json(make, text):
    root = make()
    (root / "annotations" / "instances_val.json").write_bytes(text.encode(errors="surrogateescape"))
    problem = r'instances_val\.json: (file: is not valid JSON|"images": is missing)'
    with pytest.raises(DatasetError, match=problem):
        read_split(root, "val")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_unreadable_image(make, damage):
    root = make()
    path = root / "val" / "a.png"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:len(whole) // 2], "text": b"not an image", "empty": b""}[damage])
    with pytest.raises(DatasetError, match=r"image id 3: .*a\.png: cannot be decoded .*; fetch"):
        read_split(root, "val")
    split = read_split(root, "val", check_images=False)  # found later, with the same message
    with pytest.raises(DatasetError, match=r"image id 3: .*a\.png: cannot be decoded"):
        CocoLayouts(split, 32, 4).load_image(0)
    path.unlink()
    with pytest.raises(DatasetError, match=r"image id 3: .*a\.png: is missing"):
        read_split(root, "val", check_images=False)


@pytest.mark.parametrize("bbox, count, left", [
    ([5, 5, 0, 4], "degenerate_dropped", None),
    ([5, 5, 4, -1], "degenerate_dropped", None),
    ([40, 5, 4, 4], "degenerate_dropped", None),
    ([-3, -1, 8, 8], "clipped", [0, 0, 5, 7]),
    ([30, 30, 8, 8], "clipped", [30, 30, 32, 32]),
])
def test_bad_boxes_are_counted_or_refused_when_strict(make, bbox, count, left):
    root = make(_set("annotations", 3, "bbox", bbox))
    split = read_split(root, "val")
    assert split.counts[count] == 1 and sum(split.counts.values()) == 2  # the other one is the crowd
    assert split.images[0].boxes_xyxy.tolist()[2:] == ([left] if left else [])
    with pytest.raises(DatasetError, match=r"annotation id 14: has a .* box \[.*\] in .* 32 x 32; correct"):
        read_split(root, "val", strict=True)


def test_rounding_of_coco_is_not_outside(make):
    root = make(_set("annotations", 3, "bbox", [20, 20, 12.01, 12.01]))
    split = read_split(root, "val", strict=True)
    assert split.counts["clipped"] == 0 and split.images[0].boxes_xyxy[2].tolist() == [20, 20, 32, 32]


def test_crowds_are_no_targets_but_are_checked(make):
    assert read_split(make(_set("annotations", 4, "bbox", [-9, 0, 5, 0])), "val").counts == {
        "crowd_excluded": 1, "clipped": 0, "degenerate_dropped": 0}
    with pytest.raises(DatasetError, match="annotation id 15: .*unknown category"):
        read_split(make(_set("annotations", 4, "category_id", 77)), "val")


def test_categories_must_agree_with_training(make):
    train = read_split(make(), "val").categories
    assert read_split(make(), "val", categories=train).categories == train
    with pytest.raises(DatasetError, match=r"categories: .*category id 5: 'wasp' here, 'bee' there"):
        read_split(make(_set("categories", 2, "name", "wasp")), "val", categories=train)
    with pytest.raises(DatasetError, match=r"category id 20: 'owl' here, 'absent' there"):
        read_split(make(lambda c: c["categories"].append({"id": 20, "name": "owl"})), "val", categories=train)


def test_max_images_keeps_the_lowest_ids(make):
    root = make()
    (root / "val" / "c.png").unlink()  # image id 9 is not kept, so its file is not needed
    split = read_split(root, "val", max_images=2)
    assert [image.id for image in split.images] == [3, 7]
    assert read_split(root, "val", max_images=1).counts["crowd_excluded"] == 1
    with pytest.raises(ValueError, match="max_images must be positive"):
        read_split(root, "val", max_images=0)


def test_squash_resize_and_boxes_go_together(make):
    root = make()
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[10:30, 5:15] = 255
    Image.fromarray(pixels).save(root / "val" / "b.png")
    layouts = CocoLayouts(read_split(root, "val"), 80, 4)
    assert layouts.image_id(1) == 7 and layouts.original_size(1) == (20, 40)
    assert layouts.index_of(7) == 1
    image, (box,) = layouts.load_image(1), layouts.boxes_xyxy(1)
    assert image.shape == (3, 80, 80) and image.dtype == torch.float32 and box.dtype == torch.float32
    assert image.min() == -1 and image.max() == 1
    assert box.tolist() == [20, 20, 60, 60]
    x1, y1, x2, y2 = box.int().tolist()
    inside = torch.zeros(80, 80, dtype=torch.bool)
    inside[y1:y2, x1:x2] = True
    assert ((image[0] > 0) == inside).all(), "the scaled box must cover the painted square"
    assert coco.to_original(layouts.boxes_xyxy(1), (20, 40), 80).tolist() == [[5, 10, 10, 20]]


def test_same_size_is_not_resampled(make):
    layouts = CocoLayouts(read_split(make(), "val"), 32, 4)
    raw = np.asarray(Image.open(layouts.split.images[0].path)).transpose(2, 0, 1)
    assert torch.equal(layouts.load_image(0), torch.from_numpy(raw.copy()).float() / 127.5 - 1)
    assert layouts.load_image(0).is_contiguous()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(make, mode):
    root = make(lambda content: content["images"][1].update(file_name="a.tif"))
    Image.open(root / "val" / "a.png").convert(mode).save(root / "val" / "a.tif")
    image = CocoLayouts(read_split(root, "val"), 32, 4).load_image(0)
    assert image.shape == (3, 32, 32) and image.abs().max() <= 1


def test_round_trip_of_boxes():
    generator = torch.Generator().manual_seed(0)
    for size in ((640, 480), (411, 256), (64, 64)):
        corners = torch.rand(50, 2, 2, generator=generator, dtype=torch.float64).sort(1).values
        original = (corners * torch.tensor(size)).reshape(50, 4)
        square = original * 256 / torch.tensor([*size, *size])
        xywh = coco.to_original(square, size, 256)
        torch.testing.assert_close(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), original)
    assert coco.to_original(torch.zeros(0, 4), (5, 5), 64).shape == (0, 4)


def test_draws_are_shuffled_paired_and_seeded(make):
    layouts = CocoLayouts(read_split(make(), "val"), 32, 2)
    assert len(layouts) == 3
    pairs = {(0.0, 0), (8.0, 2), (1.0, 1)}
    generator, seen, orders = torch.Generator().manual_seed(1), set(), set()
    for _ in range(60):
        boxes, classes = layouts.draw(0, generator)
        assert boxes.shape == (2, 4) and classes.dtype == torch.int64
        drawn = tuple(zip(boxes[:, 0].tolist(), classes.tolist(), strict=True))
        assert set(drawn) <= pairs and len(set(drawn)) == 2, "a box must keep its class"
        seen |= set(drawn)
        orders.add(drawn)
    assert seen == pairs and len(orders) == 6, "each object and each order must come up"
    boxes, classes = layouts.draw(2, generator)
    assert boxes.shape == (0, 4) and classes.shape == (0,)
    first, second = (layouts.draw(0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_changing_a_result_leaves_the_data_alone(make):
    layouts = CocoLayouts(read_split(make(), "val"), 32, 4)
    layouts.boxes_xyxy(0).fill_(-1)
    layouts.class_ids(0).fill_(-1)
    assert layouts.boxes_xyxy(0).min() == 0 and layouts.class_ids(0).min() == 0


def test_layouts_need_positive_sizes(make):
    with pytest.raises(ValueError, match="must be positive"):
        CocoLayouts(read_split(make(), "val"), 64, 0)


def test_subset_is_seeded_nested_and_independent_of_order():
    ids = [5 * k + 1 for k in range(1000)]
    chosen = dataset.subset_ids(ids, 500, seed=3)
    assert chosen == sorted(set(chosen)) and len(chosen) == 500 and set(chosen) <= set(ids)
    assert chosen == dataset.subset_ids(reversed(ids), 500, seed=3) != dataset.subset_ids(ids, 500, seed=4)
    assert set(dataset.subset_ids(ids, 100, seed=3)) < set(chosen)
    assert dataset.subset_ids(range(10), 3, seed=0) == [2, 4, 8], "committed lists must stay reproducible"
    with pytest.raises(ValueError, match="cannot choose 11 of 10"):
        dataset.subset_ids(range(10), 11, seed=0)


def test_reads_the_scenes_of_the_mini_set(tmp_path):
    scenes = pytest.importorskip("dive_lib.scenes")
    glyph = np.zeros((10, 8, 8), np.float32)
    glyph[:, 1:7, 2:6] = 1
    scenes.write_split(tmp_path, "val", glyph, np.arange(10), 3, seed=0)
    split = read_split(tmp_path, "val", strict=True)
    assert len(split.images) == 3 and split.categories.names == scenes.CLASSES
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DatasetError, match="folder: does not exist"):
        read_split(tmp_path, "val")


def test_a_split_without_objects_is_refused(make):
    root = make(lambda content: content.update(annotations=[]))
    with pytest.raises(DatasetError, match="instances_val.json.*no object to train on"):
        dataset.describe("smoke", root, {name: "val" for name in dataset.SPLITS}, image_size=32, bins=17, slots=4,
                         strict=False, evaluation=2, ablation=1, tuning=1, seed=0)
