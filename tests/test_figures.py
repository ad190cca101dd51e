"""Figures: same data give the same bytes whatever style is in force; the numbers shown are those given."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from dive_lib import figures, glyphs, layout_figures, picture_grid, pictures, scenes
from dive_lib.coco import CocoLayouts, read_split
from dive_lib.files import write_text
from dive_lib.layout import LayoutGrid
from dive_lib.layout_figures import layout_summary
from dive_lib.report import PAPER_TABLE_1

GRID = LayoutGrid(("zero", "one", "seven"), image_size=64, bins=33, slots=4)
BOXES = torch.tensor([[4.0, 8, 20, 40], [30, 10, 44, 42]])
ABLATION = [{"name": "DIVE", "AP": 33.3, "AP50": 49.7, "AP_ci95": [29.0, 38.0], "paper_AP": 10.3},
            {"name": "best search", "AP": 42.1, "AP50": 61.2, "AP_ci95": None}]
STEPS = [{"steps": 200, "AP": 30.0, "AP50": 45.0, "AP_ci95": [26.0, 34.0], "forward_equivalents": 1600},
         {"steps": 50, "AP": 20.0, "AP50": 35.0, "AP_ci95": None, "forward_equivalents": 400}]
GAPS = [{"corruption": name, "t_low": low, "t_high": low + 99, "gap": gap, "share": share}
        for name, low, gap, share in (("empty", 0, 0.0277, 0.98), ("empty", 100, -0.001, 0.4),
                                      ("moved", 0, 0.0131, 0.9))]


def image(height=64, width=64):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def cell(**more):
    return {"image": image(), "boxes_xyxy": BOXES, "labels": ["one", "seven"], **more}


def summaries():
    two, one = GRID.encode(BOXES, torch.tensor([1, 2])), GRID.encode(BOXES[:1], torch.tensor([2]))
    return layout_summary([two, one], GRID), layout_summary([two], GRID)


FIGURES = {
    "loss": lambda: figures.loss_curve({"LDM": [(1, 1.0), (2, 0.2), (3, 0.1), (4, 0.1)], "prior": [(1, 1)]}),
    "ablation": lambda: figures.ablation_bars(ABLATION),
    "ablation_here": lambda: figures.ablation_bars(ABLATION[1:]),
    "steps": lambda: figures.steps_curve(STEPS, PAPER_TABLE_1),
    "steps_here": lambda: figures.steps_curve(STEPS[1:]),
    "convergence": lambda: figures.convergence_histogram([4, 120, 160], 200, every=4),
    "stopping": lambda: figures.early_stopping_curve([
        {"patience": 0, "saving": 0.0, "AP": 33.0, "AP_ci95": [29, 37]},
        {"patience": 40, "saving": 0.4, "AP": 31.0}]),
    "gap": lambda: figures.gap_heatmap(GAPS),
    "monitor": lambda: figures.monitor_scatter([0.1, 0.2, 0.3], [0.1, 0.25, 0.28], [True, False, False]),
    "statistics": lambda: layout_figures.layout_statistics(*summaries(), GRID.classes),
    "co_occurrence": lambda: layout_figures.co_occurrence(*summaries(), GRID.classes),
    "cost": lambda: figures.cost_accuracy([
        {"name": "a", "forward_equivalents": 800, "AP": 30.0, "AP_ci95": [25, 35]},
        {"name": "b", "forward_equivalents": 5000, "AP": 40.0}]),
    "detections": lambda: pictures.detections_grid([cell(scores=[0.9, 0.2], title="step 8"), cell()], 2),
    "comparison": lambda: pictures.comparison_grid([[cell(dropped=["one: illegal box"]), {"image": image()}]],
                                                   ["DIVE", "regenerated"], GRID.classes),
    "images": lambda: pictures.image_grid([image()] * 5, ["a"] * 5, columns=3, row_labels=["x", "y"]),
    "training": pictures.training_scheme,
    "inversion": pictures.inversion_scheme,
}


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_saved_alike_under_any_style(name, tmp_path):
    first = figures.save(FIGURES[name](), tmp_path / "new" / "a.png", dpi=60)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        second = figures.save(FIGURES[name](), tmp_path / "b.png", dpi=60)
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as picture:
        assert 360 <= picture.width <= 500 and "Software" not in picture.info
        assert np.asarray(picture.convert("L")).std() > 5  # not blank
    assert plt.get_fignums() == []  # a notebook would show it a second time
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png", "new"]


def test_save_accepts_png_only(tmp_path):
    with pytest.raises(ValueError, match="a.jpg.*png"):
        figures.save(figures.convergence_histogram([1], 2), tmp_path / "a.jpg")


def test_style_is_set_for_the_notebook():
    with mpl.rc_context():
        figures.style()
        assert mpl.rcParams["axes.spines.top"] is False
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"][0] == figures.BLUE


def test_loss_curve_reads_the_training_csv(tmp_path):
    path = write_text(tmp_path / "loss.csv", "step,loss\n10,0.5\n20,0.25\n")
    (axis,) = figures.loss_curve({"LDM": path}).axes
    np.testing.assert_array_equal(axis.lines[0].get_xydata(), [[10, 0.5], [20, 0.25]])


def test_smoothing_is_a_mean_over_neighbours():
    np.testing.assert_allclose(figures._smooth(np.array([0.0, 3, 6, 9]), 1), [1.5, 3, 6, 7.5])


def test_bars_are_as_long_as_the_numbers():
    here, paper = figures.ablation_bars(ABLATION).axes
    assert sorted(bar.get_width() for bar in here.patches) == [33.3, 42.1, 49.7, 61.2]
    assert [bar.get_width() for bar in paper.patches] == [10.3]
    assert [list(line.get_xdata()) for line in here.lines] == [[29.0, 38.0]]


def test_a_bars_number_stands_at_its_own_end():
    row = ABLATION[0] | {"reference_AP": 90.0}
    numbers = {text.get_text(): text.xy[0] for text in figures.ablation_bars([row]).axes[0].texts}
    assert numbers == {"33.3": 38.0, "49.7": 49.7}, "and not at DIVE's AP on the row's images"


def test_gap_heatmap_shows_gap_and_share():
    figure = figures.gap_heatmap(GAPS)
    shown = texts(figure)
    assert "+27.7\n98 %" in shown and "\u22121.0\n40 %" in shown and "100\u2013199" in shown
    values = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(values, [[98, 40], [90, np.nan]])


def test_monitor_scatter_counts_failures():
    perfect = [True, False, False, False]
    shown = texts(figures.monitor_scatter([0.1, 0.2, 0.3, 0.4], [0.1, 0.25, 0.28, 0.4], perfect))
    assert {"right: 1 of 4", "search failure: 1 of 4", "model failure: 2 of 4"} <= set(shown)


def test_histogram_bins_hold_equally_many_grid_values():
    values = np.arange(2.0, 64, 2)
    counts, _ = np.histogram(values, layout_figures._edges(values))
    assert len(counts) <= 18 and set(counts[:-1]) == {2} and counts.sum() == len(values)
    assert len(layout_figures._edges(np.array([3.0]))) == 2 and len(layout_figures._edges(np.array([]))) == 2


def test_boxes_follow_the_original_aspect_ratio():
    figure = pictures.detections_grid([cell(original_size=(128, 32))], columns=1)
    axis = figure.axes[0]
    assert axis.get_xlim() == (0, 128) and axis.get_ylim() == (32, 0)
    assert [patch.get_bbox().extents.tolist() for patch in axis.patches] == [[8, 4, 40, 20], [60, 5, 88, 21]]
    assert set(texts(figure)) >= {"one", "seven"}


def test_pixels_keep_their_values():
    flat = torch.tensor([-1.0, 0, 1]).view(3, 1, 1).expand(3, 2, 2)
    shown = pictures.image_grid([flat], columns=1).axes[0].images[0]
    assert shown.get_array()[0, 0].tolist() == [0, 128, 255]


def test_a_class_keeps_its_colour():
    seven = cell(boxes_xyxy=BOXES[:1], labels=["seven"])
    one, other = (pictures.detections_grid([item], classes=GRID.classes).axes[0].patches
                  for item in (cell(), seven))
    assert one[1].get_edgecolor() == other[0].get_edgecolor() != one[0].get_edgecolor()


def test_labels_keep_apart():
    place = picture_grid._free_place
    box, size, size_of_image = (10, 20, 30, 40), (15, 5), (64, 64)
    first = place(box, size, size_of_image, [])
    assert first == (10, 15, 0)
    second = place(box, size, size_of_image, [(10, 15, 25, 20)])
    assert second[1] >= 20 or second[0] >= 25
    assert place((50, 0, 64, 64), size, size_of_image, [])[0] + 15 <= 64


def test_dropped_objects_are_named():
    none = GRID.none_tokens.tolist()
    tokens = torch.tensor([[2, 3, none[2], 5, 9], [1, 9, 9, 4, 20], [none[0], 3, 4, 9, 9], [0, *none[1:]],
                           [*none[:3], 9, 9]])
    dropped = GRID.decode(tokens).dropped
    assert pictures.dropped_objects(dropped, GRID) == ["seven: y1 missing", "one: illegal box", "no class",
                                                       "zero: no box", "no class; x1, y1 missing"]


def test_comparison_lists_dropped_objects_and_shortens_the_list():
    rows = [[cell(dropped=[]), cell(dropped=[f"object {k}" for k in range(6)])]]
    figure = pictures.comparison_grid(rows, ["a", "b"])
    assert figure.axes[0].get_xlabel() == "\u2013"
    assert figure.axes[1].get_xlabel() == \
        "\u2022 object 0\n\u2022 object 1\n\u2022 object 2\n\u2022 object 3\nand 2 more"
    under = pictures.comparison_grid([[cell(), cell(dropped=["object"])]], ["truth", "a"]).axes[0]
    assert under.get_xlabel() == "dropped:"
    with pytest.raises(ValueError, match="3 cells.*2"):
        pictures.comparison_grid(rows, ["a", "b", "c"])
    long = [[cell(dropped=["no class; x1, y1, y2 missing"] * 4) for _ in range(7)]]
    lines = pictures.comparison_grid(long, list("abcdefg")).axes[0].get_xlabel().splitlines()
    assert max(map(len, lines)) <= 20, "texts of neighbouring columns must not meet"
    assert len(lines) == 5 and lines[-1] == "and 2 more", "nor of neighbouring rows"


def test_large_images_stand_in_fewer_columns_and_beneath_each_other():
    photo = {"image": image(256, 256)}
    rows = [photo | {"title": "scene"}, *[photo] * 7, photo | {"title": "sample"}, *[photo] * 7]
    axes = np.array(pictures.detections_grid(rows, columns=8).axes).reshape(4, 4)
    assert [axis.get_title() for axis in axes[:, 0]] == ["scene", "sample", "", ""], "pairs stay pairs"
    stepped = [photo | {"title": f"step {k}"} for k in range(6)]
    axes = pictures.detections_grid(stepped, columns=3).axes
    assert [axis.get_title() for axis in axes] == [f"step {k}" for k in range(6)]
    labelled = pictures.image_grid([photo["image"]] * 16, columns=8, row_labels=["image", "decoded"]).axes
    assert [axis.get_ylabel() for axis in labelled[::4]] == ["image", "decoded", "image", "decoded"]
    columns = pictures.image_grid([photo["image"]] * 24, list("abcdefgh"), columns=8).axes
    assert "".join(axis.get_title() for axis in columns) == "abcdefgh" and columns[12].get_title() == "e"


def test_a_wide_comparison_of_photos_names_the_columns_of_each_line():
    photo = {"image": image(256, 256)}
    rows = [[photo, *[photo | {"dropped": []}] * 5]] * 2
    figure = pictures.comparison_grid(rows, list("abcdef"))
    assert [axis.get_title(loc="center") for axis in figure.axes] == list("abcdef") * 2
    assert [axis.get_xlabel() for axis in figure.axes[:6:3]] == ["dropped:", "\u2013"]


def test_of_many_labels_only_those_with_room_are_written():
    boxes = torch.tensor([[10.0, 10.0, 20.0 + k, 20.0 + k] for k in range(30)])
    crowd = {"image": image(), "boxes_xyxy": boxes, "labels": ["one"] * 30}
    axis = pictures.detections_grid([crowd] * 8, columns=8).axes[0]
    assert len(axis.patches) == 30 and 1 <= len(axis.texts) < 30
    few = pictures.detections_grid([crowd | {"boxes_xyxy": boxes[:8], "labels": ["one"] * 8}] * 8, columns=8).axes[0]
    assert len(few.texts) == 8


def test_of_many_classes_the_most_frequent_are_named():
    grid = LayoutGrid(tuple(f"thing {k}" for k in range(80)), 64, 33, 4)
    layouts = [grid.encode(BOXES, torch.tensor([79, c])) for c in range(40, 60)]
    summary = layout_summary(layouts, grid)
    for figure in (layout_figures.layout_statistics(summary, summary, grid.classes).axes[1],
                   layout_figures.co_occurrence(summary, summary, grid.classes).axes[0]):
        named = [label.get_text() for label in figure.get_xticklabels()]
        assert named == [f"thing {k}" for k in (*range(40, 55), 79)]
        assert figure.get_xlabel() == "16 most frequent\nof 80 classes"


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        pictures.image_grid([])


def test_cells_show_an_image_with_its_annotations_or_its_detections(tmp_path):
    glyphs.export(tmp_path / "data")
    digits, labels = glyphs.load(tmp_path / "data", "val")
    scenes.write_split(tmp_path / "scenes", "val", digits, labels, 2, seed=0)
    layouts = CocoLayouts(read_split(tmp_path / "scenes", "val"), 64, 4)
    grid = LayoutGrid(scenes.CLASSES, image_size=64, bins=33, slots=4)
    truth = pictures.annotated(layouts, 1)
    tokens = grid.encode(layouts.boxes_xyxy(1), layouts.class_ids(1))
    found = pictures.detected(layouts, grid, {"image_id": layouts.image_id(1), "tokens": tokens.tolist()}, "found")
    assert found["title"] == "found" and "title" not in truth
    assert torch.equal(found["image"], truth["image"]) and torch.equal(found["boxes_xyxy"], truth["boxes_xyxy"])
    assert found["labels"] == truth["labels"]


def test_show_saves_a_figure_and_shows_the_saved_file(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    figures.show(pictures.image_grid([image()]), tmp_path / "a.png")
    assert [image.data for image in shown] == [(tmp_path / "a.png").read_bytes()]
    figures.show(figures.gap_heatmap(GAPS), tmp_path / "all_gaps.png")
    assert shown[1].alt.startswith("all gaps: loss above the true layout's, times 1000, and share of scenes; timesteps")
