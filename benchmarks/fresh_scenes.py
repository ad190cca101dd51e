"""The main rows of detection on test scenes that nobody looked at before: drawn when everything else was fixed.

    python -m benchmarks.fresh_scenes

The report's test scenes were seen several times while data, models and searches were made (README), so its numbers may
flatter what was chosen by then. These are composed of the test split's digits with another seed, in the same way, and
what reads them are the trained models and the settings of the report. `difference` is AP less that of DIVE on the same
scenes, with a paired bootstrap interval; `report` is the AP that the report has on its own scenes. `as_published` takes
back at once what the profile changes in the paper's optimiser (`benchmarks.searches`).
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks import measure, searches
from dive_lib import checkpoint, coco, glyphs, parameters, paths, scenes
from dive_lib.detection_results import evaluate_run
from dive_lib.files import read_json

SEED = 20261127  # the day on which these scenes were first drawn
SPLIT = "fresh"
ROWS = ("dive", "dive_best_search", "without_prior", "without_in_vocabulary")  # as reports/<profile>/metrics.json


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--seed", type=int, default=SEED, help="of the scenes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    folder = paths.runs(options.profile) / "benchmarks" / "fresh_scenes"
    truth = drawn(folder / "data", options)
    ids = [image["id"] for image in truth["images"]]
    reported = read_json(paths.reports(options.profile) / "metrics.json")["detection"]
    rows, dive = [], None
    for name, spec in specifications(options, folder / "data", ids):
        results = searches.obtained(folder / name, spec, workers=options.workers, label=name)
        runs = [results]
        dive = dive or runs
        row = evaluate_run(truth, results, ids)
        rows.append({"row": name, "AP": row["AP"], "AP_ci95": row["AP_ci95"], "AP50": row["AP50"],
                     **searches.difference(truth, runs, dive, ids),
                     "forward_equivalents": row["forward_equivalents"],
                     "report": reported[name]["AP"] if name in reported else None})
        print(measure.markdown(rows[-1:]))
    settings = {"profile": options.profile, "seed": options.seed, "images": len(ids), "workers": options.workers}
    weights = checkpoint.weights_fingerprint(paths.runs(options.profile) / "layout_ldm")
    return measure.save("fresh_scenes", settings, rows, arguments=measure.given(arguments), folder=options.out,
                        weights=weights)


def drawn(root: Path, options: argparse.Namespace) -> dict:
    """The instances of the fresh scenes, written beside the profile's training split, by links: what a run reads of it
    are categories and the sizes of boxes."""
    settings = parameters.load(options.profile)["data"]["scenes"]
    digits, labels = glyphs.load(paths.data(), "test")
    instances = scenes.write_split(root, SPLIT, digits, labels, options.images, seed=options.seed,
                                   shares=settings["shares"], covered=settings["covered"])
    for name in ("train", "annotations/instances_train.json"):
        link = root / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(paths.runs(options.profile) / "data" / name, link.parent))
    coco.read_split(root, SPLIT, strict=True)
    return instances


def specifications(options: argparse.Namespace, root: Path, ids: list[int]) -> Iterator[tuple[str, dict]]:
    """Each row's run: that of the report, on the fresh scenes."""
    runs, settings = paths.runs(options.profile), parameters.load(options.profile)["detection"]
    for name in (*ROWS, "as_published"):
        folder = "dive" if name == "as_published" else name.removeprefix("dive_")
        spec = read_json(runs / "detection" / folder / "spec.json")
        if name == "as_published":
            candidate = searches.CANDIDATES[name]
            spec |= {"inversion": searches.settled(candidate, settings, settings["seed"])[0],
                     "objective": spec["objective"] | {"weight": candidate["weight"]}}
        yield name, spec | {"data": paths.shorten(root), "split": SPLIT, "image_ids": ids}


if __name__ == "__main__":
    main()
