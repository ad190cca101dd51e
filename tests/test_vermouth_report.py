"""Vermouth's rows of the README: what is shown, from what, and nothing where nothing was run."""

import pytest

from dive_lib import report, vermouth_report


def best(measure, **counts):
    return {"t": 200, "stage": "up1", measure: 40.06, f"{measure}_ci95": [35.0, 45.0], **counts}


def features():
    cells = {"classification": best("accuracy", n_images=600), "retrieval": best("mAP", queries=200),
             "segmentation": best("mIoU", n_images=300)}
    lower = {g: row | {"accuracy": 20.0, "mAP": 21.0, "mIoU": 22.0} for g, row in cells.items()}
    return {"probe_best": cells, "control": {"layout_ldm": {"difference": 20.06}}, "ablations": {"noise": {}},
            "backbones": {"layout_ldm": cells, "untrained_layout_ldm": lower, "pixels": lower}}


def parts():
    shots = {k: {"accuracy": 10.0 * k, "accuracy_ci95": [10.0 * k - 1, 10.0 * k + 1], "n_images": 1000} for k in (1, 2)}
    shots = {str(k): row for k, row in shots.items()} | {"16": shots[2] | {"accuracy": 60.04}}
    methods = {name: shots for name in ("u_head", "linear_probe", "from_scratch")}
    found = {"mAP": 50.0, "mAP_ci95": [48.0, 52.0], "chance": 21.3, "queries": 200}
    pixels = {"mIoU_seen": 30.0, "mIoU_seen_ci95": [28.0, 32.0], "mIoU_unseen": 18.0,
              "mIoU_unseen_ci95": [16.0, 20.0], "ratio": 0.6, "n_images": 300}
    return {"features": features(), "few_shot": {"chosen": {}, "digits": methods, "ablations": {"a": 1}, "paper": {}},
            "sketch_retrieval": {"chosen": {}, "digits": {"u_head": found, "without_head": found | {"mAP": 36.0},
                                               "pixels": found | {"mAP": 25.0}}},
            "segmentation": {"chosen": {}, "scenes/test": pixels, "paper": {}}}


def test_controls_stand_beside_the_headline():
    few, found = ({"accuracy": 40.04}, {"mIoU_seen": 9.0, "mIoU_unseen": 4.0})
    metrics = parts() | {"few_shot": parts()["few_shot"] | {"ablations": {
        "backbone untrained_dit": few, "backbone dit": few, "backbone pixels": few}}}
    metrics["segmentation"]["ablations"] = {"backbone pixels": found, "adapter on layout_ldm": found}
    metrics["few_shot"]["chosen"] = {"u_head": {"backbone": "dit", "t": 50}}
    lines = vermouth_report.table({"vermouth": vermouth_report.section(metrics)}).splitlines()
    assert lines[5].startswith("| DiT, few-shot classification, 16 shots |")
    assert "the same head on untrained DiT 40.0, the same head on DiT 40.0 |" in lines[5]
    assert "the same head on raw pixels 9.0 |" in lines[7]
    assert "seen ones, the same head on raw pixels 4.0 |" in lines[8]


@pytest.mark.parametrize("handicap, shown", [(0.0, 0), (0.1, 1)])
def test_a_handicap_has_a_row_where_it_changes_something(handicap, shown):
    part = parts()["segmentation"] | {"chosen": {"backbone": "layout_ldm", "handicap": handicap}}
    part["scenes/test"]["handicapped"] = dict(part["scenes/test"])
    lines = vermouth_report.table({"vermouth": vermouth_report.section({"segmentation": part})}).splitlines()
    assert sum("handicapped" in line for line in lines) == shown


def test_names_of_public_sets_are_one_group():
    row = {"mIoU_all": 19.04, "mIoU_all_ci95": [18.0, 20.0], "n_images": 2000}
    part = {"chosen": {"backbone": "stable_diffusion"}, "ADE-150/val": row}
    (line,) = vermouth_report.table({"vermouth": vermouth_report.section({"segmentation": part})}).splitlines()[2:]
    assert "segmentation, all names, mIoU | **19.0** [18.0, 20.0] |  | 2,000 | 19.0 (ADE-150) |" in line


def test_section_holds_the_headline_numbers_and_leaves_the_papers_out():
    section = vermouth_report.section(parts())
    assert set(section) == {*vermouth_report.STAGES[1:], "probe_best", "probe_control", "probe_backbones", "ablations"}
    assert section["ablations"] == {"features": {"noise": {}}, "few_shot": {"a": 1}}
    assert "paper" not in section["few_shot"] and "ablations" not in section["few_shot"]


def test_rows_of_the_table():
    lines = vermouth_report.table({"vermouth": vermouth_report.section(parts())}).splitlines()
    assert lines[2] == ("| layout LDM, linear probe: the class of a photo (t = 200, up1) | **40.1** [35.0, 45.0] "
                        "| untrained layout LDM 20.0, raw pixels 20.0 | 600 | \N{EN DASH} |")
    assert "untrained layout LDM 21.0" in lines[3] and "untrained layout LDM 22.0" in lines[4]
    assert lines[5].startswith("| few-shot classification, 16 shots | **60.0**") and "66.7 (mean of 11 s" in lines[5]
    assert "raw pixels 25.0, chance 21.3 | 200 | 56.8 (Sketchy)" in lines[6]
    assert "0.60 of the seen ones" in lines[8] and len(lines) == 9
    assert {line.count("|") for line in lines} == {6}


@pytest.mark.parametrize("name", vermouth_report.STAGES)
def test_a_part_alone_is_shown(name):
    lines = vermouth_report.table({"vermouth": vermouth_report.section({name: parts()[name]})}).splitlines()
    assert len(lines) == 2 + {"features": 3, "segmentation": 2}.get(name, 1)


def test_nothing_is_shown_where_nothing_was_run():
    assert vermouth_report.section({}) == {} and vermouth_report.table({"vermouth": {}}) == ""
    both = {"vermouth": vermouth_report.section(parts())}
    assert report.readme_tables(both)["vermouth"] == vermouth_report.table(both)
