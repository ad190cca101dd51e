"""Detection runs on tiny models: shards, interruption, scores and what shorter runs would have given."""

import dataclasses

import pytest
import torch

from dive_lib import dataset, detections, glyphs, image_runs, paths
from dive_lib.checkpoint import save_model
from dive_lib.detection_results import detections_of, early_stopping_table, ended_at, evaluate_run
from dive_lib.files import read_json
from tests import tiny
from tests.test_models import first_stage

SETTINGS = {"steps": 8, "batch": 2, "lr": 0.2, "t_low": 0, "t_high": 1000, "t_interval": 200, "monitor_pairs": 2,
            "monitor_every": 2, "legal": True}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Six scenes and untrained models in a folder that stands for the repository."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    glyphs.export(tmp_path / "data")
    dataset.make_scenes(tmp_path / "scenes", {"train": 12, "val": 2, "test": 6}, covered=0.25, seed=0)
    torch.manual_seed(0)
    stage = first_stage()
    save_model(tmp_path / "first_stage", stage, stage.config)
    grid = dataclasses.replace(tiny.GRID, classes=tuple("0123456789"), slots=4)
    ldm = tiny.LayoutLDM(grid, tiny.VOCABULARY, tiny.ENCODER, tiny.UNET, position_attention=True)
    save_model(tmp_path / "ldm", ldm, ldm.config)
    prior = tiny.LayoutPrior(grid, tiny.VOCABULARY, 16, 1, 2, 4).adopt(ldm.vocabulary)
    save_model(tmp_path / "prior", prior, prior.config)
    return tmp_path


def spec(**changes):
    settings = {"data": "scenes", "split": "test", "image_ids": [1, 2, 3, 4, 5, 6], "first_stage": "first_stage",
                "layout_ldm": "ldm", "prior": ["prior"], "inversion": SETTINGS, "batch": 4}
    return detections.make_spec(**(settings | changes))


def test_a_run_is_executed_as_described(world):
    assert spec()["execution"] == spec(execution={"chunk": 256})["execution"]
    runner = detections.Runner(spec(execution={"chunk": 7, "bf16": True}))
    assert runner.objective.chunk == 7 and runner.ldm.network.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="chunk"):
        spec(execution={"chunk": 0})


def test_a_stopped_run_ends_with_the_same_bytes(world, monkeypatch):
    """A batch of which one image is missing is computed whole: rounding depends on who shares it."""
    folder = detections.prepare(world / "run", spec())
    detections.run_shard(folder)
    before = {r["image_id"]: r for r in detections.collect(folder)}
    (folder / "000000000002.json").unlink()
    asked = []
    results = detections.Runner.results
    monkeypatch.setattr(detections.Runner, "results", lambda self, ids: asked.append(ids) or results(self, ids))
    detections.run_shard(folder)
    after = {r["image_id"]: r for r in detections.collect(folder)}
    assert asked == [[1, 2, 3, 4]]
    assert before[1] == after[1] and before[2] | {"seconds": 0} == after[2] | {"seconds": 0}


