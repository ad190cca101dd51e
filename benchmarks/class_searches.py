"""DIVE's settings for classification, on the validation split: what rate, eps, timesteps and noises are worth.

    python -m benchmarks.class_searches --profile mini --images 200
    python -m benchmarks.class_searches --only exact published_eps

Each row of CANDIDATES is a row of Table IV (`row`) with changes to its settings or to its (t, noise) pairs. Rows with
the search within the vocabulary have the profile's as reference, those without it have that row, if it was run before
them. The test split is never looked at.
"""

import argparse
from pathlib import Path

from benchmarks import measure
from dive_lib import checkpoint, class_data, classification_results, classifications, parameters, paths
from dive_lib.image_runs import forget, seconds_per_image
from dive_lib.schedule import evenly_spaced

CANDIDATES = {
    "enumeration": {"row": "diffusion_classifier"},
    "exact": {"row": "dive_exact"},
    "half_rate": {"row": "dive_exact", "rate": 0.5},
    "double_rate": {"row": "dive_exact", "rate": 2.0},
    "published_eps": {"row": "dive_exact", "changes": {"eps": 1e-8}},
    "published_eps_half_rate": {"row": "dive_exact", "rate": 0.5, "changes": {"eps": 1e-8}},
    "all_timesteps": {"row": "dive_exact", "pairs": {"t_low": 0, "t_high": 1000, "t_interval": 80}},
    "independent_noises": {"row": "dive_exact", "pairs": {"noise": "independent"}},
    "bfloat16": {"row": "dive_exact", "execution": {"bf16": True}},
    "without_in_vocabulary": {"row": "dive_without_in_vocabulary"},
    "without_in_vocabulary_rate_0.3": {"row": "dive_without_in_vocabulary", "rate": 0.3},
    "without_in_vocabulary_rate_3": {"row": "dive_without_in_vocabulary", "rate": 3.0},
    "without_in_vocabulary_published_eps": {"row": "dive_without_in_vocabulary", "changes": {"eps": 1e-8}},
    "without_in_vocabulary_rate_0.1_published_eps": {"row": "dive_without_in_vocabulary", "rate": 0.1,
                                                     "changes": {"eps": 1e-8}},
}
"""name -> row: of `class_searches.methods` in params.yaml. rate: factor of its learning rate. changes: other settings
of InversionConfig. pairs: changes to the profile's timesteps, with about as many pairs, and to their noises. execution:
changes to the profile's."""

SHOWN = ("accuracy", "accuracy_ci95", "difference", "difference_ci95", "forward_equivalents", "mean_convergence_step")


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--images", type=int, default=200, help="of the validation split, spread over the classes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    group, data = parameters.load(options.profile)["classification"], class_data.load(options.profile)
    methods = parameters.named("class_searches", "methods", group["methods"])
    model = paths.runs(options.profile) / "dit"
    ids, rows, references = classification_results.spread(data.ids("val"), options.images), [], {}
    for name in options.only:
        method, pairs = settled(CANDIDATES[name], methods)
        spec = classifications.make_spec(data, "val", ids, model, method, pairs=pairs, batch=group["batch"],
                                         execution=group["execution"] | CANDIDATES[name].get("execution", {}),
                                         seed=group["seed"])
        results = classifications.run(paths.runs(options.profile) / "benchmarks" / f"class_{name}", spec,
                                      workers=options.workers, label=name)
        forget(spec)  # a benchmark is no stage, whose end would do so
        if CANDIDATES[name].keys() == {"row"}:
            references[CANDIDATES[name]["row"]] = results
        row = classification_results.evaluate_run(results, references.get(CANDIDATES[name]["row"]), seed=group["seed"])
        times = evenly_spaced(pairs["t_low"], pairs["t_high"], pairs["t_interval"])
        rows.append({"search": name, "pairs": len(times), **{key: row.get(key) for key in SHOWN},
                     "seconds_per_image": seconds_per_image(results, options.workers)})
        print(measure.markdown(rows[-1:]))
    settings = {"profile": options.profile, "split": "val", "images": len(ids), "workers": options.workers,
                "methods": methods["rows"], "pairs": methods["pairs"],
                "candidates": {name: CANDIDATES[name] for name in options.only}}
    return measure.save("class_searches", settings, rows, arguments=measure.given(arguments), folder=options.out,
                        weights=checkpoint.weights_fingerprint(model))


def settled(candidate: dict, methods: dict) -> tuple[dict, dict]:
    """(method, pairs) of a candidate; methods: the profile's `class_searches.methods`."""
    method = methods["rows"][candidate["row"]] | candidate.get("changes", {})
    rate = "lr_std" if "lr_std" in method else "lr"
    if "rate" in candidate:
        method |= {rate: method[rate] * candidate["rate"]}
    return method, methods["pairs"] | candidate.get("pairs", {})


if __name__ == "__main__":
    main()
