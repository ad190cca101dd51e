"""The numbers of the report: metrics files, the README's results tables; and figures small enough for one page.

`reports/<profile>/metrics.json` holds every headline number of a profile, `timings.json` the seconds, which
differ from run to run. The README's tables stand between two markers and are generated from the former:

    python -m dive_lib.report [PROFILE]
"""

import argparse
import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL.Image
from IPython.display import Image, Markdown, display

from dive_lib import paths, vermouth_report
from dive_lib.files import merge_json, read_json, rounded, write_text
from dive_lib.wording import interval, spelt

BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"  # around each of the README's tables

METHODS = {"dive": "DIVE, straight-through", "dive_best_search": "best search (ours: local, no prior)",
           "without_prior": "without prior", "without_in_vocabulary": "without in-vocabulary search",
           "monitored_in_vocabulary": "continuous gradient, discrete monitor",
           "without_both": "without both", "decoupled_prior": "decoupled priors (class, box)"}
"""Rows of the results table: key in metrics["detection"] -> name."""

PAPER_TABLE_3 = {
    "dive": {"AP": 10.3, "AP50": 14.0, "AP75": 11.5},
    "without_prior": {"AP": 6.7, "AP50": 10.6, "AP75": 6.2},
    "without_in_vocabulary": {"AP": 4.6, "AP50": 5.6, "AP75": 4.8},
    "without_both": {"AP": 3.2, "AP50": 5.4, "AP75": 3.2},
    "decoupled_prior": {"AP": 9.0, "AP50": 12.4, "AP75": 9.2},
}
"""DIVE, Table III: 100 images of COCO 2017, percent."""

DETECTORS = {"synthetic_data": ("detector trained on generated images", "Synthetic Data, R50"),
             "diffusion_feature": ("detector on the model's features", "Diffusion Feature, LDM-8"),
             "supervised": ("detector trained on real images", "Faster R-CNN, R50")}
"""Rows of Table II: key in metrics["detectors"] -> name, and the paper's row of the same kind."""

PAPER_TABLE_2 = {name: dict(zip(("AP", "AP50", "AP75", "APS", "APM", "APL"), values)) for name, *values in (
    ("Synthetic Data, R50", 4.7, 8.7, 4.5, 0.0, 3.1, 9.8),
    ("Diffusion Feature, LDM-8", 6.9, 13.4, 5.9, 0.0, 3.5, 15.8),
    ("Diffusion Feature, SD (v1.5)", 7.9, 15.7, 7.3, 0.0, 1.2, 18.9),
    ("DIVE, LDM-8", 7.1, 11.0, 7.1, 0.0, 1.2, 16.4),
    ("Faster R-CNN, R50", 6.8, 12.7, 5.7, 0.3, 5.0, 13.2),
    ("Faster R-CNN, R101-FPN", 9.6, 17.3, 9.5, 2.2, 9.0, 17.2),
    ("DETR, R50", 9.3, 16.9, 8.7, 1.3, 6.4, 18.3),
    ("DETR, R101-DC5", 14.7, 24.9, 13.9, 2.6, 11.6, 27.6),
    ("DiffDet (a), R101-FPN", 14.6, 24.4, 14.6, 2.9, 13.8, 25.9),
    ("DiffDet (b), R101-FPN", 15.2, 25.7, 14.8, 3.4, 14.4, 26.9))}
"""DIVE, Table II, in percent: COCO 2017 at 256 x 256, detectors trained from scratch. What tells the two rows of
DiffDet apart is lost in our copy."""

PAPER_TABLE_1 = ({"steps": 400, "AP": 5.7, "minutes": 18}, {"steps": 1000, "AP": 6.4, "minutes": 45},
                 {"steps": 2000, "AP": 7.1, "minutes": 90}, {"steps": 4000, "AP": 7.2, "minutes": 180})
"""DIVE, Table I: 500 images of COCO 2017, minutes per image on one RTX 3090."""

CLASSIFIERS = {
    "diffusion_classifier": ("Diffusion Classifier, every class", 77.3),
    "diffusion_classifier_adaptive": ("Diffusion Classifier, adaptive", None),
    "dive_published": ("DIVE, the published loop", 77.2),
    "dive_text": ("DIVE, as the text has it", None),
    "dive_exact": ("DIVE, exact reuse", None),
    "dive_fast": ("best approximation (ours)", None),
    "diffusion_classifier_independent": ("independent noises: every class", None),
    "dive_independent": ("independent noises: DIVE, exact reuse", None),
    "dive_without_in_vocabulary": ("DIVE without in-vocabulary search", 60.3),
    "synthetic_data": ("network trained on generated images", 67.1),
    "diffusion_feature": ("head on the model's features", 69.2),
    "convnet": ("plain convolutions (AlexNet)", 57.5),
    "resnet": ("residual network (ResNet-18)", 70.6),
    "resnet_bottleneck": ("bottleneck blocks (ResNet-50)", 77.6),
    "resnext": ("grouped bottlenecks (ResNeXt-101)", 79.7),
    "vit_large": ("vision transformer (ViT-L/32)", 78.0),
    "vit": ("smaller patches and width (ViT-B/16)", 81.5),
    "swin": ("shifted windows (Swin-B)", 83.7),
}
"""Rows of Table IV: key in metrics["classification"] -> name, in brackets the network that the paper has in this place,
and the paper's accuracy on 2000 images of ImageNet."""


