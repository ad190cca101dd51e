"""DIVE's notebooks, 01 to 13 and 19, with the profile `paper` on tiny networks in the published formats.

Their networks come from named settings, so they run in this process, where these can be made small; only they, paths,
sizes, steps and counts differ from `params.yaml`. `torch.compile`, which takes minutes, is left out.
"""

import pytest
import torch

from dive_lib import compvis, image_encoder, parameters, paths
from dive_lib.files import read_json
from tests import paper_world
from tests.paper_world import SIDE

PROFILE = "paper"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of everything, to which the variables of `paths` point while this module's tests run."""
    with paper_world.folder(tmp_path_factory) as (root, patch):
        patch.setattr(compvis, "VQ_F8", paper_world.VQ_F8)
        patch.setattr(image_encoder, "VQ_F4", paper_world.VQ_F4)
        patch.setattr(torch, "compile", lambda forward, **options: forward)
        patch.setattr("dive_lib.side_by_side.cores", lambda: 1)
        (root / "checkpoints").mkdir()
        paper_world.coco(root / "coco")
        paper_world.imagenet(root / "imagenet")
        paper_world.published_models(root / "checkpoints")
        patch.setattr(parameters, "named", lambda *names: paper_world.small(root / "checkpoints", *names))
        yield root


@pytest.fixture(autouse=True)
def isolated_folders(world):
    """In the place of every other test's: these build on each other's results."""


@pytest.fixture(autouse=True)
def four_cores(world):
    """In the place of every other test's: all runs in this process."""


def cells(notebook: str, **changes) -> dict:
    """The metrics of a notebook after `run`."""
    run(notebook, **changes)
    return read_json(paths.metrics(PROFILE, notebook[3:]))


def run(notebook: str, **changes) -> None:
    """Runs a notebook's cells here, with the profile's parameters but for `changes`."""
    path = paths.notebooks() / f"{notebook}.ipynb"
    names = {"display": lambda shown: None} | parameters.resolve(
        path, PROFILE, {name: str(value) for name, value in changes.items()})
    for number, cell in enumerate(read_json(path)["cells"]):
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), f"{notebook}, cell {number}", "exec"), names)


@pytest.fixture(scope="module")
def detected(world) -> dict:
    """Metrics of 01 to 08."""
    training = {"steps": 2, "batch_size": 2}
    return {
        "data": cells("01_data", root=world / "coco", image_size=SIDE, slots=4,
                      subsets={"evaluation": 3, "ablation": 2, "tuning": 2}),
        "first_stage": cells("02_first_stage", checkpoint=world / "checkpoints" / "vq-f8.ckpt"),
        "layout_ldm": cells("03_layout_ldm", **training, **{"optimiser.early": 1}),
        "layout_prior": cells("04_layout_prior", **training, decoupled_steps=2),
        "detection": cells("05_detection", steps=4, batch=2, **{"execution.chunk": 4}),
        "ablation": cells("06_ablation", examples=2, resamples=10),
        "steps": cells("07_steps", rows=[2, 4]),
        "diagnosis": cells("08_diagnosis", pairs=4, start_at_truth=2)}


@pytest.fixture(scope="module")
def classified(world) -> dict:
    """Metrics of 09 to 12."""
    checkpoints = world / "checkpoints"
    return {
        "class_data": cells("09_class_data", root=world / "imagenet", image_size=SIDE,
                            encoder=checkpoints / "sd-vae-ft-ema"),
        "dit": cells("10_dit", checkpoint=checkpoints / "DiT-XL-2-256" / "transformer"),
        "classification": cells("11_classification", class_counts=[2, 5], **{
            "images": {"test": 6, "fewer": 4, "tuning": 3, "noises": 2, "per_count": 2}, "execution.chunk": 32}),
        "classifiers": cells("12_classifiers", synthetic={"per_class": 2, "steps": 2}, feature={"t": 50, "block": 1},
                             **{"training.steps": 2, "training.batch_size": 4})}


def test_01_to_08_detection(detected):
    assert detected["data"]["classes"] == 80 and detected["first_stage"]["codes"] == 16
    assert detected["layout_ldm"]["steps"] == detected["layout_prior"]["steps"] == 2
    assert set(detected["detection"]) == {"dive", "dive_best_search"} and "decoupled_prior" in detected["ablation"]
    assert set(detected["steps"]) == {"2", "4"} and "start_at_truth" in detected["diagnosis"]


def test_09_to_12_classification(classified):
    assert classified["class_data"]["latent_shape"] == [4, 8, 8] and classified["dit"]["steps"] == 0
    rows = classified["classification"]
    assert rows["dive_exact"]["accuracy"] == rows["dive_published"]["accuracy"] and len(classified["classifiers"]) == 9


def test_19_trains_detectors(detected):
    rows = cells("19_detectors", synthetic={"images": 4, "steps": 2}, examples=2, resamples=10, **{
        "training.steps": 2, "training.batch_size": 2})
    assert set(rows) == {"synthetic_data", "diffusion_feature", "supervised"}
    assert rows["synthetic_data"]["forward_equivalents_once"] == 8 and rows["supervised"]["training_images"] == 6


def test_13_and_20_compare_models_and_report(world, detected, classified):
    checkpoint = world / "checkpoints" / "ldm-4" / "model.ckpt"
    metrics = cells("13_model_evaluation", images=2, layouts={"samples": 5, "sampling_steps": 2, "images": 2}, **{
        "second_model.checkpoint": checkpoint, "second_model.encoder": checkpoint, "samples.per_class": 2,
        "samples.steps": 2,
        "samples.inception_weights": world / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"})
    assert set(metrics["models"]) == {"DiT", "LDM-4"} and metrics["features"].startswith("Inception")
    run("20_report", examples=2)
    assert {"detection", "detectors", "classification", "model_evaluation"} < set(
        read_json(paths.reports(PROFILE) / "metrics.json"))
