"""The notebooks with the profile `paper`, from beginning to end, on tiny weights and folders in the published formats.

Only paths, sizes, steps, counts and lists of data sets differ from `params.yaml`; everything else is the profile's.
"""

import pytest

from dive_lib import backbones, parameters, paths, run, task_bench
from dive_lib.files import read_json
from tests import paper_world

PROFILE = "paper"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of everything, to which the variables of `paths` point while this module's tests run."""
    with paper_world.folder(tmp_path_factory) as (root, patch):
        patch.setenv("OMP_NUM_THREADS", "1")
        paper_world.few_shot(root / "vermouth")
        paper_world.sketches(root / "vermouth")
        paper_world.segmentation(root / "vermouth")
        paper_world.checkpoints(root / "checkpoints")
        yield root


@pytest.fixture(autouse=True)
def isolated_folders(world):
    """In the place of every other test's: these build on each other's results."""


@pytest.fixture(scope="module")
def described(world):
    """14_vermouth_data has run."""
    return execute(world, "14_vermouth_data", **{
        "root": str(world / "vermouth"), "few_shot": list(paper_world.FEW_SHOT),
        "image_sizes": {"few_shot": paper_world.SIDE, "sketches": paper_world.SIDE,
                        "segmentation": 2 * paper_world.SIDE},
        "sketches.sets": list(paper_world.SKETCHES), "sketches.held_out": 1,
        "segmentation.tests": ["ADE-150/val", "PC-459/val"]})


def execute(world, notebook: str, **changes):
    """Runs a notebook with the profile's parameters but for `changes`, and returns its metrics."""
    run.run(paths.notebooks() / f"{notebook}.ipynb", PROFILE, {name: str(value) for name, value in changes.items()})
    return read_json(paths.metrics(PROFILE, notebook[3:]))


def model(world) -> dict:
    folders = {"folder": "stable-diffusion-v1-5", "captioner": "blip-image-captioning-base",
               "text": "clip-vit-large-patch14", "expert_folders.resnet18": "resnet-18",
               "expert_folders.dino": "dino-vitb16", "expert_folders.dinov2": "dinov2-base"}
    return {f"model.{name}": world / "checkpoints" / folder for name, folder in folders.items()} | {"model.batch": 8}


def test_14_describes_the_public_sets(described):
    assert {row["set"] for row in described["images"]} == {*paper_world.FEW_SHOT, *paper_world.SKETCHES, "coco_stuff",
                                                           "ADE-150/val", "PC-459/val"}


def test_15_probes_all_backbones(world, described):
    paper_world.earlier_stages(PROFILE, world)
    folders = {"stable_diffusion": "stable-diffusion-v1-5", "resnet18": "resnet-18", "dinov2": "dinov2-base",
               "blip": "blip-image-captioning-base"}
    metrics = execute(world, "15_features", **{f"folders.{name}": world / "checkpoints" / folder
                                               for name, folder in folders.items()},
                      **{"times": [0, 500], "images": {"photos": [12, 6, 6], "sketches": [6, 4], "gallery": [9, 6],
                                                       "scenes": [4, 4, 4]},
                         "noise.several": [50, 200], "noise.inversion_steps": 2, "conditions.scenes": 4,
                         "conditions.per_class": 2, "looks": {"times": [0, 500], "images": 1, "per_class": 3},
                         "statistics.resamples": 20})
    assert set(metrics["backbones"]) == {
        "stable_diffusion", "untrained_stable_diffusion", "layout_ldm", "untrained_layout_ldm", "dit", "untrained_dit",
        "resnet18", "dinov2", "pixels"}
    assert {"layouts", "classes", "prompts"} <= set(metrics["ablations"])
    assert "it/s" not in (paths.reports(PROFILE) / "15_features.ipynb").read_text(), "it would differ from run to run"


def test_16_learns_from_few_images(world, described):
    metrics = execute(world, "16_few_shot", **model(world), **{
        "grid.t": [50], "shots": [1, 2], "draws": 2, "head.width": 64, "head.heads": 2, "head.epochs": 1,
        "scratch.widths": [4, 4, 8, 8], "scratch.steps": 2, "scratch.batch_size": 4})
    assert set(paper_world.FEW_SHOT) < set(metrics)


def test_17_finds_photos(world, described):
    metrics = execute(world, "17_sketch_retrieval", **model(world), **{
        "grid.t": [0, 50], "head.width": 8, "head.heads": 2})
    assert set(paper_world.SKETCHES) < set(metrics)


def test_18_names_pixels(world, described):
    metrics = execute(world, "18_segmentation", **model(world), **{
        "head.width": 8, "head.steps": 2, "head.batch_size": 4, "handicap": {"values": [0.0, 0.1], "held_out": 20}})
    assert {"ADE-150/val", "PC-459/val"} < set(metrics)
    assert "with expert dinov2" in metrics["ablations"] and "with expert resnet18" not in metrics["ablations"]


def test_every_missing_checkpoint_is_named_at_once(tmp_path, monkeypatch):
    """By 15 to 18 in their first cells, before anything is read."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    settings = parameters.load(PROFILE)
    with pytest.raises(FileNotFoundError) as caught:
        backbones.require([*settings["features"]["backbones"], "blip"], settings["features"]["folders"])
    named = {"stable-diffusion-v1-5", "resnet-18", "dinov2-base", "blip-image-captioning-base"}
    assert {line.rpartition("into checkpoints/")[2] for line in str(caught.value).splitlines()[1:]} == named
    for task in ("few_shot", "sketch_retrieval", "segmentation"):
        own = settings[task]
        with pytest.raises(FileNotFoundError) as caught:
            task_bench.Bench(PROFILE, own["model"], backbones=[*own["grid"]["backbones"], *own["experts"]])
        lines = str(caught.value).splitlines()[1:]
        captions = {"blip-image-captioning-base"} if own["model"]["prompt"] == "blip" else set()
        assert {line.rpartition("into checkpoints/")[2] for line in lines} == {
            *named - {"blip-image-captioning-base"}, *captions, "dino-vitb16", "clip-vit-large-patch14"}
        assert all("huggingface.co/" in line for line in lines)
