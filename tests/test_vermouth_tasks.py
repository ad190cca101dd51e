"""The three tasks over frozen features, on a handful of drawn images and untrained models."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from dive_lib import backbones, few_shot, glyphs, paths, segmentation, sketch_retrieval, task_bench, text_heads
from dive_lib import vermouth_data
from dive_lib.comparison_backbones import PixelFeatures
from dive_lib.denoiser_features import DenoiserFeatures
from dive_lib.denoisers import DiTDenoiser
from dive_lib.image_encoder import Pixels
from dive_lib.task_bench import Bench, training
from dive_lib.task_features import Scales
from tests import tiny
from tests.test_vermouth_data import COUNTS, SETTINGS, UNSEEN

MODEL = {"noise": "ddpm", "folder": "", "expert": "", "prompt": "", "captioner": "",
         "expert_folders": {"resnet18": "", "dino": "", "dinov2": ""},
         "attention": False, "text": "", "text_width": 16, "pooling": "projected", "cached": True, "standardise": True,
         "bf16": False, "batch": 16, "workers": 1}
HEAD = {"fusion": "pico", "width": 32, "side": 2, "heads": 2, "normalise": False, "steps": 3, "epochs": 0,
        "batch_size": 8, "lr": 0.01, "weight_decay": 0.0,
        "schedule": "cosine", "clip": 1.0, "full_size": False}
SOURCE = {"backbone": "dit", "t": 100, "group": "mid+up"}
PIXELS = {"backbone": "pixels", "t": 0, "group": ""}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    folder = glyphs.export(tmp_path / "digits")
    monkeypatch.setattr(paths, "data", lambda: folder)
    vermouth_data.describe("x", vermouth_data.make_mini(tmp_path / "made", COUNTS, UNSEEN, 0), **SETTINGS)
    own = {"dit": DenoiserFeatures(DiTDenoiser(tiny.dit(), Pixels4())), "pixels": PixelFeatures(4)}
    monkeypatch.setattr(backbones, "load", lambda profile, name, **options: own[name])
    return Bench("x", MODEL)


class Pixels4(Pixels):
    """Four channels of 8 x 8, as the tiny DiT takes."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(torch.cat([images, images[:, :1]], 1), 8)


def test_features_are_standardised_by_the_training_images_and_the_same_without_a_cache(bench):
    part = bench.data.digits
    train = bench.scales(part.train, SOURCE)
    (first, *_), _ = train.take(range(len(train)))
    assert first.mean((0, 2, 3)).abs().max() < 1e-4 and (first.std((0, 2, 3)) - 1).abs().max() < 1e-2
    test = bench.scales(part.test, SOURCE, part.train)
    assert test.statistics is train.statistics and test is bench.scales(part.test, SOURCE, part.train)
    plain = [Scales(bench.backbone("dit"), part.test, t=100, group="mid+up", identity="", cache=cache)
             for cache in (bench.cache, None)]
    for one, other in zip(*(scales.take([0, 3])[0] for scales in plain)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="from a cache only"):
        Scales(bench.backbone("dit"), part.test, t=100, group="mid+up", identity="", standardise=True)
    with pytest.raises(ValueError, match="no stage or group 'up9'"):
        bench.scales(part.test, SOURCE | {"group": "up9"})


@pytest.mark.parametrize("source", [SOURCE, PIXELS])
def test_few_shot_trials_are_repeatable(bench, source):
    task = few_shot.FewShot(bench, bench.data.digits, HEAD)
    first = task.u_head(source, 2, 0)
    bench._heads.clear()  # learned anew, not taken over
    again = task.u_head(source, 2, 0)
    assert first.dtype == bool and len(first) == 20 and (first == again).all()
    assert len(task.u_head(source, 1, 0, fusion="adapter")) == 20
    probe = {"backbone": source["backbone"], "t": 100, "group": source["group"], "side": 1, "strength": 0.1}
    assert len(task.linear_probe(probe, 2, 0, "val")) == 10
    assert few_shot.repeat(task.u_head, source, [1, 2], 2, "x")[2].shape == (2, 20)
    rows = few_shot.compare(task.linear_probe, [probe, probe | {"strength": 1.0}], 2, 1, "x")
    assert rows[0]["accuracy"] >= rows[1]["accuracy"]


