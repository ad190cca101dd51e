"""The class half of 13_model_evaluation as the profile `paper` runs it: DiT and LDM-4, each with its autoencoder."""

import pytest
import torch
from diffusers import AutoencoderKL

from dive_lib import (checkpoint, class_data, class_models, classifications, classifiers, image_encoder, parameters,
                      paths)
from dive_lib.class_ldm import ClassLDM
from dive_lib.files import read_json
from tests import tiny
from tests.class_world import DIVE, PAIRS
from tests.test_class_data import AUTOENCODER, folder
from tests.test_class_ldm import SMALL, VQ, compvis_state, small, write

NETWORK = {"kind": "resnet", "widths": [4, 6], "blocks": 1, "stem": "pixels"}
ARCHITECTURES = {"LDM-4": SMALL}
SHAPE = {"channels": 3, "classes": 2, "image_size": 16}


def class_cells() -> list[str]:
    """Code of the notebook from its parameters to its second half, about layouts."""
    cells = read_json(paths.notebooks() / "13_model_evaluation.ipynb")["cells"]
    sources = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    end = next(k for k, (source, _) in enumerate(sources) if source.startswith("## Layouts"))
    return [source for source, kind in sources[:end] if kind == "code"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """What earlier notebooks leave for the profile `x`, and the checkpoint of the second model."""
    monkeypatch.setattr(image_encoder, "VQ_F4", VQ)
    monkeypatch.setattr(parameters, "named", lambda kind, family, name: ARCHITECTURES[name])
    folder(tmp_path / "imagenet", split="train", images=4, size=(40, 30))
    folder(tmp_path / "imagenet", images=3, size=(40, 30))
    torch.manual_seed(0)
    AutoencoderKL(**AUTOENCODER).save_pretrained(tmp_path / "vae")
    names = {"train": "train", "val": "val", "test": "val"}
    data = class_data.describe("x", tmp_path / "imagenet", names, image_size=16, channels=3,
                               per_class={"train": 0, "val": 1, "test": 2}, encoder=str(tmp_path / "vae"))
    runs, model = paths.runs("x"), tiny.dit(classes=["n01", "n02"])
    checkpoint.save_model(runs / "dit", model, model.config)
    checkpoint.save_early(runs / "layout_ldm_early", torch.nn.Linear(1, 1), {}, {"weight": torch.ones(1)})  # other half
    checkpoint.save_model(runs / "classifiers" / "resnet", classifiers.make(NETWORK, **SHAPE), NETWORK | SHAPE)
    described = classifications.make_spec(data, "test", data.ids("test"), runs / "dit", DIVE,
                                          pairs=PAIRS | {"noise": "published"}, batch=4)
    classifications.run(runs / "classification" / "dive_exact", described)
    return write(tmp_path / "model.ckpt", compvis_state(small(classes=2)))


def run_cells(**second_model) -> dict:
    """The variables of the notebook after its class half."""
    names, (first, *rest) = {}, class_cells()
    exec(first, names)
    samples = {"per_class": 2, "steps": 2, "inception_weights": ""}
    names |= {"profile": "x", "samples": samples, "images": 4, "second_model": second_model}
    for source in rest:
        exec(source, names)
    return names


def test_table_vi_with_the_papers_second_model(world):
    names = run_cells(name="LDM-4", architecture="LDM-4", checkpoint=str(world), encoder=str(world))
    assert isinstance(class_models.load(paths.runs("x") / "second_model"), ClassLDM)
    assert list(names["metrics"]) == ["DiT", "LDM-4"] == list(names["answers"])
    assert [split.load_image(0).shape for split in names["drawn"].values()] == [(3, 16, 16)] * 2
    one, other = ([r["image_id"] for r in results] for results in names["answers"].values())
    assert one == other and len(one) == 4
    spec = read_json(paths.runs("x") / "classification_second" / "spec.json")
    assert spec["encoder"] == str(world) and spec["pairs"]["noise"] == "published"
    deviation = class_models.load(paths.runs("x") / "dit").vocabulary.std
    assert spec["settings"]["lr_std"] == pytest.approx(DIVE["lr"] / deviation), "0.3 is another rate for another table"
    count = sum(p.numel() for p in class_models.load(paths.runs("x") / "second_model").parameters())
    assert names["metrics"]["LDM-4"]["parameters"] == count
    assert names["metrics"]["LDM-4"].keys() == names["metrics"]["DiT"].keys()


def test_table_vi_with_the_same_model_early_in_its_training(world):
    torch.manual_seed(1)
    model = tiny.dit(classes=["n01", "n02"])
    checkpoint.save_model(paths.runs("x") / "dit_early", model, model.config,
                          {name: value + 0.1 for name, value in model.state_dict().items()})
    names = run_cells(name="early DiT", architecture="", checkpoint="", encoder="")
    assert list(names["metrics"]) == ["DiT", "early DiT"] == list(names["answers"])
    first, spec = (read_json(paths.runs("x") / folder / "spec.json")
                   for folder in ("classification/dive_exact", "classification_second"))
    assert spec["model"].endswith("dit_early") and spec["model_weights"] != first["model_weights"]
    assert spec["encoder"] == first["encoder"]


def test_a_missing_early_model_is_told_before_anything_is_drawn(world):
    with pytest.raises(FileNotFoundError, match="runs/x/dit_early: no such model; set dit.optimiser.early above 0"):
        run_cells(name="early DiT", architecture="", checkpoint="", encoder="")
