"""Detectors on toy images: targets that decode to the boxes they are of, losses, and a training that finds things."""

import dataclasses

import pytest
import torch

from dive_lib import batch_parts, dataset, detectors, glyphs, paths
from dive_lib.denoiser_features import DenoiserFeatures
from dive_lib.denoisers import LayoutDenoiser
from dive_lib.detectors import Detector, Objects
from dive_lib.evaluation import coco_average_precision
from dive_lib.feature_noise import Noise
from dive_lib.train import TrainingConfig
from tests import tiny
from tests.test_models import first_stage

SIZE, CELLS, CLASSES = 32, 8, 2
SHAPE = {"channels": 3, "classes": CLASSES, "image_size": SIZE}
SMALL = {"widths": [8, 16], "blocks": [1, 1], "stem": 2, "level": 1, "neck": 16, "enlarge": 1}
CONFIG = TrainingConfig(steps=60, lr=0.01, batch_size=8, ema=0.9, clip=10.0)
BOXES = torch.tensor([[[2.0, 3, 14, 17], [18, 16, 30, 31], [0, 0, 0, 0]], [[9, 8, 21, 20], [0, 0, 0, 0], [0, 0, 0, 0]]])
OBJECTS = Objects(BOXES, torch.tensor([[0, 1, -1], [1, -1, -1]]))


def perfect(objects: Objects) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and sides of a detector that says what it should."""
    heat, boxes, weights = detectors.targets(objects, CLASSES, CELLS, SIZE)
    centres = detectors.cell_centres(CELLS, SIZE)
    sides = torch.cat([centres - boxes[:, :2], boxes[:, 2:] - centres], 1)
    return torch.logit(heat.clamp(0.001, 0.999)), sides


def squares(count: int = 24) -> tuple[torch.Tensor, Objects]:
    """Images with a bright square each on dark ground, red (class 0) or blue (class 1)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator) * 0.1 - 0.8
    boxes, classes = torch.zeros(count, 2, 4), torch.full((count, 2), -1)
    for k in range(count):
        x, y = torch.randint(3, 20, (2,), generator=generator).tolist()
        side, classes[k, 0] = 8 + k % 5, k % 2
        boxes[k, 0] = torch.tensor([x, y, x + side, y + side])
        images[k, 2 * (k % 2), y:y + side, x:x + side] = 0.9
    return images, Objects(boxes, classes)


def fit(folder, config=CONFIG, **changes):
    images, objects = squares()
    return detectors.fit(SMALL, SHAPE, images.__getitem__, objects, config, directory=folder / "toy", identity="toy",
                         **changes)


def test_a_perfect_prediction_decodes_to_exactly_the_boxes():
    for found, boxes, classes in zip(detectors.decode(*perfect(OBJECTS), SIZE, least=0.5), *OBJECTS):
        present = classes >= 0
        order = found.class_ids.argsort()
        torch.testing.assert_close(found.boxes_xyxy[order], boxes[present])
        assert found.class_ids[order].tolist() == classes[present].tolist()
        assert found.scores.tolist() == pytest.approx([0.999] * len(found.scores), abs=1e-4)


def test_targets_of_known_boxes():
    heat, boxes, weights = detectors.targets(OBJECTS, CLASSES, CELLS, SIZE)
    assert (heat == 1).nonzero().tolist() == [[0, 0, 2, 2], [0, 1, 5, 6], [1, 1, 3, 3]], "image, class, row, column"
    assert heat[1, 0].max() == 0 and 0 < heat[1, 1, 3, 4] < 0.5
    assert boxes[0, :, 2, 2].tolist() == [2, 3, 14, 17] and boxes[1, :, 3, 4].tolist() == [9, 8, 21, 20]
    torch.testing.assert_close(weights.flatten(1).sum(1), torch.tensor([2.0, 1.0]))
    assert weights[0, 2, 2] > weights[0, 1, 2] > 0 == weights[0, 0, 0]


def test_of_two_boxes_a_cell_learns_the_nearer_one():
    side_by_side = Objects(torch.tensor([[[0.0, 4, 16, 20], [12, 4, 28, 20]]]), torch.tensor([[0, 0]]))
    heat, boxes, _ = detectors.targets(side_by_side, CLASSES, CELLS, SIZE)
    assert (heat == 1).sum() == 2 and heat.max() == 1
    assert boxes[0, 0, 3, 2] == 0 and boxes[0, 0, 3, 5] == 12