def test_settings_are_chosen_on_a_set_with_validation_images():
    class Task:
        def __init__(self, count):
            self.part = type("Part", (), {"val": range(count)})

    sets = {"ImageNet": Task(0), "Pets": Task(3)}
    assert few_shot.tuned_on(sets) is sets["Pets"]
    with pytest.raises(ValueError, match="ImageNet: none has validation images"):
        few_shot.tuned_on({"ImageNet": Task(0)})


def test_a_network_from_scratch(bench):
    task = few_shot.FewShot(bench, bench.data.digits, HEAD)
    network = {"kind": "resnet", "widths": [4, 4], "blocks": 1, "stem": "imagenet", "steps": 2, "batch_size": 4,
               "lr": 0.01, "shift": 1}
    assert (task.from_scratch(network, 1, 0) == task.from_scratch(network, 1, 0)).all()


def test_labels_never_enter_the_condition(bench, monkeypatch):
    """Every forward pass of the tasks runs under the empty condition."""
    seen = []
    original = DiTDenoiser.context
    monkeypatch.setattr(DiTDenoiser, "context", lambda self, condition, batch: seen.append(condition) or original(
        self, condition, batch))
    few_shot.FewShot(bench, bench.data.digits, HEAD).u_head(SOURCE, 1, 0)
    sketch_retrieval.SketchRetrieval(bench, bench.data.sketches["digits"], HEAD).frozen(SOURCE, "test", 1)
    assert seen and set(seen) == {None}


def test_retrieval_leaves_held_out_classes_out_of_training(bench, monkeypatch):
    part = bench.data.sketches["digits"]
    task, labels = sketch_retrieval.SketchRetrieval(bench, part, HEAD), []
    fit = text_heads.fit
    monkeypatch.setattr(text_heads, "fit", lambda own, head, parts, *a, **k: labels.extend(parts) or fit(
        own, head, parts, *a, **k))
    head = task.train(SOURCE, 0, without=part.held_out)
    for _, chosen, own in labels:
        assert len(chosen) == len(own) and not {part.train.classes[c] for c in own.tolist()} & set(part.held_out)
    row = task.evaluate(task.embed(head, SOURCE, "test"), "test")
    assert row["queries"] == 5 and row["gallery"] == 10 and set(row["by_class"]) == set(range(5))
    assert sketch_retrieval.compare([task], [SOURCE], 1)[0]["mAP"] > 0
    mean = sketch_retrieval.mean_rows([row, row])
    assert mean["by_seed"] == [row["mAP"]] * 2 and mean["by_class"] == row["by_class"] and "by_query" not in mean
    other = row | {"by_query": [value + 50 for value in row["by_query"]]}
    low, high = sketch_retrieval.mean_rows([row, other])["mAP_ci95"]
    assert high - low > 45, "heads differ, and that widens the interval"
    same = sketch_retrieval.mean_rows([row, other], [row, other])
    assert (same["difference"], same["difference_ci95"]) == (0, [0, 0]), "heads and queries are paired"
    beside = sketch_retrieval.mean_rows([row], [other, other])
    assert beside["difference"] == -50 and beside["difference_ci95"] == [-50, -50], "what has no heads beside two"
    assert beside["P_100_ci95"][0] <= row["P_100"] <= beside["P_100_ci95"][1] and "P_100_by_query" not in beside
    with pytest.raises(ValueError, match="2 heads beside 3"):
        sketch_retrieval.mean_rows([row, row], [row] * 3)
    assert [len(vectors) for vectors in task.pixels("test", 4)] == [5, 10]


