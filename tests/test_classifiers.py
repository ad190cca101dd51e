"""Classifiers on toy images: they learn, have known sizes, and take a DiT's features and its images."""

from pathlib import Path

import pytest
import torch

from dive_lib import class_diagnosis, classifiers, dit, image_encoder, parameters, synthetic_images
from dive_lib.class_images import read_split
from dive_lib.train import TrainingConfig, train
from tests import class_world


@pytest.fixture
def model(tmp_path):
    class_world.save_dit(tmp_path / "dit")
    return dit.load(tmp_path / "dit")


def toy(count=60):
    """Images of three classes: bright above, below or nowhere."""
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    images[labels == 0, :, :4] += 1
    images[labels == 1, :, 4:] += 1
    return images, labels


@pytest.mark.parametrize("settings", [{"kind": "convnet", "widths": [8, 16]},
                                      {"kind": "resnet", "widths": [8, 8], "blocks": 1, "stem": "pixels"},
                                      {"kind": "vit", "patch": 4, "width": 16, "layers": 1, "heads": 2}])
def test_every_kind_learns(settings, tmp_path):
    images, labels = toy()
    torch.manual_seed(0)
    model = classifiers.make(settings, channels=1, classes=3, image_size=8)
    take = images.__getitem__
    config = TrainingConfig(steps=60, lr=0.01, batch_size=16, ema=0.9)
    losses = train(model, classifiers.classifier_loss(take, labels, 16), config, scratch=tmp_path, identity="toy")
    classifiers.calibrate(model, take, len(labels), batch=16, batches=5)
    answers = classifiers.predict(model, take, len(labels))
    assert losses[-1] < losses[0] and sum(a == b for a, b in zip(answers, labels.tolist())) >= 57


def test_kinds_and_sizes():
    networks = parameters.named("architectures", "classifiers", "paper")
    resnet = classifiers.make(networks["resnet"], channels=3, classes=1000, image_size=256)
    assert sum(p.numel() for p in resnet.parameters()) == 11_689_512, "ResNet-18"
    with pytest.raises(ValueError, match="kind must be one of"):
        classifiers.make({"kind": "mlp"}, channels=1, classes=2, image_size=8)
    with pytest.raises(ValueError, match="stem"):
        classifiers.ResNet(1, 2, 8, stem="other")


def test_every_named_network_reads_images_of_its_profile():
    for name, (channels, side, features) in {"smoke": (1, 16, (32, 4)), "mini": (1, 16, (128, 4))}.items():
        for row, settings in parameters.named("architectures", "classifiers", name).items():
            shape = features if row == "diffusion_feature" else (channels, side)
            network = classifiers.make(settings, channels=shape[0], classes=100, image_size=shape[1]).eval()
            assert network(torch.zeros(2, shape[0], shape[1], shape[1])).shape == (2, 100)


def test_shifts_move_images_without_changing_labels():
    images, labels = toy(6)
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 3)

    loss_of = classifiers.classifier_loss(images.__getitem__, labels, 6, shift=2)
    loss_of(Watch(), 0, torch.Generator().manual_seed(0))
    index = torch.randint(6, (6,), generator=torch.Generator().manual_seed(0))
    assert seen[0].sum() == pytest.approx(images[index].sum().item(), abs=1e-3)
    assert not torch.equal(seen[0], images[index])


def test_features_are_those_of_one_block_and_repeat(model):
    latents = torch.randn(3, 1, 8, 8)
    features = classifiers.DiffusionFeatures(model, t=50, block=0)
    a, b = features(latents), features(latents[:1])
    assert a.shape == (3, 16, 2, 2) and torch.allclose(a[:1], b, atol=1e-5)
    assert not torch.allclose(a, classifiers.DiffusionFeatures(model, t=50, block=1)(latents))
    assert features.identity != classifiers.DiffusionFeatures(model, t=60, block=0).identity
    assert not features.block._forward_hooks, "the model is left as it was"


def test_synthetic_images_are_a_folder_of_classes_and_continue(model, tmp_path):
    def draw(**changes):
        settings = {"per_class": 2, "steps": 3, "seed": 0, "batch": 5} | changes
        return synthetic_images.draw_split(tmp_path, "train", model, image_encoder.load(), **settings)

    folder = draw()
    images = read_split(tmp_path, "train", image_size=8, channels=1, classes=class_world.CLASSES)
    assert len(images) == 12 and images.labels.tolist() == [k // 2 for k in range(12)]
    before = {path: path.read_bytes() for path in Path(folder).rglob("*.png")}
    assert len(set(before.values())) == 12
    next(iter(before)).unlink()  # as if it had been stopped before this batch was complete
    draw()
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    draw(seed=1)
    assert all(path.read_bytes() != content for path, content in before.items())


def test_gaps_are_those_of_the_losses(model):
    latents, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    wrong = class_diagnosis.wrong_classes(labels, 6, torch.Generator().manual_seed(0))
    assert (wrong != labels).all() and wrong.min() >= 0 and wrong.max() < 6
    rows = class_diagnosis.gap_table(model, latents, labels, [(0, 100), (300, 500)], draws=3, seed=0)
    assert [(r["corruption"], r["t_low"]) for r in rows] == [(name, low) for low in (0, 300)
                                                            for name in ("wrong_class", "null_class")]
    assert all(0 <= r["share"] <= 1 and abs(r["gap"]) < r["true_loss"] for r in rows) and any(r["gap"] for r in rows)
