"""What detection runs amount to: average precision, cost, and what shorter runs would have given."""

import torch

from dive_lib.dataset import Dataset
from dive_lib.detections import Runner
from dive_lib.evaluation import bootstrap_average_precision, coco_average_precision
from dive_lib.files import rounded
from dive_lib.image_runs import seconds_per_image as seconds_per_image
from dive_lib.inversion import Inverted
from dive_lib.objective import Cost


def annotations_of(data: Dataset, spec: dict) -> dict:
    """The annotations, as `Dataset.annotations` gives them, of the split that a run is about."""
    return data.annotations(next(name for name in ("test", "val") if data.names[name] == spec["split"]))


def detections_of(results: list[dict], *, constant: bool = False) -> list[dict]:
    """COCO result records of a run; constant: with score 1 in place of the monitor's confidence."""
    records = [record for result in results for record in result["detections"]]
    return [record | {"score": 1.0} for record in records] if constant else records


def evaluate_run(ground_truth: dict, results: list[dict], image_ids: list[int], *,
                 area_thresholds: tuple[float, float] | None = None, resamples: int = 500) -> dict:
    """The numbers of a row in every table: those of `evaluate_detections`, mean cost, dropped objects.

    AP_constant_score: with all scores 1.
    """
    row = evaluate_detections(ground_truth, detections_of(results), image_ids, area_thresholds=area_thresholds,
                              resamples=resamples)
    constant = detections_of(results, constant=True)
    constant = coco_average_precision(ground_truth, constant, image_ids, area_thresholds)
    row["AP_constant_score"] = rounded(constant["AP"])
    return row | rounded(summarise(results))


def evaluate_detections(ground_truth: dict, records: list[dict], image_ids: list[int], *,
                        area_thresholds: tuple[float, float] | None = None, resamples: int = 500) -> dict:
    """AP in percent with its interval, of COCO result records from wherever.

    area_thresholds: limits of small, medium and large objects in square pixels of the original images; COCO's
    32^2 and 96^2 by default.
    """
    row = coco_average_precision(ground_truth, records, image_ids, area_thresholds)
    row |= bootstrap_average_precision(ground_truth, records, image_ids, resamples=resamples)
    return rounded(row) | {"n_images": len(image_ids)}


def summarise(results: list[dict]) -> dict:
    """Means over images: forward-equivalents, dropped objects, convergence step."""
    count = max(1, len(results))
    cost = sum((inverted(result).cost for result in results), Cost())
    dropped = [d["reason"] for r in results for d in r["dropped"]]
    return {"n_images": len(results), "forward_equivalents": cost.forward_equivalents / count,
            "prior_forward_equivalents": (cost.prior_forward + cost.prior_backward) / count,
            "confidence_forward": sum(r["confidence_forward"] for r in results) / count,
            "reused": cost.reused / count, "dropped_none": dropped.count("none") / count,
            "dropped_illegal": dropped.count("illegal") / count,
            "mean_convergence_step": sum(r["convergence_step"] for r in results) / count}


def inverted(result: dict) -> Inverted:
    """The trajectory of one image as written on disk."""
    return Inverted(torch.tensor(result["tokens"]), torch.tensor(result["nearest"]), result["monitor"],
                    result["convergence_step"], result["curve"], result["improvements"], result["states_visited"],
                    Cost.from_dict(result["cost"]))


def ended_at(runner: Runner, results: list[dict], steps: list[int]) -> list[dict]:
    """The results of runs that end at the given step of each image, read off longer ones and scored anew.

    Layouts that the longer run kept are not scored again.
    """
    shorter = [inverted(result).after(step) for result, step in zip(results, steps)]
    changed = [k for k, short in enumerate(shorter) if short.tokens.tolist() != results[k]["tokens"]]
    concluded = {}
    for start in range(0, len(changed), 64):
        part = changed[start:start + 64]
        described = runner.conclude([results[k]["image_id"] for k in part], [shorter[k] for k in part])
        concluded |= dict(zip(part, described))
    ended = []
    for k, (result, short) in enumerate(zip(results, shorter)):
        spent = short.curve[-1][2]
        ended.append(concluded.get(k, result) | {"cost": Cost(forward=spent).to_dict()})
    return ended


def early_stopping_table(runner: Runner, results: list[dict], ground_truth: dict, patiences: list[int]) -> list[dict]:
    """AP and saving if each image had stopped after `patience` steps without a lower monitor."""
    rows = []
    image_ids = [result["image_id"] for result in results]
    length = max(result["curve"][-1][0] for result in results)
    for patience in patiences:
        steps = [inverted(result).stopped_at(patience) for result in results]
        ended = ended_at(runner, results, steps)
        row = evaluate_run(ground_truth, ended, image_ids)
        rows.append({"patience": patience, "mean_steps": sum(steps) / len(steps),
                     "saving": 1 - sum(steps) / len(steps) / length,
                     **{key: row[key] for key in ("AP", "AP50", "AP_ci95", "forward_equivalents")}})
    return rows