def test_an_image_without_objects_has_background_only():
    nothing = Objects(BOXES[:1], torch.full((1, 3), -1))
    heat, _, weights = detectors.targets(nothing, CLASSES, CELLS, SIZE)
    assert heat.max() == 0 and weights.max() == 0
    assert [len(found.scores) for found in detectors.decode(*perfect(nothing), SIZE)] == [0]


def test_losses_are_least_where_the_prediction_is_right():
    heat, boxes, weights = detectors.targets(OBJECTS, CLASSES, CELLS, SIZE)
    logits, sides = perfect(OBJECTS)
    right = detectors.focal_losses(logits, heat)
    assert right.shape == (2,) and (right < 0.3 * detectors.focal_losses(torch.zeros_like(logits), heat)).all()
    assert (detectors.focal_losses(logits.flip(1), heat) > 5 * right).all(), "the other class"
    torch.testing.assert_close(detectors.generalised_iou(detectors.boxes_of(sides, SIZE), boxes)[weights > 0],
                               torch.ones(int((weights > 0).sum())))


def test_generalised_iou_of_known_boxes():
    one = torch.tensor([[0.0, 0, 10, 10]] * 3)
    other = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 10], [20, 0, 30, 10]])
    assert detectors.generalised_iou(one, other).tolist() == pytest.approx([1, 0.5, -1 / 3])


def test_suppression_drops_the_lower_of_two_boxes_of_a_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [1, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 5]])
    assert detectors.suppressed(boxes, torch.tensor([0, 0, 1, 0, 0]), 0.6).tolist() == [0, 2, 3, 4]
    assert detectors.suppressed(boxes[:0], torch.zeros(0), 0.6).tolist() == []


def test_images_move_with_their_objects():
    images, objects = squares()
    for move in (lambda *given: detectors.moved(*given, down=3, right=-2),
                 lambda *given: detectors.mirrored(*given, torch.arange(24) % 3 == 0)):
        changed, own = move(images, objects)
        assert changed.shape == images.shape and not torch.equal(changed, images)
        for image, box, c in zip(changed, own.boxes_xyxy[:, 0].int().tolist(), own.class_ids[:, 0]):
            bright = image[2 * c] > 0.5
            assert bright[box[1]:box[3], box[0]:box[2]].all() and bright.sum() == (box[2] - box[0]) * (box[3] - box[1])
    gone = detectors.moved(images, Objects(torch.tensor([[[0.0, 0, 2, 9]]]), torch.tensor([[1]])), down=0, right=-2)[1]
    assert gone.class_ids.tolist() == [[-1]], "nothing of it is left"


