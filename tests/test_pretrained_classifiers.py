"""Published classifiers from tiny stand-ins of their files: preprocessing, answers, and what wrong files are told."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import classifiers, generation_quality, pretrained_classifiers as pretrained
from dive_lib.train import TrainingConfig
from tests import stand_ins

SHAPE = {"channels": 3, "classes": 5, "image_size": 48}
SMALL = {"kind": "resnet", "widths": [4, 8], "blocks": 1, "bottleneck": True, "groups": 2, "inner": 2}


def images(count=2, side=48):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def settings(folder) -> dict:
    return {"kind": "pretrained", "folder": str(folder), "source": "someone/model"}


def state_preprocessing(folder, **stated):
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))


def published_names(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under other names, as an old file has them: statistics first and without counters."""
    state = {}
    for number, (name, module) in enumerate(network.named_modules()):
        own = module.state_dict() if not list(module.children()) else {}
        old = sorted(own, key=lambda key: not key.startswith("running"))
        state |= {f"layer{number}.{key}": own[key] for key in old if key != "num_batches_tracked"}
    return state


@pytest.mark.parametrize("kind", ["resnet", "vit", "swin"])
def test_reads_the_images_of_the_data(kind, tmp_path):
    folder = stand_ins.image_classifier(tmp_path / kind, kind)
    model = classifiers.make(settings(folder), **SHAPE).eval()
    side = 224 if kind == "resnet" else 32
    assert (model.side, model.resized) == (side, side), "without a file the whole image"
    seen = F.interpolate((images() + 1) / 2, (side, side), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (pretrained.IMAGENET_MEAN, pretrained.IMAGENET_STD))
    with torch.no_grad():
        torch.testing.assert_close(model(images()), model.network((seen - mean) / std).logits)
        assert model(images()).shape == (2, 5)


@pytest.mark.parametrize("stated, expected", [
    ({"size": 224, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
     {"side": 224, "resized": 224, "mode": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}),
    ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3},
     {"side": 224, "resized": 256, "mode": "bicubic"}),
    ({"size": {"height": 384, "width": 384}, "crop_pct": 0.875}, {"side": 384, "resized": 384}),
    ({"size": 256, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, {"side": 224, "resized": 256}),
    ({"size": 256, "do_center_crop": False, "crop_size": 224}, {"side": 256, "resized": 256}),
])
def test_preprocessing_is_what_the_file_states(stated, expected, tmp_path):
    state_preprocessing(tmp_path, **stated)
    found = pretrained.preprocessing(tmp_path)
    assert {key: found[key] for key in expected} == expected


def test_preprocessing_is_that_of_transformers(tmp_path):
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    stated = {"size": {"shortest_edge": 28}, "crop_pct": 0.875, "resample": 3, "image_mean": [0.4] * 3,
              "image_std": [0.2] * 3}
    state_preprocessing(tmp_path, **stated)
    model = pretrained.PretrainedClassifier(nn.Identity(), **pretrained.preprocessing(tmp_path))
    smooth = F.interpolate(images(1, 6), (64, 64), mode="bicubic").clamp(-1, 1)
    pixels = ((smooth + 1) * 127.5).round().byte()
    theirs = ConvNextImageProcessorPil(**stated)(pixels[0].numpy(), input_data_format="channels_first")["pixel_values"]
    ours = model(pixels.float() / 127.5 - 1)
    assert ours.shape == (1, 3, 28, 28)
    np.testing.assert_allclose(ours[0].numpy(), np.asarray(theirs[0]), atol=2 / 255 / 0.2)  # Pillow rounds to bytes


def test_is_kept_by_name_and_neither_trained_nor_copied(tmp_path):
    folder = stand_ins.image_classifier(tmp_path / "published")

    def take(index):
        raise AssertionError("nothing is trained")

    config = TrainingConfig(steps=3, lr=0.1, batch_size=2)
    model = classifiers.fit(settings(folder), SHAPE, take, torch.zeros(2), config, directory=tmp_path / "resnet",
                            identity="data", shift=1)
    assert [path.name for path in (tmp_path / "resnet").iterdir()] == ["config.json"]
    loaded = classifiers.load(tmp_path / "resnet")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded(images()), model(images()), rtol=0, atol=0)
    features, probabilities = generation_quality.read_images(loaded, images(3), batch=2)
    assert features.shape == (3, 12) and probabilities.shape == (3, 5)
    torch.testing.assert_close(torch.from_numpy(probabilities).float(), loaded(images(3)).softmax(1))


