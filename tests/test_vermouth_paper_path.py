"""The tasks as the profile `paper` runs them, without a cache, on tiny weights in the published formats."""

import numpy as np
import pytest
import torch

from dive_lib import few_shot, glyphs, paths, segmentation, sketch_retrieval, text_heads, vermouth_data
from dive_lib.captions import Captioner
from dive_lib.class_images import ClassImages
from dive_lib.task_bench import Bench
from dive_lib.task_metrics import evaluate_segmentation
from dive_lib.text_targets import SEGMENTATION
from tests import stand_ins
from tests.test_vermouth_data import COUNTS, SETTINGS, UNSEEN
from tests.test_vermouth_tasks import HEAD

BATCH = 8
SOURCE = {"backbone": "stable_diffusion", "t": 50, "group": "mid+up"}
EXPERT = SOURCE | {"expert": "resnet18"}
PYRAMID = {"kind": "pyramid", "width": 8, "refine": 0, "steps": 2, "epochs": 0, "batch_size": 4, "lr": 0.01,
           "weight_decay": 0.0, "schedule": "constant", "clip": 1.0, "full_size": True}
PROBE = {"backbone": "stable_diffusion", "t": 50, "group": "up1", "side": 1, "strength": 0.1}
SCRATCH = {"kind": "resnet", "widths": [4, 4], "blocks": 1, "stem": "imagenet", "steps": 2, "batch_size": 4, "lr": 0.01,
           "shift": 1}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    stand_ins.stable_diffusion(root / "sd")
    stand_ins.clip_text(root / "clip")
    stand_ins.resnet18(root / "resnet")
    stand_ins.vit(root / "dinov2")
    stand_ins.blip(root / "blip")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Digits and scenes of a handful of images, and the glyphs of which they are."""
    root, patch = tmp_path_factory.mktemp("made"), pytest.MonkeyPatch()
    patch.setattr(paths, "data", lambda folder=glyphs.export(root / "glyphs"): folder)
    yield vermouth_data.make_mini(root / "sets", COUNTS, UNSEEN, 0)
    patch.undo()


@pytest.fixture
def model(checkpoints, made):
    vermouth_data.describe("x", made, **SETTINGS)
    return {"noise": "ddpm", "folder": str(checkpoints / "sd"), "expert": "", "prompt": "", "attention": False,
            "expert_folders": {"resnet18": str(checkpoints / "resnet"), "dinov2": str(checkpoints / "dinov2")},
            "captioner": str(checkpoints / "blip"), "text": str(checkpoints / "clip"), "text_width": 12,
            "pooling": "projected", "cached": False, "standardise": False, "bf16": False, "batch": BATCH, "workers": 1}


@pytest.fixture
def reads(monkeypatch):
    """The numbers of images that are read at once."""
    sizes, original = [], ClassImages.load_images
    monkeypatch.setattr(ClassImages, "load_images",
                        lambda self, indices: sizes.append(len(indices)) or original(self, indices))
    return sizes


@pytest.mark.parametrize("source", [SOURCE, EXPERT])
def test_few_shot_heads(model, source):
    bench = Bench("x", model | {"pooling": "last_state"}, backbones=["stable_diffusion", "resnet18", "pixels"])
    task = few_shot.FewShot(bench, bench.data.digits, HEAD | {"fusion": "tiny", "normalise": True})
    assert bench.cache is None and task.text.shape == (10, 16)
    right = task.u_head(source, 1, 0)
    assert right.dtype == bool and right.shape == (20,) and not bench._pixels
    assert (right == task.u_head(source, 1, 0)).all()


def test_heads_as_published_read_captions_attention_and_an_expert(model, monkeypatch):
    captioned, original = [], Captioner.captions
    monkeypatch.setattr(Captioner, "captions",
                        lambda self, images: captioned.append(len(images)) or original(self, images))
    published = {"expert": "resnet18", "prompt": "blip", "attention": True}
    bench = Bench("x", model | published | {"bf16": True}, backbones=["stable_diffusion"])
    assert bench.given == published and bench.backbone("stable_diffusion").bf16
    task, source = few_shot.FewShot(bench, bench.data.digits, HEAD | {"fusion": "tiny"}), SOURCE | bench.given
    plain, full = (bench.scales(bench.data.digits.train, own).channels[0] for own in (SOURCE, source))
    sides = [scale.shape[-1] for scale in bench.scales(bench.data.digits.train, source).take([0])[0]]
    joined = [77 if k and (k < 3 or side <= 16) else 0 for k, side in enumerate(sides)]
    assert [a - b for a, b in zip(full, plain)] == joined and sum(joined) > 0
    right = task.u_head(source, 1, 0)
    assert right.shape == (20,) and sum(captioned) <= 20 + 30, "each image of training and test is captioned once"
    before = len(captioned)
    assert (task.u_head(source, 1, 0) == right).all() and len(captioned) == before


def test_a_condition_of_a_task_holds_no_label(model):
    with pytest.raises(ValueError, match="true_class.*no label"):
        Bench("x", model | {"prompt": "true_class"})


def test_a_linear_probe_reads_the_shots_alone(model, reads):
    bench = Bench("x", model)
    task = few_shot.FewShot(bench, bench.data.digits, HEAD)
    plain = text_heads.pooled(bench.scales(bench.data.digits.train, PROBE), 1)
    reads.clear()
    answers = task.linear_probe(PROBE, 2, 0)
    assert sum(reads) == 20 + 20, "two shots of ten classes, and the test images"
    chosen = few_shot.draw_shots(bench.data.digits.train.labels, 2, 0)
    labels = bench.data.digits.train.labels[chosen].numpy()
    expected = text_heads.linear_probe(plain[chosen], labels, task._flat(PROBE, "test"), 0.1)
    assert np.array_equal(answers, expected == bench.data.digits.test.labels.numpy())


def test_without_a_cache_no_more_images_are_read_than_a_pass_takes(model, reads):
    bench = Bench("x", model | {"batch": 3}, backbones=["stable_diffusion"])
    task = few_shot.FewShot(bench, bench.data.digits, HEAD | {"batch_size": 4})
    task.u_head(SOURCE, 1, 0)
    task.linear_probe(PROBE, 1, 0)
    assert max(reads) == 4, "of a step of training"
    reads.clear()
    text_heads.pooled(bench.scales(bench.data.digits.test, PROBE), 1)
    assert max(reads) == 3


def test_a_network_from_scratch_does_not_keep_the_test_images(model, reads):
    benches = [Bench("x", model | changes) for changes in ({}, {"cached": True})]
    right = [few_shot.FewShot(bench, bench.data.digits, HEAD).from_scratch(SCRATCH, 1, 0) for bench in benches]
    assert not benches[0]._pixels and benches[1]._pixels and np.array_equal(*right)


@pytest.mark.parametrize("expert", ["resnet18", "dinov2"])
def test_sketches_find_photos(model, expert):
    bench = Bench("x", model, backbones=["stable_diffusion", expert])
    part, source = bench.data.sketches["digits"], SOURCE | {"expert": expert}
    task = sketch_retrieval.SketchRetrieval(bench, part, HEAD | {"fusion": "tiny"})
    head = task.train(source, 0, without=part.held_out)
    row = task.evaluate(task.embed(head, source, "test"), "test")
    assert row["queries"] == 5 and row["gallery"] == 10 and 0 < row["mAP"] <= 100
    assert [len(vectors) for vectors in task.frozen(SOURCE, "test", 2)] == [5, 10] and not bench._pixels


@pytest.mark.parametrize("source", [SOURCE, EXPERT])
def test_pixels_are_named(model, source):
    bench = Bench("x", model, SEGMENTATION, backbones=["stable_diffusion", "resnet18"])
    task = segmentation.Segmentation(bench, PYRAMID)
    images = next(iter(bench.data.segmentation_tests.values()))
    counts = task.counts(task.train(source, 0), source, images)
    assert counts.shape == (len(images), 3, len(images.classes)) and not bench._pixels
    row = evaluate_segmentation(counts, segmentation.groups(images), seed=0)
    assert 0 <= row["mIoU_all"] <= 100 and torch.equal(counts, task.counts(task.train(source, 0), source, images))


def test_raw_pixels_of_many_images_are_read_in_batches(model, reads):
    benches = [Bench("x", model | changes) for changes in ({}, {"cached": True})]
    parts = [sketch_retrieval.SketchRetrieval(bench, bench.data.sketches["digits"], HEAD).pixels("test", 4)
             for bench in benches]
    assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))
    assert reads == [5, 8, 2, 5, 10] and not benches[0]._pixels


def test_missing_downloads_are_named_before_anything_is_read(model, tmp_path):
    missing = model | {"folder": str(tmp_path / "sd"), "expert_folders": {"resnet18": str(tmp_path / "resnet")},
                       "text": str(tmp_path / "clip")}
    with pytest.raises(FileNotFoundError, match="(?s)stable_diffusion: download.*resnet18: download.*clip: download"):
        Bench("unknown", missing, backbones=["stable_diffusion", "resnet18", "pixels"])
