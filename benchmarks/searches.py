"""Settings of the paper's optimiser and other searches for the same objective, on the validation split.

    python -m benchmarks.searches
    python -m benchmarks.searches --only straight_through local --images 40 --trajectories 1

The first row is the reference: the paper's optimiser with the profile's settings, from which each of the next rows
differs in one. Then come other searches, in mini at about its cost but where the name says otherwise. Each is run
`--trajectories` times, with other noises, and numbers are means over them. `difference` is AP less the reference's on
the same images, with a paired bootstrap interval over images: only one that leaves zero out is an effect. How far
trajectories lie apart, which it does not hold, is seen in `APs`. `relative_cost` is the cost in forward-equivalents
over the reference's. A candidate is a row of CANDIDATES; results gather in
runs/<profile>/benchmarks/<name>_seed<seed>, and what is there already is not computed again. The test split is never
looked at.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks import measure
from dive_lib import checkpoint, dataset, detections, parameters, paths
from dive_lib.detection_results import detections_of, evaluate_run
from dive_lib.evaluation import mean_paired_bootstrap
from dive_lib.files import read_json
from dive_lib.image_runs import forget, seconds_per_image
from dive_lib.inversion import InversionConfig, monitor_pairs

DECOUPLED = ("layout_prior_classes", "layout_prior_boxes")

# name -> inversion: changes to the profile's straight-through settings, or None for no inversion. search: changes to
# the profile's local search, or None. weight: of the prior; reduction: of the losses; in place of the profile's.
# priors: names of others than the joint one, in the folder of a run of 04_layout_prior (`in_run`: of a sweep's run).
# restarts: how many, each with noises of its own; the layout with the lowest monitor on common noises is kept, and all
# restarts and that comparison are counted.
CANDIDATES = {
    "straight_through": {"inversion": {}},
    "prior_weight_0": {"inversion": {}, "weight": 0.0},
    "prior_weight_0.1": {"inversion": {}, "weight": 0.1},
    "prior_weight_1": {"inversion": {}, "weight": 1.0},
    "summed_losses": {"inversion": {}, "reduction": "sum"},
    "without_weight_decay": {"inversion": {"weight_decay": 0.0}},
    "illegal_boxes_allowed": {"inversion": {"legal": False}},
    "not_coarse_to_fine": {"inversion": {"coarse_steps": 0}},
    "all_timesteps": {"inversion": {"t_low": 0, "t_high": 1000, "t_interval": 20}},
    "seldom_monitored": {"inversion": {"monitor_every": 15, "monitor_pairs": 25}},
    "smaller_rate_and_eps": {"inversion": {"lr": 0.1, "eps": 0.0003}},
    # All of the paper's settings at once; only the start's noise stays, for slots without positions are alike. The rate
    # is the paper's in units of the embeddings' scale; steps, pairs of a step and the monitor's are the profile's.
    "as_published": {"inversion": {"legal": False, "coarse_steps": 0, "t_low": 0, "t_high": 1000, "t_interval": 20,
                                   "fixed_pairs": False, "lr": 0.15, "eps": 1e-8, "monitor_start": False},
                     "weight": 1.0},
    "decoupled_priors": {"inversion": {}, "priors": DECOUPLED},
    "decoupled_priors_trained_as_long": {"inversion": {}, "priors": DECOUPLED, "in_run": "decoupled_steps=1800"},
    "two_restarts": {"inversion": {"steps": 58}, "restarts": 2},
    "larger_batches": {"inversion": {"steps": 58, "batch": 8}},
    "straight_through_190_steps": {"inversion": {"steps": 190}},
    "local": {"search": {}},
    "local_independent_noises": {"search": {"antithetic": False}},
    "opposite_noises": {"inversion": {"antithetic": True}},
    "local_two_rounds": {"search": {"rounds": 2}},
    "local_two_short_rounds": {"search": {"rounds": 2, "proposals": 60}},
    "local_then_straight_through": {"inversion": {"steps": 60, "init_noise": 0.0}, "search": {"proposals": 80}},
}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--images", type=int, default=100, help="of the subset `tuning` of the validation split")
    parser.add_argument("--trajectories", type=int, default=2, help="runs of each candidate, with other noises")
    parser.add_argument("--workers", type=int, default=2)
    ready = [name for name, candidate in CANDIDATES.items() if "in_run" not in candidate]  # others need a sweep first
    parser.add_argument("--only", nargs="+", default=ready, choices=list(CANDIDATES))
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    data = dataset.load(options.profile)
    truth, ids = data.annotations("val"), data.subsets["tuning"][:options.images]
    for name in options.only:
        priors(CANDIDATES[name], paths.runs(options.profile))
    rows, reference, cost = [], None, None
    for name in options.only:
        runs = [measured(name, CANDIDATES[name], number, options, data, ids) for number in range(options.trajectories)]
        row = mean_row([evaluate_run(truth, results, ids, resamples=1) for results in runs])
        if name == "straight_through":
            reference, cost = runs, row["forward_equivalents"]
        seconds = statistics.mean(seconds_per_image(results, options.workers) for results in runs)
        rows.append({"search": name, **row, **difference(truth, runs, reference, ids), "seconds_per_image": seconds})
        print(measure.markdown(rows[-1:]), flush=True)
    for row in rows:
        row["relative_cost"] = row["forward_equivalents"] / cost if cost else None
    settings = {"profile": options.profile, "subset": "tuning", "split": "val", "images": len(ids),
                "trajectories": options.trajectories, "workers": options.workers,
                "candidates": {name: CANDIDATES[name] for name in options.only}}
    weights = checkpoint.weights_fingerprint(paths.runs(options.profile) / "layout_ldm")
    return measure.save("searches", settings, rows, arguments=measure.given(arguments), folder=options.out,
                        weights=weights)


def mean_row(rows: list[dict]) -> dict:
    """The means of a candidate's trajectories, and the AP of each."""
    keys = ("AP", "AP50", "forward_equivalents", "prior_forward_equivalents")
    means = {key: statistics.mean(row[key] for row in rows) for key in keys}
    return {"AP": means.pop("AP"), "APs": [row["AP"] for row in rows], **means}


