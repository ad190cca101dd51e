"""Numbers and figures of classification runs, on results made by hand."""

import numpy as np
import pytest

from dive_lib import class_figures, figures, report
from dive_lib import classification_results as results_of
from dive_lib.objective import Cost

ERRORS = [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2], [0.1, 0.2, 0.3], [0.2, 0.3, 0.1]]
LABELS = [0, 1, 1, 0]


def enumeration():
    rows = []
    for k, (errors, label) in enumerate(zip(ERRORS, LABELS)):
        answer = int(np.argmin(errors))
        rows.append({"image_id": f"i{k}", "label": label, "prediction": answer, "correct": answer == label,
                     "errors": errors, "by_pairs": [[1, 0], [4, answer]], "cost": Cost(forward=12).to_dict()})
    return rows


def inverted():
    """Right, wrong by the search, wrong by the model, wrong by both."""
    rows = []
    for k, (answer, label) in enumerate(zip([0, 2, 0, 1], LABELS)):
        rows.append({"image_id": f"i{k}", "label": label, "prediction": answer, "correct": answer == label,
                     "convergence_step": 2, "states_visited": 2, "curve": [[2, 0.5, 6], [4, 0.5, 10]],
                     "improvements": [[2, 0.5, 2], [4, 0.4, answer]],
                     "cost": Cost(forward=6, backward=4, reused=3).to_dict()})
    return rows


def test_accuracy_has_an_interval_that_repeats():
    row = results_of.evaluate_correct([True] * 30 + [False] * 10, resamples=400)
    low, high = row["accuracy_ci95"]
    assert row["accuracy"] == 75 and row["n_images"] == 40 and 55 < low < 70 and 80 < high < 95
    assert row == results_of.evaluate_correct([True] * 30 + [False] * 10, resamples=400)
    with pytest.raises(ValueError, match="bootstrap"):
        results_of.bootstrap_interval([])


def test_a_share_has_an_interval_also_where_all_are_right():
    """Wilson's, with the value for 10 of 10 by the closed form n / (n + z^2)."""
    low, high = results_of.wilson_interval(10, 10)
    assert low == pytest.approx(100 * 10 / (10 + 1.959964 ** 2), abs=1e-3) and high == 100
    assert results_of.wilson_interval(0, 10) == [0, pytest.approx(100 - low)]
    assert results_of.wilson_interval(40, 50) == pytest.approx([66.96, 88.76], abs=0.01)  # as R's prop.test
    with pytest.raises(ValueError, match="3 of 2"):
        results_of.wilson_interval(3, 2)


def test_a_row_is_compared_with_the_enumeration_on_the_same_images():
    row = results_of.evaluate_run(inverted()[::-1], enumeration(), resamples=50)
    assert row["accuracy"] == 25 and row["forward_equivalents"] == 10 and row["reused"] == 3
    assert row["agreement"] == 50 and row["difference"] == -25 and row["mean_convergence_step"] == 2
    with pytest.raises(ValueError, match="no result for 1 images"):
        results_of.evaluate_run(inverted(), enumeration()[1:])


def test_curves_are_read_off_the_results():
    rows = results_of.loops_curve(inverted(), "DIVE")
    assert [(r["step"], r["forward_equivalents"], r["accuracy"]) for r in rows] == [(2, 6, 0), (4, 10, 25)]
    rows = results_of.pairs_curve(enumeration(), "all")
    assert [(r["pairs"], r["forward_equivalents"], r["accuracy"]) for r in rows] == [(1, 3, 50), (4, 12, 50)]


def test_fewer_possible_classes():
    rows = results_of.restricted(enumeration(), [0, 2])
    assert [(r["image_id"], r["prediction"], r["cost"]["forward"]) for r in rows] == [("i0", 0, 8), ("i3", 2, 8)]
    sets = results_of.nested_classes(100, [50, 10], seed=0)
    assert list(sets) == [10, 50] and set(sets[10]) < set(sets[50]) and len(sets[50]) == 50
    assert results_of.nested_classes(5, [7], seed=0) == {7: list(range(7))}  # the last two are strangers
    with pytest.raises(ValueError, match="at least 2"):
        results_of.nested_classes(5, [1], seed=0)


def test_entries_are_spread():
    assert results_of.spread(range(10), 4) == [0, 2, 5, 7] and results_of.spread("ab", 5) == ["a", "b"]


def test_failures_are_told_apart():
    found = results_of.failures(inverted(), enumeration())
    assert found == {"right": 1, "search_failures": 2, "model_failures": 1, "missed": 50, "missed_truth": 50}
    assert results_of.failures(enumeration(), enumeration())["search_failures"] == 0


