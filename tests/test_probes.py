"""Linear probes: what they can and cannot read, and that cells are chosen on validation images alone."""

import numpy as np
import pytest
import torch

from dive_lib import probe_figures, probe_grid, probes, task_figures, u_head_scheme
from dive_lib.comparison_backbones import PixelFeatures
from dive_lib.feature_cache import FeatureCache
from dive_lib.probe_data import Labelled, ProbeData
from dive_lib.task_metrics import evaluate_retrieval
from tests.test_denoiser_features import layout


def clouds(count=60, width=8, classes=3, seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    return centres[labels] * 2 + noise * torch.randn(count, width, generator=generator), labels


def test_reads_what_is_linear_and_not_what_is_not():
    (x, y), (test, truth) = clouds(), clouds(seed=1)
    correct, strength = probes.classify(x, y, test, truth, 3)
    assert correct.mean() > 0.95 and 0 <= strength < len(probes.STRENGTHS)
    shuffled = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))]
    assert probes.classify(x, y, test, shuffled, 3, strength)[0].mean() < 0.7


def test_is_the_ridge_of_the_normal_equations():
    x, y = clouds()
    probe = probes.fit(x, y, 3, strengths=(0.01,))
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double()
    target = torch.nn.functional.one_hot(y, 3).double()
    gram = z.T @ z + 0.01 * len(z) * torch.eye(8, dtype=torch.double)
    expected = torch.linalg.solve(gram, z.T @ (target - target.mean(0)))
    torch.testing.assert_close(probe.weights[0].double(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(probes.fit(x, y, 3).weights, probes.fit(x, y, 3).weights)
    with pytest.raises(ValueError, match="60 features and 59 labels"):
        probes.fit(x, y[1:], 3)


def test_a_constant_channel_does_no_harm():
    x, y = clouds()
    x[:, 3] = 5
    assert probes.classify(x, y, x, y, 3)[0].mean() > 0.95


def test_retrieval_standardises_each_domain():
    (photos, y), (sketches, truth) = clouds(noise=1.0), clouds(count=30, seed=2, noise=1.0)
    shifted = 20 + 3 * sketches
    row = probes.retrieve(shifted, truth, photos, y, (shifted, photos))
    assert row["mAP"] > 80
    quick = probes.class_mean(probes.quick_precisions(shifted, truth, photos, y), truth.numpy())
    assert row["mAP"] == pytest.approx(quick, abs=1e-3)
    assert evaluate_retrieval(shifted, truth, photos, y, resamples=1)["mAP"] < row["mAP"]


def test_neighbours_tell_classes_from_kinds():
    x, y = clouds(count=30)
    kinds = torch.arange(30) < 15
    found = probes.neighbours(x, y, kinds)
    assert found["same class"] == found["same class, other kind"] == 100 and found["same kind"] < 80
    assert found["same class, chance"] == pytest.approx(100 * 9 / 29, abs=1e-3)
    assert found["same kind, chance"] == pytest.approx(100 * 14 / 29, abs=1e-3)
    assert found["same class, other kind, chance"] == pytest.approx(100 / 3, abs=1e-3)
    apart = probes.neighbours(torch.cat([x, 100.0 * kinds[:, None].repeat(1, 40)], 1), y, kinds)
    assert apart["same kind"] == 100


def test_pixels_are_sampled_from_all_classes_of_an_image():
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, 2, 5], labels[1, 0] = 1, -1
    sample = probes.sample_pixels(labels, 10)
    assert sample.labels[0].tolist().count(1) == 5 and (sample.labels[1] == 0).all()
    maps = torch.arange(64.0).view(1, 1, 8, 8).repeat(2, 1, 1, 1)
    values = probes.at_pixels(maps, sample.places).view(2, 10)
    assert set(values[0][sample.labels[0] == 1].tolist()) == {2 * 8 + 5.0}, "the pixel's own place"
    assert torch.equal(probes.sample_pixels(labels, 10).places, sample.places)


def test_a_map_that_holds_the_labels_is_segmented():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (6, 4, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    maps = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    sample = probes.sample_pixels(labels[:3], 50)
    counts, strength = probes.segmentation_counts(maps[:3], sample, maps[3:], labels[3:], 3)
    assert probes.mean_iou(counts)[0] > 99
    counts[:, 0, 0] = 0  # nothing of class 0 is found
    assert probes.mean_iou(counts)[0] < 67 and probes.mean_iou(counts, named=[1, 2])[0] > 99
    blank = torch.randn(6, 3, 16, 16, generator=generator)
    assert probes.mean_iou(probes.segmentation_counts(blank[:3], sample, blank[3:], labels[3:], 3, strength)[0])[0] < 50


def probe_data(side=64):
    generator = torch.Generator().manual_seed(0)

    def labelled(count):
        labels = torch.arange(count) % 2
        images = torch.rand(count, 3, side, side, generator=generator) - 0.5
        images[labels == 1, 0] += 0.4
        return Labelled(images, labels)

    def scenes(count):
        maps = torch.zeros(count, side, side, dtype=torch.long)
        maps[:, :, side // 2:] = 1
        images = torch.rand(count, 3, side, side, generator=generator) - 0.5
        images[:, 1, :, side // 2:] += 0.5
        return Labelled(images, maps)

    names = ("a", "b")
    return ProbeData(names, {s: labelled(12) for s in ("train", "val", "test")}, {"val": names, "test": names},
                     {s: labelled(4) for s in ("val", "test")}, {s: labelled(6) for s in ("val", "test")},
                     names, {s: scenes(4) for s in ("train", "val", "test")})


def test_grid_measures_every_cell_and_reports_the_best_on_test_images(tmp_path):
    data, cache = probe_data(), FeatureCache(tmp_path)
    for backbone, rows in ((layout(), 2), (PixelFeatures(8), 1)):
        cells = probe_grid.measure(backbone, [100, 800], data, cache)
        assert len(cells) == 3 * rows * len(backbone.stages)
        for name, key in probe_grid.GRANULARITIES.items():
            table = probe_grid.table(cells, name, [100, 800], backbone.stages)
            best = probe_grid.best(cells, name)
            assert table.shape == (2, len(backbone.stages)) and best.value == table.max()
            value, low, high = probe_grid.best_by_time(cells, name, [100, 800])
            assert (value == table.max(1)).all() and (low <= value).all() and (value <= high).all()
            row = probe_grid.report(backbone, best, data, cache, resamples=20)
            low, high = row[f"{key}_ci95"]
            assert low <= row[key] <= high and (row["t"], row["stage"]) == (best.t, best.stage)
    assert probe_grid.report(PixelFeatures(8), probe_grid.best(cells, "classification"), data, cache,
                             resamples=20)["accuracy"] == 100


def test_labels_of_test_images_do_not_choose(tmp_path):
    data, cache = probe_data(), FeatureCache(tmp_path)
    before = probe_grid.measure(layout(), [100, 800], data, cache)
    for part in (data.photos, data.scenes, data.sketches, data.gallery):
        part["test"] = Labelled(part["test"].images.flip(0), 1 - part["test"].labels)
    assert probe_grid.measure(layout(), [100, 800], data, cache) == before


def test_the_background_is_no_part_of_a_mean(tmp_path):
    whole, data, cache = probe_data(), probe_data(), FeatureCache(tmp_path)
    data.background = ("a",)
    assert whole.named == [0, 1] and data.named == [1]
    part, both = (probe_grid.measure(PixelFeatures(8), [0], one, cache, ("segmentation",))[0] for one in (data, whole))
    assert part.value != both.value
    rows = [probe_grid.report(PixelFeatures(8), part, one, cache, resamples=5)["mIoU"] for one in (data, whole)]
    assert rows[0] != rows[1]


def test_paired_difference():
    one, two = {"correct": np.array([1, 1, 0, 0])}, {"correct": np.array([1, 0, 0, 0])}
    assert probe_grid.paired(one, two)["difference"] == 25 and probe_grid.paired(one, one)["difference_ci95"] == [0, 0]


def test_names_that_are_no_combinations_are_bars():
    values = [float("nan"), *range(1, 40)]
    names = ["traffic light", *(f"thing{k}" for k in range(1, 40))]
    (axis,) = task_figures.combinations(names, ["thing39"], [values], ["IoU"]).axes
    assert [label.get_text() for label in axis.get_yticklabels()][:2] == ["thing39", "thing38"]
    assert axis.get_title(loc="left") == "IoU, the 30 largest of 39" and len(axis.patches) == 30
    assert len(task_figures.combinations(["red one", "one"], [], [[1.0, 2.0]], ["IoU"]).axes) == 2, "a grid and its bar"


def test_figures_are_drawn():
    values = np.arange(6.0).reshape(2, 3)
    grids = {"classification": {"values": values, "best": (1, 2), "label": "percent"}}
    figure = probe_figures.heat_maps(grids, [0, 500], ["down0", "mid", "up0"], "a network")
    assert figure.axes and figure.get_suptitle() == "a network"
    many = [f"stage{k}" for k in range(9)]
    marked = {name: {"values": np.arange(18.0).reshape(2, 9), "label": "percent", "chance": 2.5, "limits": (2.5, 17)}
              for name in ("one", "two")}
    figure = probe_figures.heat_maps(marked, [0, 500], many)
    assert figure.get_figwidth() <= 8 and figure.axes[0].get_position().x0 == figure.axes[1].get_position().x0
    assert "chance 2.5" in [label.get_text() for label in figure.axes[2].get_xticklabels()]
    curves = {"classification": {name: np.array([[1, 2], [0, 1], [2, 3]]) for name in "abcdefghi"}}
    assert len(probe_figures.by_time(curves, [0, 500], "percent").axes[0].lines) == 9, "the profile paper has as many"
    both = {"classification": {"a": np.array([[1, 2], [0, 1], [2, 3]]), "once": np.array([[2, 2], [1, 1], [3, 3]]),
                               "far": np.array([[90, 90], [80, 80], [99, 99]])}}
    axis = probe_figures.by_time(both, [0, 500], "percent", timeless=("once", "far"),
                                 chance={"classification": 1}).axes[0]
    assert len(axis.lines) == 4 and axis.get_ylim()[1] < 10 and axis.texts[0].get_text().startswith("far 90.0")
    points = probe_figures.projected(clouds(12)[0])
    assert np.array_equal(points, probe_figures.projected(clouds(12)[0])) and points.shape == (12, 2)
    assert probe_figures.projections({"t = 0": points}, [0, 1] * 6, [True, False] * 6, ["a", "b"]).axes
    many = probe_figures.projections({"t = 0": points}, list(range(12)), [False] * 12, [f"{k}" for k in range(12)])
    assert [text.get_text() for text in many.legends[0].get_texts()][9:] == ["9", "2 other classes", "photo", "sketch"]
    colours = probe_figures.principal_colours(torch.randn(2, 5, 4, 4))
    assert colours.shape == (2, 4, 4, 3) and 0 <= colours.min() and colours.max() <= 1
    maps = {0: {"mid": colours, "up0": colours}}
    assert probe_figures.component_maps(torch.zeros(2, 3, 8, 8), maps).axes


def test_task_figures_are_drawn():
    classes = ["background", "red one", "blue one", "red two"]
    maps = torch.tensor([[[0, 1], [1, 2]], [[3, 3], [-1, 0]]])
    assert task_figures.names_in(maps, classes) == ["red one\nblue one", "red two"]
    assert task_figures.names_in(maps, classes, most=1) == ["red one\n...", "red two"]
    assert task_figures.names_in(maps, classes, least=0.5) == ["red one", "red two"]
    names = {"answer": task_figures.names_in(maps, classes)}
    both, blank = {"truth": maps, "answer": maps}, torch.zeros(2, 3, 2, 2)
    figure = task_figures.label_maps(blank, both, classes, names, ["answer"])
    assert len(figure.axes) == 8 and [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    figure = task_figures.label_maps(blank, {"truth": maps}, ["", "a cat", "dog", "cow"], {}, ["truth"])
    assert len(figure.axes) == 4, "no row of colours, where first words are none"
    rows = [{"name": "a", "x": 3.0, "y": 30.0, "y_ci95": [20.0, 40.0]}]
    axes = task_figures.value_bars(rows, {"x": "x", "y": "y"}, "percent", top="shared").axes
    assert [axis.get_xlim() for axis in axes] == [(0, 48)] * 2
    shown = task_figures.retrieved(torch.zeros(1, 3, 4, 4), [torch.zeros(2, 3, 4, 4)], [[True, False]])
    assert len(shown.legends[0].get_texts()) == 2
    assert u_head_scheme.u_head_scheme().axes[0].texts