def test_a_head_is_trained_once(bench, monkeypatch):
    calls, original = [], task_bench.train
    monkeypatch.setattr(task_bench, "train", lambda *a, **k: calls.append(a) or original(*a, **k))
    monkeypatch.setattr(bench, "_heads", {})
    retrieval = sketch_retrieval.SketchRetrieval(bench, bench.data.sketches["digits"], HEAD)
    segments = segmentation.Segmentation(bench, HEAD | {"kind": "finest", "width": 8, "refine": 1})
    heads = [retrieval.train(SOURCE, 0), retrieval.train(SOURCE, 0, fusion=HEAD["fusion"]), retrieval.train(SOURCE, 1),
             segments.train(PIXELS, 0), segments.train(PIXELS, 0), segments.train(PIXELS, 0, steps=HEAD["steps"] + 1)]
    assert len(calls) == 4 and not any(head.training for head in heads)
    same = [[all(map(torch.equal, a.state_dict().values(), b.state_dict().values())) for a, b in pairwise(part)]
            for part in (heads[:3], heads[3:])]
    assert same == [[True, False]] * 2


def test_heads_trained_ahead_are_taken_over(bench, monkeypatch):
    """In processes of their own; afterwards nothing is trained, and trials in processes give the same numbers."""
    task = sketch_retrieval.SketchRetrieval(bench, bench.data.sketches["digits"], HEAD)
    few = few_shot.FewShot(bench, bench.data.digits, HEAD)
    monkeypatch.setattr(bench, "_heads", {})
    monkeypatch.setitem(bench.model, "workers", 2)
    bench.train_ahead([partial(task.train, SOURCE, seed) for seed in range(3)])
    assert len(bench._heads) == 3
    ahead = few_shot.repeat(few.u_head, SOURCE, [1, 2], 2, "x")
    probe = {"backbone": "dit", "t": 100, "group": "mid+up", "side": 1, "strength": 0.1}
    probed = few_shot.repeat(few.linear_probe, probe, [2], 2, "x")
    assert len(few._pooled) == 2  # pooled here, not in each process again
    assert (probed[2] == [few.linear_probe(probe, 2, draw) for draw in range(2)]).all()
    rows = sketch_retrieval.ablate(task, {"a": (SOURCE, {}), "b": (SOURCE, {"fusion": "add"})}, 2)
    original = task_bench.train
    monkeypatch.setattr(task_bench, "train", lambda *a, **k: pytest.fail("trained again"))
    heads = [task.train(SOURCE, seed) for seed in range(2)]
    assert rows["a"]["by_seed"] == pytest.approx(
        [task.evaluate(task.embed(head, SOURCE, "test"), "test")["mAP"] for head in heads], abs=1e-3)
    monkeypatch.setattr(task_bench, "train", original)
    monkeypatch.setitem(bench.model, "workers", 1)
    here = few_shot.repeat(few.u_head, SOURCE, [1, 2], 2, "x")
    assert {k: v.shape for k, v in ahead.items()} == {1: (2, 20), 2: (2, 20)}
    assert all((ahead[k] == here[k]).all() for k in here)


@pytest.mark.parametrize("kind", ["pyramid", "finest", "adapter"])
def test_segmentation_learns_seen_names_and_answers_all(bench, kind):
    head = HEAD | {"kind": kind, "width": 8, "refine": 1}
    task, images = segmentation.Segmentation(bench, head), bench.data.segmentation_tests["scenes/test"]
    assert len(task.seen) == 61
    counts = task.counts(task.train(PIXELS, 0), PIXELS, images)
    assert counts.shape == (6, 3, 81) and counts[:, 2].sum() == 6 * 64 * 64
    only = task.counts(task.train(PIXELS, 0), PIXELS, images, task.seen)
    unseen = segmentation.groups(images)["unseen"]
    assert only[:, 1, unseen].sum() == 0 and len(unseen) == 20
    assert segmentation.compare(task, [PIXELS])[0]["mIoU"] >= 0


def test_a_handicap_of_seen_names_is_chosen_without_the_unseen_ones(bench, monkeypatch):
    head = HEAD | {"kind": "pyramid", "width": 8, "refine": 1}
    task, images = segmentation.Segmentation(bench, head), bench.data.segmentation_tests["scenes/test"]
    groups, trained = segmentation.groups(images), task.train(PIXELS, 0)
    counts = task.counts(trained, PIXELS, images, handicap=10.0)
    assert counts[:, 1, groups["seen"]].sum() == 0 and counts[:, 1, groups["unseen"]].sum() > 0
    assert torch.equal(task.counts(trained, PIXELS, images, handicap=0.0), task.counts(trained, PIXELS, images))
    asked = []
    monkeypatch.setattr(task, "counts", lambda head, source, images, *a, **k: asked.append(images) or
                        segmentation.Segmentation.counts(task, head, source, images, *a, **k))
    rows = segmentation.choose_handicap(task, PIXELS, [0.0, 0.1, 10.0], 6)
    assert all(part is bench.data.segmentation_val for part in asked) and len(rows) == 3
    assert [row["mean"] for row in rows] == sorted((row["mean"] for row in rows), reverse=True)
    assert next(row for row in rows if row["handicap"] == 10.0)["mIoU_seen"] == 0
    with pytest.raises(ValueError, match="60 of 60 seen names cannot be held out"):
        segmentation.choose_handicap(task, PIXELS, [0.0], 60)


