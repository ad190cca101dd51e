"""A second layout LDM and the images of both: training continues, drawing repeats, and nothing unfit goes through."""

import dataclasses

import numpy as np
import pytest
import torch

from dive_lib import backbones, classifiers, dataset, generation_quality, glyphs, layout_generation
from dive_lib import layout_training, paths, stage_scratch
from dive_lib.denoisers import in_format_of
from dive_lib.layout import LayoutGrid
from dive_lib.train import TrainingConfig
from tests import tiny
from tests.test_models import first_stage

ARCHITECTURE = {"vocabulary": tiny.VOCABULARY, "encoder": tiny.ENCODER, "unet": tiny.UNET, "position_attention": True}
CONFIG = TrainingConfig(steps=4, lr=0.01, batch_size=3, ema=0.9)
RECIPE = {"dropout": {"partial": 0.25, "objects": 0.1, "layouts": 0.1},
          "focus": {"low": 100, "high": 650, "share": 0.6}}


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """Described scenes of 64 x 64 pixels in a folder that stands for the repository."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    glyphs.export(tmp_path / "data")
    root = dataset.make_scenes(tmp_path / "scenes", {"train": 8, "val": 6, "test": 2}, covered=0.25, seed=0)
    names = {split: split for split in dataset.SPLITS}
    return dataset.describe("smoke", root, names, image_size=64, bins=17, slots=4, strict=False, evaluation=2,
                            ablation=1, tuning=2, seed=0)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return first_stage().eval()


def obtain(scenes, autoencoder, architecture=ARCHITECTURE, config=CONFIG, **changes):
    return layout_training.obtain(scenes, autoencoder, architecture, config, **(RECIPE | changes))


def test_a_stopped_training_continues_and_ends_alike(scenes, autoencoder, monkeypatch):
    whole, losses = obtain(scenes, autoencoder)
    assert len(losses) == 4 and whole.grid == scenes.grid

    def stopping(model, loss_of, config, **settings):
        train(model, loss_of, config, **settings, stop_after=2)
        raise KeyboardInterrupt

    train = layout_training.train
    monkeypatch.setattr(layout_training, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        obtain(scenes, autoencoder)
    assert len(list((paths.scratch() / "layout_ldm").iterdir())) == 1
    monkeypatch.setattr(layout_training, "train", train)
    again, continued = obtain(scenes, autoencoder)
    assert continued == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_recipe_decides_the_result(scenes, autoencoder):
    losses = obtain(scenes, autoencoder)[1]
    assert obtain(scenes, autoencoder, kind="l1")[1] != losses
    assert obtain(scenes, autoencoder, focus=RECIPE["focus"] | {"share": 0.0})[1] != losses
    assert obtain(scenes, autoencoder, config=dataclasses.replace(CONFIG, seed=1))[1] != losses


def test_an_architecture_for_other_latents_is_refused(scenes, autoencoder):
    with pytest.raises(ValueError, match=r"diffuses \(4, 16, 16\), the first stage's latents are \(4, 8, 8\)"):
        obtain(scenes, autoencoder, ARCHITECTURE | {"unet": tiny.UNET | {"sample_size": 16}})


def test_layouts_come_with_their_own_images(scenes):
    tokens, images = layout_generation.layouts_and_images(scenes, "val", 3)
    assert tokens.shape == (3, 4, 5) and images.shape == (3, 3, 64, 64)
    for row, index in enumerate((0, 2, 5)):
        assert torch.equal(images[row], scenes.val.load_image(index))
        found = sorted(scenes.grid.decode(tokens[row]).class_ids.tolist())
        assert found == sorted(scenes.val.class_ids(index).tolist())
    assert len(layout_generation.layouts_and_images(scenes, "val", 99)[0]) == 6


def test_a_stopped_drawing_continues_and_ends_alike(autoencoder, monkeypatch):
    model, tokens = tiny.layout_ldm(), tiny.layouts()
    whole = layout_generation.draw(model, autoencoder, tokens, steps=2, seed=1, batch=2)
    assert whole.shape == (3, 3, 64, 64) and whole.abs().max() <= 1
    levels = (whole + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    files = sorted((paths.scratch() / "layout_samples").rglob("*.safetensors"))
    assert len(files) == 2
    files[1].unlink()  # as if it had been stopped before the second batch
    drawn = []
    monkeypatch.setattr(autoencoder, "decode", lambda z, decode=autoencoder.decode: drawn.append(len(z)) or decode(z))
    assert torch.equal(layout_generation.draw(model, autoencoder, tokens, steps=2, seed=1, batch=2), whole)
    assert drawn == [1], "the first batch was there"


def test_a_stage_that_ended_well_leaves_no_drawings(autoencoder, monkeypatch):
    stage = stage_scratch.new_id(paths.reports("smoke") / "13_model_evaluation.ipynb")
    monkeypatch.setenv(stage_scratch.VARIABLE, stage)
    layout_generation.draw(tiny.layout_ldm(), autoencoder, tiny.layouts(), steps=2, seed=1)
    assert len(list((paths.scratch() / "layout_samples").iterdir())) == 1
    stage_scratch.forget(stage)
    assert not list((paths.scratch() / "layout_samples").iterdir())


def test_drawings_depend_on_model_layouts_and_seed(autoencoder):
    tokens, settings = tiny.layouts(), {"steps": 2, "seed": 1}
    first = layout_generation.draw(tiny.layout_ldm(), autoencoder, tokens, **settings)
    for model, given, changed in ((tiny.layout_ldm(seed=1), tokens, settings),
                                  (tiny.layout_ldm(), tokens.flip(0), settings),
                                  (tiny.layout_ldm(), tokens, settings | {"seed": 2}),
                                  (tiny.layout_ldm(), tokens, settings | {"steps": 3})):
        assert not torch.equal(layout_generation.draw(model, autoencoder, given, **changed), first)


def test_scenes_reach_the_classifier_as_they_reach_the_features_of_the_backbone():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 64, 64) * 2 - 1
    network = classifiers.ResNet(1, 10, 16, widths=(8, 12), blocks=1, stem="pixels").eval()
    grey = in_format_of(images, channels=1, side=16)
    assert grey.shape == (5, 1, 16, 16)
    assert grey[0, 0, 0, 0].item() == pytest.approx(images[0, :, :4, :4].mean().item(), abs=1e-6)
    maps = backbones.GreyResNetFeatures(network, side=16).features(images)
    last = maps[list(maps)[-1]].mean((2, 3))
    features, _ = generation_quality.read_images(network, grey)
    np.testing.assert_allclose(features, last.numpy(), atol=1e-5)
    assert torch.equal(in_format_of(images, channels=3, side=64), images)


def test_measures_of_scenes(scenes, autoencoder):
    """As the notebook joins them: real scenes against those drawn for their layouts."""
    network = classifiers.ResNet(1, 10, 16, widths=(8, 12), blocks=1, stem="pixels").eval()
    model = tiny.LayoutLDM(LayoutGrid(**scenes.grid.to_dict()), **ARCHITECTURE).eval()
    tokens, real = layout_generation.layouts_and_images(scenes, "val", 6)
    drawn = layout_generation.draw(model, autoencoder, tokens, steps=2, seed=0)
    row = generation_quality.quality(network, *(in_format_of(x, 1, 16) for x in (real, drawn)))
    assert set(row) == set(generation_quality.BETTER) and row["frechet_distance"] > 0
