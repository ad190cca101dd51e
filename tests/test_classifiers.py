"""Classifiers on toy images: they learn, have known sizes, and take a DiT's features and its images."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dive_lib import class_diagnosis, class_models, classifiers, comparison_backbones, image_encoder, parameters
from dive_lib import synthetic_images
from dive_lib.class_images import read_split
from dive_lib.train import TrainingConfig
from tests import class_world


@pytest.fixture
def model(tmp_path):
    class_world.save_dit(tmp_path / "dit")
    return class_models.load(tmp_path / "dit")


def toy(count=60):
    """Images of three classes: bright above, below or nowhere."""
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    images[labels == 0, :, :4] += 1
    images[labels == 1, :, 4:] += 1
    return images, labels


@pytest.mark.parametrize("settings", [{"kind": "convnet", "widths": [8, 16]},
                                      {"kind": "resnet", "widths": [8, 8], "blocks": 1, "stem": "pixels"},
                                      {"kind": "resnet", "widths": [4, 8], "blocks": [1, 2], "stem": "pixels",
                                       "bottleneck": True, "groups": 2, "inner": 2},
                                      {"kind": "swin", "patch": 2, "width": 16, "depths": [2, 1], "heads": [2, 2],
                                       "window": 2},
                                      {"kind": "vit", "patch": 4, "width": 16, "layers": 1, "heads": 2}])
def test_every_kind_learns(settings, tmp_path):
    images, labels = toy()
    take = images.__getitem__
    config = TrainingConfig(steps=60, lr=0.01, batch_size=16, ema=0.9)
    shape = {"channels": 1, "classes": 3, "image_size": 8}
    model = classifiers.fit(settings, shape, take, labels, config, directory=tmp_path / "net", identity="toy")
    answers = classifiers.predict(model, take, len(labels))
    assert sum(a == b for a, b in zip(answers, labels.tolist())) >= 57
    kept = classifiers.load(tmp_path / "net")
    assert classifiers.predict(kept, take, len(labels)) == answers and not kept.training


def count(settings, image_size=224) -> int:
    with torch.device("meta"):
        network = classifiers.make(settings, channels=3, classes=1000, image_size=image_size)
    return sum(p.numel() for p in network.parameters())


def test_kinds_and_sizes():
    deep = {"kind": "resnet", "blocks": [3, 4, 6, 3], "bottleneck": True}
    assert count({"kind": "resnet"}) == 11_689_512, "ResNet-18"
    assert count(deep) == 25_557_032, "ResNet-50"
    assert count(deep | {"groups": 32, "inner": 2}) == 25_028_904, "ResNeXt-50 32x4d"
    assert count(deep | {"blocks": [3, 4, 23, 3], "groups": 32, "inner": 4}) == 88_791_336, "ResNeXt-101 32x8d"
    assert count({"kind": "alexnet"}) == 61_100_840, "AlexNet"
    assert count({"kind": "swin"}) == 87_768_224, "Swin-B"
    assert count({"kind": "vit_class_token"}) == 86_567_656, "ViT-B/16"


def test_published_networks_have_the_published_sizes():
    networks = parameters.named("architectures", "classifiers", "paper")
    assert {name: count(settings["network"]) for name, settings in networks.items() if "network" in settings} == {
        "convnet": 61_100_840, "resnet": 11_689_512, "resnet_bottleneck": 25_557_032, "resnext": 88_791_336,
        "vit_large": 306_535_400, "vit": 86_567_656, "swin": 87_768_224}
    assert count(networks["synthetic_data"]) == 25_557_032


@pytest.mark.parametrize("settings, message", [
    ({"kind": "mlp"}, "kind must be one of"),
    ({"kind": "resnet", "stem": "other"}, "stem"),
    ({"kind": "resnet", "blocks": [1, 2]}, "4 widths need as many numbers of blocks"),
    ({"kind": "resnet", "groups": 2}, "settings of bottleneck blocks"),
    ({"kind": "alexnet"}, "at least 63 pixels, got 8"),
    ({"kind": "swin", "patch": 4, "depths": [1, 1, 1], "heads": [1, 2, 4]}, "8 pixels, patches of 4 .* do not fit"),
    ({"kind": "swin", "patch": 1, "depths": [1, 1], "heads": [1], "window": 4}, "do not fit"),
    ({"kind": "swin", "patch": 2, "depths": [1, 1], "heads": [1, 2], "window": 4}, "windows of 4 patches do not fit"),
    ({"kind": "vit_class_token", "patch": 3}, "8 pixels have no whole number of patches of 3"),
    ({"kind": "vit_class_token", "patch": 4, "heads": 5}, "5 heads do not share 768 channels"),
])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        classifiers.make(settings, channels=1, classes=2, image_size=8)


def test_basic_networks_have_lasting_names_and_draws():
    """Saved networks, and what their seeds give, outlive additions to the kinds of blocks."""
    torch.manual_seed(0)
    network = classifiers.ResNet(1, 3, 8, widths=[4, 8], blocks=1, stem="pixels")
    torch.manual_seed(0)
    layers = {"0": nn.Conv2d(1, 4, 3, bias=False), "3.path.0": nn.Conv2d(4, 4, 3, bias=False),
              "3.path.3": nn.Conv2d(4, 4, 3, bias=False), "4.path.0": nn.Conv2d(4, 8, 3, bias=False),
              "4.path.3": nn.Conv2d(8, 8, 3, bias=False), "4.shortcut.0": nn.Conv2d(4, 8, 1, bias=False),
              "7": nn.Linear(8, 3)}
    state = network.state_dict()
    assert all(torch.equal(state[f"{name}.weight"], layer.weight) for name, layer in layers.items())
    assert "3.path.4.running_mean" in state and "4.shortcut.1.weight" in state


def test_bottleneck_networks_have_stages_like_others():
    network = classifiers.ResNet(3, 5, 16, widths=[4, 8], blocks=[2, 1], stem="pixels", bottleneck=True)
    backbone = comparison_backbones.ResNetFeatures(network)
    maps = backbone.features(torch.zeros(2, 3, 16, 16))
    assert {stage: tuple(x.shape[1:]) for stage, x in maps.items()} == {"layer0": (16, 16, 16), "layer1": (32, 8, 8)}
    assert backbone.channels == {"layer0": 16, "layer1": 32}


def test_every_named_network_reads_images_of_its_profile():
    for name, (channels, side, features) in {"smoke": (1, 16, (32, 4)), "mini": (1, 16, (128, 4))}.items():
        for row, settings in parameters.named("architectures", "classifiers", name).items():
            shape = features if row == "diffusion_feature" else (channels, side)
            settings = {key: value for key, value in settings.items() if key not in ("lr", "steps")}  # of its training
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