@pytest.mark.parametrize("name", pretrained.FILES)
def test_a_missing_file_says_what_to_download_and_where(name, tmp_path):
    folder = stand_ins.image_classifier(tmp_path / "published")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"published/{name}: no such file; download .*someone/model into"):
        classifiers.make(settings(folder), **SHAPE)


def test_unfit_and_damaged_folders_are_refused(tmp_path):
    folder = stand_ins.image_classifier(tmp_path / "published")
    with pytest.raises(ValueError, match="published: the model has 5 classes, the data have 1000; download .*someone"):
        classifiers.make(settings(folder), **SHAPE | {"classes": 1000})
    with pytest.raises(ValueError, match="3 channels, the data have 1; set class_data.channels"):
        classifiers.make(settings(folder), **SHAPE | {"channels": 1})
    with pytest.raises(ValueError, match="published: .*weights of a ResNetForImageClassification are missing"):
        classifiers.make(settings(stand_ins.resnet18(tmp_path / "headless" / "published")), **SHAPE)
    for stated, message in (({"resample": 1}, "resample 1 is not known here"),
                            ({"size": {"height": 2, "width": 3}}, "not that of a square"),
                            ({"size": 8, "do_center_crop": True, "crop_size": 9}, "a crop of 9 pixels")):
        state_preprocessing(folder, **stated)
        with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{message}"):
            classifiers.make(settings(folder), **SHAPE)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="published: not a .* that can be read .*download it again"):
        classifiers.make(settings(folder), **SHAPE)


def test_weights_under_other_names_fill_the_same_network(tmp_path):
    torch.manual_seed(1)
    network = classifiers.make(SMALL, **SHAPE).train()
    network(torch.randn(4, 3, 64, 64))  # statistics of batch normalisation that are not the initial ones
    torch.save(published_names(network), tmp_path / "net.pth")
    asked = {"kind": "torchvision", "file": str(tmp_path / "net.pth"), "network": SMALL}
    model = classifiers.make(asked, **SHAPE).eval()
    assert (model.side, model.resized) == (224, 256)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.network(x), network.eval()(x), rtol=0, atol=0)


def test_missing_damaged_and_other_weights_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    asked = {"kind": "torchvision", "file": str(path), "network": SMALL}
    with pytest.raises(FileNotFoundError, match="net.pth: no such file; download net.pth of download.pytorch.org"):
        classifiers.make(asked, **SHAPE)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="net.pth: not a file of weights.*download net.pth again"):
        classifiers.make(asked, **SHAPE)
    torch.save(published_names(classifiers.make(SMALL, **SHAPE)), path)
    with pytest.raises(ValueError, match="weights of another network .*'weight': \\(5, 32\\).* is .*\\(6, 32\\)"):
        classifiers.make(asked, **SHAPE | {"classes": 6})
    with pytest.raises(ValueError, match="weights of another network"):
        classifiers.make(asked | {"network": SMALL | {"blocks": 2}}, **SHAPE)


def test_torchvision_answers_the_same(tmp_path):
    models = pytest.importorskip("torchvision.models")
    grouped = {"kind": "resnet", "blocks": 1, "bottleneck": True, "groups": 4, "inner": 2}
    torch.manual_seed(0)
    pairs = {"resnet": (models.resnet.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4,
                                             width_per_group=32), grouped),
             "alexnet": (models.alexnet(num_classes=5), {"kind": "alexnet"})}
    for name, (theirs, network) in pairs.items():
        with torch.no_grad():
            theirs.train()(torch.randn(4, 3, 224, 224))
        torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
        asked = {"kind": "torchvision", "file": str(tmp_path / f"{name}.pth"), "network": network}
        ours, x = classifiers.make(asked, **SHAPE).eval(), torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(ours.network(x), theirs.eval()(x), atol=1e-5, rtol=1e-4)