PAPER_TABLE_6 = {
    "classes": {"DiT-XL/2": {"accuracy": 77.2, "frechet_distance": 2.27, "inception_score": 278.24, "precision": 0.83,
                             "recall": 0.57},
                "LDM-4": {"accuracy": 62.7, "frechet_distance": 3.6, "inception_score": 247.67, "precision": 0.87,
                          "recall": 0.48}},
    "layouts": {"LDM-8": {"AP": 7.1, "frechet_distance": 18.36, "precision": 0.53, "recall": 0.63},
                "LDM-8-S": {"AP": 4.5, "frechet_distance": 24.9, "precision": 0.45, "recall": 0.62}},
}
"""DIVE, Table VI: classes of ImageNet, layouts of COCO 2017; it gives no inception score for layouts."""


def update_metrics(path: str | os.PathLike, section: str, values: Mapping, *, digits: int = 4) -> dict:
    """Merges {section: values} into a metrics file, atomically, and returns the whole file's content.

    section: a key, or keys joined by dots, such as "detection.dive". Floats are rounded to `digits` decimals and
    keys sorted, so the order of the stages leaves no trace. Other sections stay; within the section,
    values replace those of the same key. Raises ValueError for NaN and infinity.
    """
    if not section or not all(section.split(".")):
        raise ValueError(f"{paths.shorten(path)}: section {section!r} is not a key or keys joined by dots")
    update = rounded(values, digits)
    for key in reversed(section.split(".")):
        update = {key: update}
    return merge_json(path, update)


def write_metrics(path: str | os.PathLike, sections: Mapping) -> None:
    """Writes a metrics file afresh: what no section holds any more is gone. Rounded and sorted as by update_metrics."""
    path = Path(path)
    path.unlink(missing_ok=True)
    for name, values in sections.items():
        update_metrics(path, name, values)


update_timings = functools.partial(update_metrics, digits=6)
"""The same for `timings.json`: values are seconds, which differ from run to run and so stand apart."""


