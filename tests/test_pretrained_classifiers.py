"""Published classifiers from tiny stand-ins of their files: preprocessing, answers, and what wrong files are told."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dive_lib import classifiers, generation_quality, parameters, pretrained_classifiers as pretrained
from dive_lib.train import TrainingConfig
from tests import torchvision_stand_ins as published
from tests.torchvision_stand_ins import drawn

SHAPE = {"channels": 3, "classes": 5, "image_size": 48}
SMALL = {"kind": "resnet", "widths": [4, 8], "blocks": 1, "bottleneck": True, "groups": 2, "inner": 2}
VIT = {"patch": 56, "width": 16, "layers": 2, "heads": 2}
SWIN = {"patch": 8, "width": 8, "depths": [2, 3], "heads": [1, 2], "window": 7}


def images(count=2, side=48):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def published_names(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under other names, as an old file has them: statistics first and without counters."""
    state = {}
    for number, (name, module) in enumerate(network.named_modules()):
        own = module.state_dict() if not list(module.children()) else {}
        old = sorted(own, key=lambda key: not key.startswith("running"))
        state |= {f"layer{number}.{key}": own[key] for key in old if key != "num_batches_tracked"}
    return state


def settings(path, network: dict, weights) -> dict:
    """Of a network whose weights are written to `path`."""
    torch.save(weights, path)
    return {"kind": "torchvision", "file": str(path), "network": network}


@pytest.fixture
def small(tmp_path):
    return settings(tmp_path / "net.pth", SMALL, published_names(drawn(classifiers.make(SMALL, **SHAPE))))


def test_reads_the_images_of_the_data(small):
    model = classifiers.make(small, **SHAPE).eval()
    pixels = F.interpolate((images() + 1) / 2, (256, 256), mode="bilinear", antialias=True)[:, :, 16:240, 16:240]
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(model(images()), model.network((pixels - mean) / std))
        assert model(images()).shape == (2, 5)


@pytest.mark.parametrize("resized, mode, resample", [(256, "bilinear", Image.BILINEAR),
                                                     (238, "bicubic", Image.BICUBIC)])
def test_preprocessing_is_torchvisions_of_pillow_images(resized, mode, resample):
    model = pretrained.PretrainedClassifier(nn.Identity(), resized=resized, mode=mode)
    smooth = F.interpolate(images(1, 6), (300, 300), mode="bicubic").clamp(-1, 1)
    pixels = ((smooth + 1) * 127.5).round().byte()
    resized_image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((resized, resized), resample)
    start = round((resized - 224) / 2)
    theirs = np.asarray(resized_image.crop((start, start, start + 224, start + 224)), dtype=np.float32) / 255
    theirs = (theirs - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    ours = model(pixels.float() / 127.5 - 1)[0].permute(1, 2, 0)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2 / 255 / 0.224)  # Pillow rounds to bytes


def test_the_networks_of_the_paper_are_preprocessed_as_torchvision_states():
    networks = parameters.named("architectures", "classifiers", "paper")
    stated = {name: (of.get("resized", 256), of.get("mode", "bilinear")) for name, of in networks.items()
              if of["kind"] == "torchvision"}
    assert stated.pop("swin") == (238, "bicubic")
    assert len(stated) == 6 and set(stated.values()) == {(256, "bilinear")}
    with pytest.raises(ValueError, match="at least 224 pixels by bilinear or bicubic, got 200 and 'bilinear'"):
        pretrained.PretrainedClassifier(nn.Identity(), resized=200)
    with pytest.raises(ValueError, match="got 256 and 'nearest'"):
        pretrained.PretrainedClassifier(nn.Identity(), mode="nearest")


def test_is_kept_by_name_and_neither_trained_nor_copied(small, tmp_path):
    def take(index):
        raise AssertionError("nothing is trained")

    config = TrainingConfig(steps=3, lr=0.1, batch_size=2)
    model = classifiers.fit(small, SHAPE, take, torch.zeros(2), config, directory=tmp_path / "resnet", identity="data",
                            shift=1)
    assert [path.name for path in (tmp_path / "resnet").iterdir()] == ["config.json"]
    loaded = classifiers.load(tmp_path / "resnet")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded(images()), model(images()), rtol=0, atol=0)
    features, probabilities = generation_quality.read_images(loaded, images(3), batch=2)
    assert features.shape == (3, 32) and probabilities.shape == (3, 5)
    torch.testing.assert_close(torch.from_numpy(probabilities).float(), loaded(images(3)).softmax(1))


def test_weights_under_other_names_fill_the_same_network(small):
    network = drawn(classifiers.make(SMALL, **SHAPE))
    model, x = classifiers.make(small, **SHAPE).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.network(x), network(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind, theirs, shape", [("vit_class_token", published.Vit, VIT),
                                                 ("swin", published.Swin, SWIN)])