def difference(truth: dict, runs: list[list[dict]], reference: list[list[dict]] | None, ids: list[int]) -> dict:
    """The columns of the mean AP less the reference's, with its paired interval; empty for the reference itself."""
    if reference is None or runs is reference:
        return {"difference": None, "difference_ci95": None}
    pairs = [(detections_of(results), detections_of(beside)) for results, beside in zip(runs, reference)]
    compared = mean_paired_bootstrap(truth, pairs, ids, resamples=500)
    return {"difference": compared["AP_difference"], "difference_ci95": compared["AP_difference_ci95"]}


def specification(candidate: dict, seed: int, profile: str, data: dataset.Dataset, ids: list[int], *,
                  layout_ldm: Path | None = None) -> dict:
    """The run of one seed: the profile's settings with the candidate's changes. layout_ldm: in place of its model."""
    settings, runs = parameters.load(profile)["detection"], paths.runs(profile)
    inversion, search = settled(candidate, settings, seed)
    weight = candidate.get("weight", settings["objective"]["weight"])
    prior = priors(candidate, runs) if weight and inversion else []
    return detections.make_spec(
        data=paths.shorten(data.root), split=data.names["val"], train_split=data.names["train"], image_ids=ids,
        first_stage=paths.shorten(runs / "first_stage"), layout_ldm=paths.shorten(layout_ldm or runs / "layout_ldm"),
        prior=[paths.shorten(folder) for folder in prior],
        objective={"weight": weight, "reduction": candidate.get("reduction", settings["objective"]["reduction"])},
        inversion=inversion, search=search, batch=settings["batch"],
        execution=settings["execution"])