def test_shards_and_interruptions_change_nothing(world):
    whole = detections.prepare(world / "whole", spec())
    detections.run_shard(whole)
    parts = detections.prepare(world / "parts", spec())
    detections.run_shard(parts, 1, 3)
    with pytest.raises(FileNotFoundError, match="4 of 6 images"):
        detections.collect(parts)
    detections.run_shard(parts, 0, 3)
    (parts / "000000000002.json").unlink()  # as if it had been stopped before the second image
    for shard in range(3):
        detections.run_shard(parts, shard, 3)
    for a, b in zip(detections.collect(whole), detections.collect(parts), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_another_spec_never_meets_old_results(world):
    folder = detections.prepare(world / "run", spec())
    detections.run_shard(folder)
    detections.prepare(folder, spec(objective={"weight": 0.5}))
    with pytest.raises(FileNotFoundError, match="6 of 6 images"):
        detections.collect(folder)


def test_changed_weights_are_refused(world):
    folder = detections.prepare(world / "run", spec())
    ldm = tiny.layout_ldm()
    save_model(world / "ldm", ldm, ldm.config)
    with pytest.raises(ValueError, match="ldm: the weights have changed"):
        detections.run_shard(folder)


def test_results_are_coco_records_with_the_removal_as_score(world):
    folder = detections.prepare(world / "run", spec(prior=[], start="truth", inversion=SETTINGS | {"lr": 1e-6}))
    detections.run_shard(folder)
    results = detections.collect(folder)
    truth = read_json(world / "scenes" / "annotations" / "instances_test.json")
    records = detections_of(results)
    found = next(r for r in records if r["image_id"] == 1)
    annotated = [a for a in truth["annotations"] if a["image_id"] == 1]
    assert any(a["category_id"] == found["category_id"] and
               all(abs(p - q) <= 4 for p, q in zip(a["bbox"], found["bbox"])) for a in annotated)
    runner = detections.Runner(spec(prior=[]))
    latents, tokens = runner.latents([1]), torch.tensor(results[0]["tokens"])[None]
    pairs = detections.monitor_pairs(runner.objective, runner.config)
    without = tokens.clone()
    without[0, 0] = runner.ldm.grid.none_tokens
    rise = runner.objective.evaluate(latents, without, pairs) - runner.objective.evaluate(latents, tokens, pairs)
    assert records[0]["score"] == pytest.approx(rise.item(), abs=1e-6)
    assert {r["score"] for r in detections_of(results, constant=True)} == {1.0}


def test_a_search_scores_with_its_own_monitor(world):
    runner = detections.Runner(spec(prior=[], inversion=None, search={"monitor_pairs": 3, "t_low": 200, "t_high": 500}))
    pairs = detections.monitor_pairs(runner.objective, runner.config)
    assert len(pairs) == 3 and pairs.t.min() >= 200 and pairs.t.max() < 500


def test_dropped_objects_are_those_that_reading_and_decoding_left_out(world):
    """[none] tokens that were completed make no dropped object; half objects and illegal boxes do, legal or not."""
    runner = detections.Runner(spec(prior=[]))
    none = runner.ldm.grid.none_tokens
    nearest = torch.stack([torch.tensor([3, 2, 2, 6, 8]), torch.tensor([4, 9, 2, 12, int(none[4])]),
                           torch.tensor([5, *none[1:].tolist()]), torch.tensor([6, 9, 2, 3, 8])])
    tokens = torch.stack([nearest[0], torch.tensor([4, 9, 2, 12, 7]), none, none])
    row = runner.describe(1, detections.Inverted(tokens, nearest), torch.zeros(4), 0)
    assert [d["category_id"] for d in row["detections"]] == [4, 5]
    assert [(d["slot"], d["reason"]) for d in row["dropped"]] == [(2, "none"), (3, "illegal")]
    row = runner.describe(1, detections.Inverted(nearest, nearest), torch.zeros(4), 0)
    assert [(d["slot"], d["reason"]) for d in row["dropped"]] == [(1, "none"), (2, "none"), (3, "illegal")]


def test_a_shorter_run_is_read_off_a_longer_one(world):
    runs = {}
    for steps in (4, 8):
        runs[steps] = detections.prepare(world / f"run{steps}", spec(inversion=SETTINGS | {"steps": steps}))
        detections.run_shard(runs[steps])
    long, short = detections.collect(runs[8]), detections.collect(runs[4])
    ended = ended_at(detections.Runner(spec()), long, [4] * 6)
    assert [r["tokens"] for r in ended] == [r["tokens"] for r in short]
    assert detections_of(ended) == detections_of(short)
    assert [r["cost"]["forward_equivalents"] for r in ended] == [r["cost"]["forward_equivalents"] for r in short]


def test_early_stopping_saves_steps(world):
    folder = detections.prepare(world / "run", spec())
    detections.run_shard(folder)
    truth = read_json(world / "scenes" / "annotations" / "instances_test.json")
    results = detections.collect(folder)
    rows = early_stopping_table(detections.Runner(spec()), results, truth, [2, 8])
    assert rows[0]["mean_steps"] < rows[1]["mean_steps"] == 8
    assert rows[1]["AP"] == evaluate_run(truth, results, spec()["image_ids"])["AP"]
    assert rows[0]["forward_equivalents"] < rows[1]["forward_equivalents"]


def test_search_and_inversion_follow_each_other(world):
    search = {"rounds": 1, "proposals": 4, "proposal_pairs": 1, "refine_pairs": 1, "class_pairs": 1, "monitor_pairs": 1}
    folder = detections.prepare(world / "run", spec(search=search, image_ids=[1, 2]))
    detections.run_shard(folder)
    alone = detections.prepare(world / "alone", spec(search=search, inversion=None, image_ids=[1, 2]))
    detections.run_shard(alone)
    both, first = detections.collect(folder)[0]["cost"], detections.collect(alone)[0]["cost"]
    assert both["forward"] > first["forward"] > 0 and both["backward"] > first["backward"] == 0


def test_a_run_without_a_method_is_refused(world):
    with pytest.raises(ValueError, match="inversion settings, search settings or both"):
        spec(inversion=None)
    with pytest.raises(ValueError, match="nowhere"):
        spec(start="nowhere")


def test_processes_share_the_images(world):
    described = two_images(world)
    results = detections.run(world / "out", described, workers=2, label="test")
    assert [r["image_id"] for r in results] == described["image_ids"]
    assert len(list((world / "out").glob("0*.json"))) == 2


def test_a_share_is_a_command(world, monkeypatch):
    folder = image_runs.prepare(world / "run", two_images(world))
    monkeypatch.setattr("sys.argv", ["detections", str(folder), "--shard=1/2"])
    image_runs.command(detections.Runner)
    assert [path.name for path in folder.glob("0*.json")] == ["000000000002.json"]


def test_what_fails_in_a_process_is_told(world, monkeypatch):
    monkeypatch.setattr(detections.Runner, "results", None)
    with pytest.raises(RuntimeError, match="(?s)test failed.*'NoneType' object is not callable"):
        detections.run(world / "out", two_images(world), workers=2, label="test")


def two_images(world):
    return detections.make_spec(data=str(world / "scenes"), split="test", image_ids=[1, 2],
                                first_stage=str(world / "first_stage"), layout_ldm=str(world / "ldm"),
                                inversion=SETTINGS | {"steps": 2}, batch=1)
