"""What classification runs amount to: accuracy with its interval, cost, and why images are wrong."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dive_lib.objective import Cost


def bootstrap_interval(values: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean of `values` when images are drawn anew with replacement."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0 or resamples < 1:
        raise ValueError(f"a bootstrap needs values and resamples, got {len(values)} and {resamples}")
    # NumPy guarantees RandomState's stream for ever.
    drawn = np.random.RandomState(seed).randint(len(values), size=(resamples, len(values)))
    return [float(bound) for bound in np.percentile(values[drawn].mean(1), (2.5, 97.5))]


def wilson_interval(right: int, count: int) -> list[float]:
    """95 % interval in percent of a share, `right` of `count` (Wilson 1927).

    Where all or none are right it has a width, unlike a bootstrap's.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right} of {count} is no share; count images from 1 on, and at most all of them")
    z, share = 1.959963984540054, right / count
    centre, half = share + z * z / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return [round(100 * (centre + sign * half) / (1 + z * z / count), 4) + 0.0 for sign in (-1, 1)]


def evaluate_correct(correct: Sequence[bool], *, resamples: int = 1000, seed: int = 0) -> dict:
    """Accuracy in percent, its interval and the number of images."""
    percent = [100.0 * bool(c) for c in correct]
    return {"accuracy": round(sum(percent) / len(percent), 4), "n_images": len(percent),
            "accuracy_ci95": [round(b, 4) for b in bootstrap_interval(percent, resamples=resamples, seed=seed)]}


def paired_difference(correct: Sequence[bool], reference: Sequence[bool], *, resamples: int = 1000,
                      seed: int = 0) -> dict:
    """How much more often than `reference` the same images are answered rightly, in points, with its interval."""
    differences = 100.0 * (np.asarray(correct, dtype=float) - np.asarray(reference, dtype=float))
    interval = bootstrap_interval(differences, resamples=resamples, seed=seed)
    return {"difference": round(float(differences.mean()), 4),
            "difference_ci95": [round(bound, 4) for bound in interval]}


def evaluate_run(results: list[dict], reference: list[dict] | None = None, *, resamples: int = 1000,
                 seed: int = 0) -> dict:
    """The numbers of a row: accuracy, mean cost, and for DIVE its convergence.

    reference: another run's results on these images, such as the full enumeration's; `agreement` is the share of equal
    answers and `difference` the paired difference of the accuracies with its interval.
    """
    row = evaluate_correct([r["correct"] for r in results], resamples=resamples, seed=seed)
    cost = sum((Cost.from_dict(r["cost"]) for r in results), Cost())
    row |= {"forward_equivalents": round(cost.forward_equivalents / len(results), 4),
            "reused": round(cost.reused / len(results), 4)}
    if all("convergence_step" in r for r in results):
        row["mean_convergence_step"] = round(float(np.mean([r["convergence_step"] for r in results])), 4)
        visited = [r["states_visited"] for r in results]
        if None not in visited:  # a run outside the vocabulary visits embeddings, not classes
            row["mean_classes_visited"] = round(float(np.mean(visited)), 4)
    if reference is not None:
        same = matched(reference, results)
        equal = [a["prediction"] == b["prediction"] for a, b in zip(results, same)]
        row |= {"agreement": round(100 * float(np.mean(equal)), 4),
                **paired_difference([r["correct"] for r in results], [r["correct"] for r in same],
                                    resamples=resamples, seed=seed)}
    return row


def matched(reference: list[dict], results: list[dict]) -> list[dict]:
    """The entries of `reference` for the images of `results`. Raises ValueError for an image that it lacks."""
    by_id = {r["image_id"]: r for r in reference}
    missing = [r["image_id"] for r in results if r["image_id"] not in by_id]
    if missing:
        raise ValueError(f"the reference run has no result for {len(missing)} images (first: {missing[0]})")
    return [by_id[r["image_id"]] for r in results]


def loops_curve(results: list[dict], name: str) -> list[dict]:
    """Accuracy against cost if every image had ended at each monitor: rows {name, step,
    forward_equivalents, accuracy, n_images}.

    Exact, since a shorter run is the beginning of a longer one.
    """
    rows = []
    for number, (step, *_) in enumerate(results[0]["curve"]):
        right, spent = 0, 0
        for result in results:
            reached = [answer for at, _, answer in result["improvements"] if at <= step]
            right += bool(reached) and reached[-1] == result["label"]
            spent += result["curve"][min(number, len(result["curve"]) - 1)][2]
        rows.append({"name": name, "step": step, "forward_equivalents": spent / len(results),
                     "accuracy": 100 * right / len(results), "n_images": len(results)})
    return rows