def priors(candidate: dict, runs: Path) -> list[Path]:
    """The folders of a candidate's priors. Raises FileNotFoundError with the sweep that trains those of `in_run`."""
    sweep = candidate.get("in_run")
    folder = runs / "sweeps" / "04_layout_prior" / sweep / "runs" / runs.name if sweep else runs
    found = [folder / name for name in candidate.get("priors", ["layout_prior"])]
    if sweep and not all(prior.exists() for prior in found):
        raise FileNotFoundError(f"{paths.shorten(folder)}: no {' and '.join(candidate['priors'])}; train them by "
                                f"python -m dive_lib.sweep notebooks/04_layout_prior.ipynb {runs.name} --set {sweep}")
    return found


def settled(candidate: dict, settings: dict, seed: int) -> tuple[dict | None, dict | None]:
    """(inversion, search) settings of a candidate; settings: the profile's group `detection`."""
    inversion, search = candidate.get("inversion"), candidate.get("search")
    if inversion is not None:
        base = parameters.named("searches", "straight_through", settings["search"])
        inversion = base | {"steps": settings["steps"]} | inversion | {"seed": seed}
    if search is not None:
        search = parameters.named("searches", "local", settings["search"]) | search | {"seed": seed}
    return inversion, search


def measured(name: str, candidate: dict, number: int, options: argparse.Namespace, data: dataset.Dataset,
             ids: list[int]) -> list[dict]:
    """Results of a candidate's trajectory with this number, one per image; of restarts, the best per image."""
    restarts, count = [], candidate.get("restarts", 1)
    first = number * count
    for seed in range(first, first + count):
        folder = paths.runs(options.profile) / "benchmarks" / f"{name}_seed{seed}"
        spec = specification(candidate, seed, options.profile, data, ids)
        restarts.append(obtained(folder, spec, workers=options.workers, label=f"{name}, seed {seed}"))
    if len(restarts) == 1:
        return restarts[0]
    runner = detections.Runner(specification(candidate, first, options.profile, data, ids))
    return best_of(restarts, common_monitor(runner, restarts), len(monitor_pairs(runner.objective, runner.config)))


def obtained(folder: Path, spec: dict, *, workers: int = 1, label: str) -> list[dict]:
    """The results of a run, computed where an earlier one has not left them all."""
    results = finished(folder, spec) or detections.run(folder, spec, workers=workers, label=label)
    forget(spec)  # a benchmark is no stage, whose end would do so
    return results


def finished(folder: Path, spec: dict) -> list[dict] | None:
    """The results of an earlier run of the same spec, where all are there."""
    try:
        return detections.collect(folder) if read_json(folder / "spec.json") == spec else None
    except FileNotFoundError:
        return None


def common_monitor(runner: detections.Runner, restarts: list[list[dict]]) -> list[list[float]]:
    """The objective of each restart's layouts on one set of noises: [restart][image].

    A run's own monitor does not do: its noises depend on its seed, and their differences exceed those of layouts.
    """
    pairs = monitor_pairs(runner.objective, InversionConfig(**vars(runner.config)))
    ids = [result["image_id"] for result in restarts[0]]
    values: list[list[float]] = [[] for _ in restarts]
    for start in range(0, len(ids), 40):
        latents = runner.latents(ids[start:start + 40])
        for row, results in zip(values, restarts):
            tokens = torch.tensor([result["tokens"] for result in results[start:start + 40]]).to(latents.device)
            row.extend(runner.objective.evaluate(latents, tokens, pairs).tolist())
    return values


def best_of(restarts: list[list[dict]], monitors: list[list[float]], monitor_size: int) -> list[dict]:
    """Per image the restart with the lowest monitor, with the cost and the seconds of all restarts.

    monitor_size: forward passes per layout that the comparison took.
    """
    chosen = []
    for k, results in enumerate(zip(*restarts)):
        best = min(range(len(results)), key=lambda r: monitors[r][k])
        cost = {key: sum(result["cost"][key] for result in results) for key in results[0]["cost"]}
        extra = monitor_size * len(results)
        cost["forward"] += extra
        cost["forward_equivalents"] += extra
        chosen.append(results[best] | {"cost": cost, "seconds": sum(result["seconds"] for result in results),
                                       "monitor": monitors[best][k]})
    return chosen


if __name__ == "__main__":
    main()