def test_transformers_answer_as_under_torchvisions_names(kind, theirs, shape, tmp_path):
    theirs = drawn(theirs(5, **shape))
    asked = settings(tmp_path / "net.pth", {"kind": kind, **shape}, theirs.state_dict())
    ours, x = classifiers.make(asked, **SHAPE).eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std(0).max() > 1e-3, "the answers depend on the image"
        torch.testing.assert_close(ours.network(x), expected, atol=1e-4, rtol=1e-4)
    own, other = ({norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} for model in (ours, theirs))
    assert own == other
    features, _ = generation_quality.read_images(ours, images(2))
    assert features.shape == (2, 16)


def test_missing_damaged_and_other_weights_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    asked = {"kind": "torchvision", "file": str(path), "network": SMALL}
    with pytest.raises(FileNotFoundError, match="net.pth: no such file; download net.pth of download.pytorch.org"):
        classifiers.make(asked, **SHAPE)
    with pytest.raises(FileNotFoundError, match="net.pth: no such file; download net.pth of download.pytorch.org"):
        pretrained.require({"trained": {"kind": "resnet"}, "published": asked})
    path.write_bytes(b"no weights")
    pretrained.require({"trained": {"kind": "resnet"}, "published": asked})
    with pytest.raises(ValueError, match="net.pth: not a file of weights.*download net.pth again"):
        classifiers.make(asked, **SHAPE)
    settings(path, SMALL, {"epoch": 3})
    with pytest.raises(ValueError, match="net.pth: not a file of weights"):
        classifiers.make(asked, **SHAPE)
    settings(path, SMALL, published_names(classifiers.make(SMALL, **SHAPE)))
    with pytest.raises(ValueError, match=r"weights of another network \(.*weight is \(5, 32\), not \(6, 32\)\)"):
        classifiers.make(asked, **SHAPE | {"classes": 6})
    with pytest.raises(ValueError, match="weights of another network .* layers, not"):
        classifiers.make(asked | {"network": SMALL | {"blocks": 2}}, **SHAPE)
    with pytest.raises(ValueError, match="net.safetensors: torchvision's files are .pth"):
        classifiers.make(asked | {"file": str(tmp_path / "net.safetensors")}, **SHAPE)


@pytest.mark.parametrize("kind, theirs, shape", [("vit_class_token", published.Vit, VIT),
                                                 ("swin", published.Swin, SWIN)])
def test_other_transformers_are_refused(kind, theirs, shape, tmp_path):
    state = theirs(5, **shape).state_dict()
    asked = settings(tmp_path / "net.pth", {"kind": kind, **shape}, state)
    with pytest.raises(ValueError, match=r"network.classifier.weight is \(5, 16\), not \(7, 16\)"):
        classifiers.make(asked, **SHAPE | {"classes": 7})
    settings(tmp_path / "net.pth", {}, dict(list(state.items())[:-1]))
    with pytest.raises(ValueError, match=r"network.classifier.bias is absent, not \(5,\)"):
        classifiers.make(asked, **SHAPE)
    settings(tmp_path / "net.pth", {}, state | {"more": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"network.more is \(3,\), not absent"):
        classifiers.make(asked, **SHAPE)


@pytest.mark.parametrize("name", ["resnet18", "resnext", "alexnet", "vit", "swin"])
def test_torchvision_answers_the_same(name, tmp_path):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed, nor needed by anything "
                                 "else; its stand-ins are compared above")
    make, network = {
        "resnet18": (lambda: models.resnet.ResNet(models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=5),
                     {"kind": "resnet"}),
        "resnext": (lambda: models.resnet.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4,
                                                 width_per_group=32),
                    {"kind": "resnet", "blocks": 1, "bottleneck": True, "groups": 4, "inner": 2}),
        "alexnet": (lambda: models.alexnet(num_classes=5), {"kind": "alexnet"}),
        "vit": (lambda: models.VisionTransformer(224, 56, 2, 2, 16, 64, num_classes=5),
                {"kind": "vit_class_token"} | VIT),
        "swin": (lambda: models.SwinTransformer([8, 8], 8, [2, 3], [1, 2], [7, 7], num_classes=5),
                 {"kind": "swin"} | SWIN),
    }[name]
    theirs = make()
    if name in ("vit", "swin"):
        drawn(theirs)
    else:
        with torch.no_grad():
            theirs.train()(torch.randn(4, 3, 224, 224))  # statistics that are not the initial ones
    asked = settings(tmp_path / "net.pth", network, theirs.state_dict())
    ours, x = classifiers.make(asked, **SHAPE).eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours.network(x), theirs.eval()(x), atol=1e-4, rtol=1e-4)