def test_training_reduces_the_loss_and_finds_the_squares(tmp_path):
    images, objects = squares()
    model, loss = fit(tmp_path, shift=2), detectors.detection_loss(images.__getitem__, objects, 24)
    after, before = (loss(one, 0, torch.Generator().manual_seed(0)) for one in (model, Detector(**SHAPE, **SMALL)))
    assert after < 0.2 * before and not model.training
    found = detectors.detect(model, images.__getitem__, 24)
    truth = {"images": [{"id": k} for k in range(24)], "categories": [{"id": c, "name": str(c)} for c in range(2)],
             "annotations": [{"id": k + 1, "image_id": k, "category_id": k % 2, "iscrowd": 0, "area": 100.0,
                              "bbox": [x1, y1, x2 - x1, y2 - y1]}
                             for k, (x1, y1, x2, y2) in enumerate(objects.boxes_xyxy[:, 0].tolist())]}
    records = [{"image_id": k, "category_id": int(c), "score": float(score),
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
               for k, own in enumerate(found) for box, c, score in zip(own.boxes_xyxy.tolist(), *own[1:])]
    assert coco_average_precision(truth, records, range(24))["AP50"] > 90
    kept = detectors.load(tmp_path / "toy")
    for before, after in zip(found, detectors.detect(kept, images.__getitem__, 24, batch=24)):
        torch.testing.assert_close(before.boxes_xyxy, after.boxes_xyxy, atol=1e-3, rtol=0)


def test_parts_of_a_batch_give_the_same_bytes_however_many_run_at_once(tmp_path, monkeypatch):
    config, trained = dataclasses.replace(CONFIG, steps=4, parts=2), {}
    for cores in (1, 2):
        monkeypatch.setattr(batch_parts, "cores", lambda: cores)
        monkeypatch.setenv("DIVE_SCRATCH", str(tmp_path / f"scratch_{cores}"))
        trained[cores] = fit(tmp_path, config)
    for name, value in trained[1].state_dict().items():
        assert torch.equal(value, trained[2].state_dict()[name]), name


def test_losses_of_a_batch_do_not_depend_on_its_parts():
    images, objects = squares()
    loss, model = detectors.detection_loss(images.__getitem__, objects, 8), Detector(**SHAPE, **SMALL)
    drawn = loss.draw(model, 0, torch.Generator().manual_seed(0))
    halves = [loss.losses(model, *(part.tensor_split(2)[k] for part in drawn)) for k in range(2)]
    torch.testing.assert_close(torch.cat(halves), loss.losses(model, *drawn))


def test_a_detector_reads_the_maps_of_a_frozen_layout_ldm(tmp_path):
    torch.manual_seed(0)
    backbone = DenoiserFeatures(LayoutDenoiser(tiny.layout_ldm(), first_stage().eval()), Noise("ddim_inv"))
    maps = detectors.DenoiserMaps(backbone, 50, ("mid", "up1"))
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    assert maps(images).shape == (4, maps.channels, 8, 8) and maps.channels == 16 + 8
    objects = Objects(2 * BOXES.repeat(2, 1, 1), OBJECTS.class_ids.repeat(2, 1))
    model = detectors.fit(
        {**SMALL, "stem": 1, "level": 0, "enlarge": 2}, {"channels": maps.channels, "classes": 2, "image_size": 64},
        images.__getitem__, objects, dataclasses.replace(CONFIG, steps=2), directory=tmp_path / "head", identity="toy",
        maps=maps)
    assert model(maps(images))[0].shape == (4, 2, 16, 16)


def test_objects_of_annotations_and_of_tokens_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    glyphs.export(tmp_path / "data")
    root = dataset.make_scenes(tmp_path / "scenes", {"train": 6, "val": 2, "test": 2}, seed=0)
    data = dataset.describe("smoke", root, {split: split for split in dataset.SPLITS}, image_size=64, bins=33, slots=5,
                            strict=False, evaluation=2, ablation=1, tuning=2, seed=0)
    objects = detectors.annotated(data.train)
    tokens = torch.stack([data.grid.encode(boxes[classes >= 0], classes[classes >= 0])
                          for boxes, classes in zip(*objects)])
    again = detectors.of_tokens(tokens, data.grid)
    most = objects.class_ids.shape[1]
    assert torch.equal(again.class_ids[:, :most], objects.class_ids) and (again.class_ids[:, most:] == -1).all()
    present = objects.class_ids >= 0
    assert torch.equal(again.boxes_xyxy[:, :most][present], objects.boxes_xyxy[present]), "scenes have even boxes"
    broken = tokens.clone()
    broken[:, 0, 1], broken[:, 1, 4] = broken[:, 0, 3], data.grid.bins
    assert (detectors.of_tokens(broken, data.grid).class_ids[:, :2] == -1).all(), "an illegal box, a [none]"
    found = [detectors.Found(boxes[p], classes[p], torch.ones(int(p.sum())))
             for boxes, classes, p in zip(*objects, present)]
    ids = [image["id"] for image in data.annotations("train")["images"]]
    records = detectors.coco_results(data.train, ids, found)
    assert coco_average_precision(data.annotations("train"), records, ids)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("changes, told", [({"blocks": [1]}, "as many numbers of blocks"), ({"level": 2}, "level 2")])
def test_settings_that_make_no_network_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        Detector(**SHAPE, **{**SMALL, **changes})


def test_images_without_any_object_are_refused():
    with pytest.raises(ValueError, match="none of the images has an object"):
        detectors.detection_loss(lambda index: index, Objects(BOXES, torch.full((2, 3), -1)), 2)
    backbone = DenoiserFeatures(LayoutDenoiser(tiny.layout_ldm(), first_stage().eval()))
    with pytest.raises(ValueError, match="no stage up7"):
        detectors.DenoiserMaps(backbone, 50, ("up7",))
