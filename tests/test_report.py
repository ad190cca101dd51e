"""Metrics files and the README's table: merged, rounded, and equal to what the README shows."""

import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from dive_lib import layout_figures, paths, report
from dive_lib.files import read_json, write_json
from dive_lib.layout import LayoutGrid

METRICS = {"detection": {
    "dive": {"AP": 33.34, "AP50": 49.66, "AP_ci95": [29.04, 37.95], "n_images": 160,
             "forward_equivalents": 1850.4},
    "dive_best_search": {"AP": 42.0, "AP50": 61.0, "AP_ci95": None, "n_images": 160,
                         "forward_equivalents": 900},
}}
BLOCKS = [f"{report.BEGIN.format(name)}\nold\n{report.END.format(name)}" for name in report.readme_tables({})]
README = "\n\n".join(["# Title", *BLOCKS, "Text.\n"])


def test_metrics_are_merged_rounded_and_sorted(tmp_path):
    path = tmp_path / "reports" / "metrics.json"
    report.update_metrics(path, "detection.dive", {"AP": np.float64(33.33333), "AP_ci95": (1.00004, 2.00006)})
    report.update_metrics(path, "detection.dive", {"n_images": 160, "AP": torch.tensor(0.12345678)})
    report.update_metrics(path, "data", {"b": True, "a": {"x": [-0.00001, None, "text"]}})
    dive = {"AP": 0.1235, "AP_ci95": [1.0, 2.0001], "n_images": 160}
    data = {"a": {"x": [0.0, None, "text"]}, "b": True}
    assert read_json(path) == {"data": data, "detection": {"dive": dive}}
    assert list(read_json(path)) == ["data", "detection"] and list(read_json(path)["data"]) == ["a", "b"]
    assert "-0.0" not in path.read_text()


def test_the_order_of_stages_leaves_no_trace(tmp_path):
    sections = [("detection.dive", {"AP": 1 / 3}), ("detection.without_both", {"AP": 2 / 3}), ("a", {"n": 4})]
    for name, order in (("a.json", sections), ("b.json", sections[::-1])):
        for section, values in order:
            report.update_timings(tmp_path / name, section, values)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("section", ["", "detection.", ".dive"])
def test_a_malformed_section_is_refused(tmp_path, section):
    with pytest.raises(ValueError, match="section"):
        report.update_metrics(tmp_path / "metrics.json", section, {"AP": 1.0})
    assert not (tmp_path / "metrics.json").exists()


def test_a_number_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="detection.dive.AP"):
        report.update_metrics(tmp_path / "metrics.json", "detection.dive", {"AP": float("nan")})


def test_table_shows_present_rows_beside_the_paper():
    lines = report.results_table(METRICS).splitlines()
    assert lines[2] == ("| DIVE, straight-through | **33.3** [29.0, 38.0] | 49.7 | 160 |  | 1,850 "
                        "| 10.3 / 14.0 |")
    assert lines[3] == "| best search (ours: local, no prior) | **42.0** | 61.0 | 160 |  | 900 | \u2013 |"
    assert len(lines) == 4 and {line.count("|") for line in lines} == {8}
    assert len(report.results_table({}).splitlines()) == 2
    fewer = {"detection": {"without_both": METRICS["detection"]["dive"] | {"dive_on_same_images": 24.91}}}
    assert "| 160 | 24.9 | 1,850 |" in report.results_table(fewer)


def test_detectors_stand_beneath_with_the_papers_table_2():
    row = {"AP": 81.23, "AP50": 98.0, "AP_ci95": [79.0, 84.0], "n_images": 160, "forward_equivalents": 1}
    both = METRICS | {"detectors": {"synthetic_data": row | {"forward_equivalents_once": 50_000}, "supervised": row}}
    lines = report.results_table(both).splitlines()
    assert lines[4] == ("| detector trained on generated images | **81.2** [79.0, 84.0] | 98.0 | 160 |  "
                        "| 1 (and 50,000 once) | 4.7 / 8.7 (DIVE 7.1 / 11.0) |")
    assert len(lines) == 6 and {line.count("|") for line in lines} == {8}
    first, second, third, last = report.detector_rows(both)
    assert (first["AP"], first["paper_AP"], last["AP"], last["paper_AP50"]) == (33.34, 7.1, 81.23, 12.7)
    assert "paper_AP" not in second and third["name"] == "detector trained on generated images"
    assert [row["name"] for row in report.detector_rows(METRICS)] == [first["name"], second["name"]]


def test_ablation_rows_carry_the_papers_numbers():
    first, second = report.ablation_rows(METRICS)
    assert (first["AP"], first["paper_AP"], first["paper_AP50"]) == (33.34, 10.3, 14.0)
    assert "paper_AP" not in second and second["name"] == "best search (ours: local, no prior)"