def results_table(metrics: Mapping) -> str:
    """The README's Markdown table from the content of metrics.json; absent rows are left out.

    Forward-equivalents are means per image.
    """
    header = ["method", "AP [95 % interval]", "AP50", "images", "DIVE's AP on these", "forward-equivalents per image",
              "paper, COCO: AP / AP50"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    rows = [(name, metrics.get("detection", {}).get(key), _pair(PAPER_TABLE_3.get(key)))
            for key, name in METHODS.items()]
    dive = _pair(PAPER_TABLE_2["DIVE, LDM-8"])  # on other images than Table III's
    rows += [(name, metrics.get("detectors", {}).get(key), f"{_pair(PAPER_TABLE_2[paper])} (DIVE {dive})")
             for key, (name, paper) in DETECTORS.items()]
    for name, row, paper in rows:
        if row is None:
            continue
        ends = row.get("AP_ci95")
        cells = [f"**{row['AP']:.1f}**" + (f" {interval(ends)}" if ends else ""),
                 f"{row['AP50']:.1f}", f"{row['n_images']}", f"{row['dive_on_same_images']:.1f}"
                 if "dive_on_same_images" in row else "", _cost(row), paper]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cost(row: Mapping) -> str:
    """Forward-equivalents per image, and what was paid once for all images."""
    once = row.get("forward_equivalents_once")
    return f"{row['forward_equivalents']:,.0f}" + (f" (and {once:,} once)" if once else "")


def _pair(row: Mapping | None) -> str:
    return f"{row['AP']:.1f} / {row['AP50']:.1f}" if row else "\N{EN DASH}"


def ablation_rows(metrics: Mapping) -> list[dict]:
    """The same rows for `figures.ablation_bars`."""
    rows = []
    for key, name in METHODS.items():
        row = metrics.get("detection", {}).get(key)
        if row is not None:
            paper = {f"paper_{k}": v for k, v in PAPER_TABLE_3.get(key, {}).items()}
            rows.append({"name": name, **{k: row.get(k) for k in ("AP", "AP50", "AP_ci95")},
                         "reference_AP": row.get("dive_on_same_images"), **paper})
    return rows


def detector_rows(metrics: Mapping) -> list[dict]:
    """The rows of Table II for `figures.ablation_bars`: DIVE, the local search, the detectors."""
    names = {("detection", key): (METHODS[key], paper)
             for key, paper in (("dive", "DIVE, LDM-8"), ("dive_best_search", None))}
    names |= {("detectors", key): value for key, value in DETECTORS.items()}
    return [{"name": name, **{key: metrics[section][row].get(key) for key in ("AP", "AP50", "AP_ci95")},
             **{f"paper_{key}": value for key, value in PAPER_TABLE_2.get(paper, {}).items()}}
            for (section, row), (name, paper) in names.items() if row in metrics.get(section, {})]


def existing_metrics(profile: str, names: Sequence[str]) -> dict:
    """Content of those metrics files that were written: a pipeline may have been run in part."""
    return {name: read_json(paths.metrics(profile, name)) for name in names if paths.metrics(profile, name).is_file()}


def existing_figures(profile: str, names: Sequence[str]) -> list[Path]:
    """Those of the figures (such as "11_classification/cost") that were drawn."""
    files = [paths.reports(profile) / "figures" / f"{name}.png" for name in names]
    return [path for path in files if path.is_file()]


def embedded(path: str | os.PathLike, alt: str | None = None) -> Image:
    """A figure's PNG for display in a notebook: the same pixels in the 256 colours that serve it best.

    alt: its alternative text, by default the file's name.

    These are a third of the bytes, since the page that shows every figure is loaded as a whole. The file itself keeps
    all its colours. Equal files give equal bytes. Transparency is dropped: figures have none.
    """
    content = io.BytesIO()
    with PIL.Image.open(path) as figure:
        # Without k-means, the few pixels of a box's edge would get a colour of the photo behind it.
        palette = figure.convert("RGB").quantize(256, kmeans=3, dither=PIL.Image.Dither.NONE)
        palette.save(content, "PNG", optimize=True)
    return Image(content.getvalue(), format="png", alt=alt or spelt(Path(path).stem))


def gallery(profile: str, captions: Mapping[str, str]) -> None:
    """Shows those figures that were drawn, each under its caption and the name of the notebook that drew it.

    captions: figure, such as "11_classification/cost" -> a line of Markdown.
    """
    for name, caption in captions.items():
        for path in existing_figures(profile, [name]):
            notebook = name.split("/")[0]
            display(Markdown(f"**{caption}** ([{notebook}]({notebook}.ipynb))"), embedded(path, caption))


def classification_rows(metrics: Mapping) -> list[dict]:
    """Present rows of Table IV, {key, name, accuracy, accuracy_ci95, n_images, forward_equivalents, paper}."""
    rows = metrics.get("classification", {})
    return [{"key": key, "name": name, "paper": paper, **rows[key]} for key, (name, paper) in CLASSIFIERS.items()
            if key in rows]


def classification_table(metrics: Mapping) -> str:
    """Table IV in Markdown from the content of metrics.json; empty without a row."""
    header = ["method", "accuracy [95 % interval]", "images", "enumeration's on these",
              "forward-equivalents per image", "paper, ImageNet: accuracy"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    rows = classification_rows(metrics)
    most = max((row["n_images"] for row in rows), default=0)
    for row in rows:
        beside = f"{row['accuracy'] - row['difference']:.1f}" if row["n_images"] < most and "difference" in row else ""
        paper = "\N{EN DASH}" if row["paper"] is None else f"{row['paper']:.1f}"
        cells = [row["name"], f"**{row['accuracy']:.1f}** {interval(row['accuracy_ci95'])}", f"{row['n_images']}",
                 beside, _cost(row), paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def readme_tables(metrics: Mapping) -> dict[str, str]:
    """The README's tables by the name of their markers; empty where the metrics are not there."""
    return {"detection": results_table(metrics), "classification": classification_table(metrics),
            "vermouth": vermouth_report.table(metrics)}


def update_readme(readme_path: str | os.PathLike, metrics: Mapping) -> Path:
    """Replaces what stands between the markers by `readme_tables`, atomically. ValueError without markers."""
    text = Path(readme_path).read_text(encoding="utf-8")
    for name, table in readme_tables(metrics).items():
        first, last = _block(text, name, paths.shorten(readme_path))
        text = f"{text[:first]}\n{table}\n{text[last:]}"
    return write_text(readme_path, text)


def readme_matches(readme_text: str, metrics: Mapping) -> bool:
    """Whether the README shows exactly these metrics. Raises ValueError without markers."""
    tables = readme_tables(metrics)
    return tables == {name: readme_text[slice(*_block(readme_text, name, "README"))].strip() for name in tables}


def _block(text: str, name: str, file: str) -> tuple[int, int]:
    """Where the text between a table's markers begins and ends."""
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{file}: the table needs one {begin} before it, one {end} after it")
    return text.index(begin) + len(begin), text.index(end)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m dive_lib.report", description="Updates the README's table.")
    parser.add_argument("profile", nargs="?", default="mini", help="of reports/<profile>/metrics.json")
    profile = parser.parse_args(arguments).profile
    update_readme(paths.ROOT / "README.md", read_json(paths.reports(profile) / "metrics.json"))
    print(f"README.md: results of profile {profile}")


if __name__ == "__main__":
    main()