def test_a_pyramid_head_joins_an_expert_and_doubles_its_map():
    head = segmentation.PyramidHead([8, 4], [6], 5, width=8, refine=1)
    out = head([torch.randn(2, 8, 2, 2), torch.randn(2, 4, 4, 4)], [torch.randn(2, 6, 8, 8)])
    assert out.shape == (2, 5, 8, 8)
    with pytest.raises(ValueError, match="choose pyramid, fpn, finest or adapter"):
        segmentation.PyramidHead([8], [], 5, kind="panoptic")


def test_the_published_head_doubles_a_scale_after_every_convolution():
    head = segmentation.PyramidHead([8] * 4, [], 5, width=8, kind="fpn")
    assert [sum(isinstance(part, torch.nn.Conv2d) for part in scale) for scale in head.smooth] == [3, 2, 1, 1]
    assert [sum(isinstance(part, torch.nn.Upsample) for part in scale) for scale in head.smooth] == [3, 2, 1, 0]
    assert head([torch.randn(2, 8, side, side) for side in (2, 4, 8, 16)]).shape == (2, 5, 16, 16)


def test_the_loss_on_the_labels_size_is_that_of_enlarged_similarities():
    torch.manual_seed(0)
    embeddings, text = torch.randn(2, 5, 3, 3), torch.randn(4, 5)
    labels = torch.randint(4, (2, 3, 3))
    labels[0, 1] = segmentation.IGNORED
    valid = labels != segmentation.IGNORED
    same = segmentation.text_loss(embeddings.permute(0, 2, 3, 1)[valid], text, labels[valid],
                                  **segmentation.SEGMENTATION)
    torch.testing.assert_close(segmentation.enlarged_loss(embeddings, text, labels), same)
    line = torch.zeros(2, 12, 12, dtype=torch.long)
    line[:, 5] = 1  # a line too thin for the map's nearest labels counts
    assert segmentation.enlarged_loss(embeddings, text, line) != segmentation.enlarged_loss(embeddings, text, line * 0)


def test_an_adapter_reads_every_place_of_all_scales():
    torch.manual_seed(0)
    adapter = segmentation.PixelAdapter([8, 4], 5)
    scales = [torch.randn(2, 8, 4, 4), torch.randn(2, 4, 2, 2)]  # of a network that lists the finest first
    out = adapter(scales)
    assert out.shape == (2, 5, 4, 4) and sorted(p.numel() for p in adapter.parameters()) == [12, 12, 15, 36]
    scales[0][0, :, 1, 2] += torch.randn(8)
    changed = (adapter(scales) != out).any(1)
    assert changed.nonzero().tolist() == [[0, 1, 2]]


def test_training_lengths():
    assert training(HEAD, 100, 0).steps == 3
    assert training(HEAD | {"steps": 0, "epochs": 2}, 17, 0).steps == 6
    assert np.isclose(training(HEAD, 1, 0).lr, 0.01)


def test_an_ablation_leaves_out_what_was_chosen():
    changes = {"fusion pico": (SOURCE, {"fusion": "pico"}), "fusion add": (SOURCE, {"fusion": "add"}),
               "backbone dit": (SOURCE | {"backbone": "dit"}, {}), "backbone pixels": (PIXELS, {})}
    assert task_bench.differing(changes, SOURCE, HEAD) == {
        "as chosen": (SOURCE, {}), "fusion add": (SOURCE, {"fusion": "add"}), "backbone pixels": (PIXELS, {})}