def pairs_curve(results: list[dict], name: str) -> list[dict]:
    """The enumeration's accuracy on fewer pairs."""
    rows = []
    for number, (count, _) in enumerate(results[0]["by_pairs"]):
        right = sum(r["by_pairs"][number][1] == r["label"] for r in results)
        rows.append({"name": name, "pairs": count, "forward_equivalents": count * len(results[0]["errors"]),
                     "accuracy": 100 * right / len(results), "n_images": len(results)})
    return rows


def restricted(enumeration: list[dict], classes: Sequence[int]) -> list[dict]:
    """What the enumeration answers and costs if only these classes are possible, for their images."""
    rows = []
    for result in enumeration:
        if result["label"] not in classes:
            continue
        prediction = min(classes, key=lambda c: (result["errors"][c], c))
        pairs = result["by_pairs"][-1][0]
        rows.append({"image_id": result["image_id"], "label": result["label"], "prediction": prediction,
                     "correct": prediction == result["label"], "cost": Cost(forward=pairs * len(classes)).to_dict()})
    return rows


def nested_classes(total: int, counts: Sequence[int], seed: int) -> dict[int, list[int]]:
    """Sets of so many classes, each part of the next, in rising order; beyond `total` come strangers
    (`class_models.with_classes`)."""
    order = np.random.RandomState(seed).permutation(total).tolist()
    if not counts or min(counts) < 2:
        raise ValueError(f"numbers of classes must be at least 2, got {list(counts)}")
    return {count: sorted(order[:count]) + list(range(total, count)) for count in sorted(counts)}


def spread(results: Sequence, count: int) -> list:
    """At most `count` entries, evenly spread: results come class by class."""
    count = min(count, len(results))
    return [results[k * len(results) // count] for k in range(count)]


def failures(results: list[dict], enumeration: list[dict]) -> dict:
    """Why images are wrong, by the errors of the enumeration; of results on other pairs it would say nothing.

    search: the true class has a lower error than the answer, and was not found. model: the answer has the lower error,
    so that a better search would not help. Also the images where the answer is not the enumeration's: `missed`, in
    percent, and of these the share where the true class was missed, `missed_truth`.
    """
    search = model = missed = missed_truth = 0
    for result, reference in zip(results, matched(enumeration, results)):
        errors, label, answer = reference["errors"], result["label"], result["prediction"]
        if answer != label:
            search += errors[label] < errors[answer]
            model += errors[label] >= errors[answer]
        if answer != reference["prediction"]:
            missed += 1
            missed_truth += reference["prediction"] == label
    count = len(results)
    return {"right": count - search - model, "search_failures": search, "model_failures": model,
            "missed": round(100 * missed / count, 4), "missed_truth": round(100 * missed_truth / max(1, missed), 4)}


def never_met(ways: list[dict], enumeration: list[dict]) -> float:
    """Share of images, in percent, whose enumeration's answer is none of the `classes` on the way (`Runner.paths`)."""
    answers = {row["image_id"]: row["prediction"] for row in enumeration}
    return round(100 * sum(answers[way["image_id"]] not in way["classes"] for way in ways) / len(ways), 4)


def confusion(results: list[dict], total: int) -> np.ndarray:
    """(K, K) counts: row the label, column the answer."""
    counts = np.zeros((total, total), dtype=int)
    for result in results:
        counts[result["label"], result["prediction"]] += 1
    return counts


def confused_pairs(results: list[dict], classes: Sequence[str], most: int = 10) -> list[dict]:
    """The most frequent confusions, {label, answer, images}."""
    wrong = Counter((classes[r["label"]], classes[r["prediction"]]) for r in results if not r["correct"])
    ordered = sorted(wrong.items(), key=lambda entry: (-entry[1], entry[0]))
    return [{"label": a, "answer": b, "images": n} for (a, b), n in ordered[:most]]


def within_budget(candidates: dict[str, dict], budget: float) -> str:
    """The most accurate candidate of at most `budget` forward-equivalents, of equals the cheapest; where none is that
    cheap, the cheapest of all. For tuning: the candidates' rows are of validation images."""
    least = min(row["forward_equivalents"] for row in candidates.values())
    cheap = {name: row for name, row in candidates.items() if row["forward_equivalents"] <= max(budget, least)}
    return min(cheap, key=lambda name: (-cheap[name]["accuracy"], cheap[name]["forward_equivalents"], name))