def test_which_answers_the_search_never_met():
    best = {row["image_id"]: row["prediction"] for row in enumeration()}
    others = [k for k in range(3) if k != best["i3"]]
    ways = [{"image_id": "i0", "classes": [best["i0"]]}, {"image_id": "i3", "classes": others}]
    assert results_of.never_met(ways, enumeration()) == 50 and results_of.never_met(ways[:1], enumeration()) == 0


def test_confusions():
    counts = results_of.confusion(inverted(), 3)
    assert counts.tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0]]
    pairs = results_of.confused_pairs(inverted() * 2, "xyz", most=2)
    assert pairs == [{"label": "x", "answer": "y", "images": 2}, {"label": "y", "answer": "x", "images": 2}]


def test_the_best_candidate_within_the_budget_is_chosen():
    rows = {"slow": (90, 100), "fast": (89.5, 9), "equal": (89.5, 8), "poor": (80, 1)}
    candidates = {name: {"accuracy": a, "forward_equivalents": cost} for name, (a, cost) in rows.items()}
    chosen = {budget: results_of.within_budget(candidates, budget) for budget in (0.5, 8, 10, 1000)}
    assert chosen == {0.5: "poor", 8: "equal", 10: "equal", 1000: "slow"}


def test_table_4_shows_present_rows_beside_the_paper():
    metrics = {"classification": {
        "dive_exact": {"accuracy": 91.26, "accuracy_ci95": [88.0, 94.0], "n_images": 500,
                       "forward_equivalents": 1234.4},
        "dive_text": {"accuracy": 91.0, "accuracy_ci95": [87.0, 95.0], "n_images": 200, "difference": 2.0,
                      "forward_equivalents": 972},
        "resnet": {"accuracy": 95.0, "accuracy_ci95": [93.0, 97.0], "n_images": 500,
                   "forward_equivalents": 1}}}
    lines = report.classification_table(metrics).splitlines()
    assert lines[2].endswith("| **91.0** [87.0, 95.0] | 200 | 89.0 | 972 | \u2013 |"), "of fewer images"
    assert lines[3] == "| DIVE, exact reuse | **91.3** [88.0, 94.0] | 500 |  | 1,234 | \u2013 |"
    assert lines[4].endswith("| **95.0** [93.0, 97.0] | 500 |  | 1 | 70.6 |") and len(lines) == 5
    assert [row["key"] for row in report.classification_rows(metrics)] == ["dive_text", "dive_exact", "resnet"]
    assert report.classification_table({}) == "" == report.readme_tables({})["classification"]
    assert report.readme_tables(metrics)["classification"] == report.classification_table(metrics)


def test_a_pipeline_run_in_part_is_reported_in_part():
    report.update_metrics(report.paths.metrics("smoke", "dit"), "a", {"b": 1})
    assert report.existing_metrics("smoke", ("dit", "classification")) == {"dit": {"a": {"b": 1}}}
    assert report.existing_figures("smoke", ("11_classification/cost",)) == []


def test_every_figure_is_drawn(tmp_path):
    results, reference = inverted(), enumeration()
    row = results_of.evaluate_run(results, reference, resamples=20)
    curves = results_of.loops_curve(results, "DIVE") + results_of.pairs_curve(reference, "all")
    rng = np.random.default_rng(0)
    ways = [{"embeddings": rng.normal(size=(5, 4)), "classes": [0, 0, 1, 2, 2], "label": 1, "prediction": 2,
             "monitor": [[2, 0.5], [4, 0.4]]} for _ in range(4)]
    bars = [row | {"name": "DIVE", "key": "dive", "paper": 77.2},
            row | {"name": "a", "key": "resnet", "paper": None, "n_images": 2}]
    drawn = [class_figures.accuracy_bars(bars),
             class_figures.accuracy_against_cost(curves, [row | {"name": "fast"}]),
             class_figures.cost_against_classes([row | {"name": n, "classes": c} for n in "ab" for c in (10, 100)] +
                                                [row | {"name": "a", "classes": 300, "accuracy": None}], 100),
             class_figures.convergence([2, 4, 4], 4, [1, 2, 3], every=2),
             class_figures.embedding_paths(rng.normal(size=(3, 4)), ways, "xyz"),
             class_figures.confusion_matrix(results_of.confusion(results, 3), "xyz", "enumeration"),
             class_figures.model_orders({"a": row, "b": row}, {"accuracy": "DIVE", "n_images": "images"},
                                        {"c": {"accuracy": 77.2}})]
    for k, figure in enumerate(drawn):
        assert figures.save(figure, tmp_path / f"{k}.png").stat().st_size > 2000