def test_readme_is_updated_between_the_markers_only(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README)
    assert not report.readme_matches(README, METRICS)
    report.update_readme(path, METRICS)
    text = path.read_text()
    begin, end = report.BEGIN.format("detection"), report.END.format("detection")
    assert text.startswith(f"# Title\n\n{begin}\n| ") and f"|\n{end}\n\n<!-- class" in text
    assert text.endswith("<!-- vermouth:begin -->\n\n<!-- vermouth:end -->\n\nText.\n"), "nothing was run"
    assert report.readme_matches(text, METRICS)
    report.update_readme(path, METRICS)
    assert path.read_text() == text
    changed = {"detection": {"dive": METRICS["detection"]["dive"] | {"AP": 33.4}}}
    assert not report.readme_matches(text, changed)


WRONG_WAY = f"{report.END.format('detection')}\n{report.BEGIN.format('detection')}\n" + "\n".join(BLOCKS[1:])


@pytest.mark.parametrize("text, table", [
    ("none", "detection"), (WRONG_WAY, "detection"), (README + README, "detection"),
    *((README.replace(block, ""), name) for block, name in zip(BLOCKS, report.readme_tables({})))])
def test_missing_markers_are_an_error(tmp_path, text, table):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"README.md.*<!-- {table}:begin"):
        report.update_readme(path, METRICS)
    assert path.read_text() == text


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(README)
    write_json(paths.reports("smoke") / "metrics.json", METRICS)
    report.main(["smoke"])
    assert "smoke" in capsys.readouterr().out
    assert report.readme_matches((tmp_path / "README.md").read_text(), METRICS)
    with pytest.raises(FileNotFoundError, match="metrics.json"):
        report.main([])


def test_module_is_a_command():
    shown = subprocess.run([sys.executable, "-m", "dive_lib.report", "--help"], cwd=paths.ROOT, check=True,
                           text=True, stdout=subprocess.PIPE).stdout
    assert "python -m dive_lib.report" in shown and "profile" in shown


def test_layout_summary_of_known_layouts():
    grid = LayoutGrid(("zero", "one", "two"), image_size=64, bins=33, slots=3)
    boxes = torch.tensor([[0.0, 0, 10, 20], [20, 10, 30, 40]])
    broken = grid.encode(boxes, torch.tensor([0, 1]))
    broken[0, 1], broken[1, 4] = broken[0, 3], grid.bins  # an illegal box and a [none] coordinate
    layouts = [grid.encode(boxes, torch.tensor([0, 1])), grid.encode(boxes, torch.tensor([1, 1])), broken]
    summary = layout_figures.layout_summary(torch.stack(layouts), grid)
    assert summary["objects"].tolist() == [2, 2, 0]
    np.testing.assert_allclose(summary["classes"], [0.25, 0.75, 0])
    np.testing.assert_allclose(summary["class_height"], [20, (30 + 20 + 30) / 3, np.nan])
    np.testing.assert_allclose(summary["co_occurrence"], [[0, 0.25, 0], [0.25, 0.5, 0], [0, 0, 0]])
    assert summary["width"].tolist() == [10] * 4 and summary["bottom"].tolist() == [20, 40, 20, 40]


def test_committed_readme_shows_the_committed_metrics():
    readme, metrics = paths.ROOT / "README.md", paths.ROOT / "reports" / "mini" / "metrics.json"
    for path in (readme, metrics):
        if not path.is_file():
            pytest.skip(f"{paths.shorten(path)} is not there yet; make repro writes it")
    assert report.readme_matches(readme.read_text(encoding="utf-8"), read_json(metrics)), \
        "the README's table is out of date; run python -m dive_lib.report"


def test_rendered_notebooks_show_no_warnings():
    for path in sorted((paths.ROOT / "reports" / "mini").glob("*.ipynb")):
        outputs = [output for cell in read_json(path)["cells"] for output in cell.get("outputs", [])]
        assert outputs and not [o for o in outputs if o.get("name") == "stderr"], path.name


def test_committed_notebooks_show_their_figures():
    """A reader who only opens the executed notebooks sees every figure that they save."""
    executed = sorted((paths.ROOT / "reports" / "mini").glob("*.ipynb"))
    assert executed
    for path in executed:
        code = [cell for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
        drawn = sum("".join(cell["source"]).count("figures.show(") for cell in code)
        shown = sum("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
        assert shown >= max(drawn, 1), f"{path.name}: {drawn} figures are saved, {shown} are shown"


def test_an_embedded_figure_is_small_and_looks_the_same(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "figure.png"
    photo = np.kron(rng.integers(40, 200, (6, 8, 3)), np.ones((20, 20, 1))) + rng.integers(-20, 20, (120, 160, 1))
    photo[:30] = 255  # the page
    photo[40:44, 20:120] = (213, 94, 0)  # a thin box's edge
    PIL.Image.fromarray(photo.astype(np.uint8)).convert("RGBA").save(path)
    before = path.read_bytes()
    shown = report.embedded(path)
    assert shown.data == report.embedded(path).data and len(shown.data) < 0.5 * len(before)
    assert path.read_bytes() == before and shown.format == "png"
    colours = np.asarray(PIL.Image.open(io.BytesIO(shown.data)).convert("RGB"), dtype=float)
    assert colours.shape == photo.shape and np.abs(colours - photo).mean() < 8
    assert (colours[:30] == 255).all() and np.abs(colours[40:44, 20:120] - (213, 94, 0)).max() < 12
