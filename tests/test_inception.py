"""The Inception network in its published form, and the choice of the network whose features are read."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dive_lib import checkpoint, classifiers, generation_quality, inception
from dive_lib.denoisers import in_format_of

NAME = "pt_inception-2015-12-05-6726825d.pth"


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """Drawn weights under the names of the published file: with a bias of the last layer, without counters."""
    torch.manual_seed(seed)
    state = inception.Inception().state_dict()
    named = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    for name, tensor in named.items():
        if name.endswith("conv.weight"):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)  # keeps what the image says through all layers
        elif name.endswith(("bn.running_mean", "bn.bias")):
            tensor.normal_(std=0.1)
    return named | {"fc.bias": torch.randn(1008)}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / NAME
    torch.save(published(), path)
    return path


def images(channels=3, side=20, count=3):
    noise = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return noise * torch.linspace(0.2, 1, count)[:, None, None, None]


def test_it_is_inception_v3_with_its_names():
    with torch.device("meta"):
        network = inception.Inception()
    parameters = dict(network.named_parameters())
    assert sum(p.numel() for name, p in parameters.items() if not name.startswith("fc")) == 21_785_568
    for name, shape in {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch1x1.bn.weight": (64,),
                        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
                        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
                        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
                        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
                        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1), "fc.weight": (1008, 2048)}.items():
        assert tuple(parameters[name].shape) == shape, name
    assert len(parameters) == 94 * 3 + 1


def test_averages_leave_out_the_padding_and_the_last_block_takes_the_maximum():
    network = inception.Inception()
    ones, corner = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    corner[0, 0, 0, 0] = 1
    for name, block in network.named_children():
        if name[:7] in ("Mixed_5", "Mixed_7") or name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            pooled = block.pooling(ones)
            assert torch.equal(pooled, torch.ones_like(pooled)), name
    assert network.Mixed_7b.pooling(corner)[0, 0, 1, 1] == pytest.approx(1 / 9)
    assert network.Mixed_7c.pooling(corner)[0, 0, 1, 1] == 1


def test_features_and_probabilities_of_images_of_any_size(file, tmp_path):
    network, name = inception.choose(str(file), tmp_path / "not needed")
    assert name == "Inception-v3, 3 x 299 x 299, 1008 classes"
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    features, probabilities = generation_quality.read_images(network, images(), batch=2)
    assert features.shape == (3, 2048) and probabilities.shape == (3, 1008)
    assert features.std(0).mean() > 1e-2, "the features depend on the image"
    large = F.interpolate(images(), (299, 299), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(generation_quality.read_images(network, large)[0], features, atol=1e-5)
    without_bias = torch.from_numpy(features).float() @ torch.load(file, weights_only=True)["fc.weight"].T
    np.testing.assert_allclose(without_bias.softmax(1).numpy(), probabilities, rtol=1e-3)
    grey = images(channels=1)
    coloured = generation_quality.read_images(network, grey.expand(-1, 3, -1, -1))[0]
    np.testing.assert_allclose(generation_quality.read_images(network, grey)[0], coloured, atol=1e-6)


def test_without_a_file_the_own_classifier_gets_images_in_its_format(tmp_path):
    torch.manual_seed(0)
    settings = {"kind": "resnet", "widths": [8, 12], "blocks": 1, "stem": "pixels"}
    shape = {"channels": 1, "classes": 5, "image_size": 8}
    checkpoint.save_model(tmp_path / "resnet", classifiers.make(settings, **shape), settings | shape)
    network, name = inception.choose("", tmp_path / "resnet")
    assert name == "resnet, 1 x 8 x 8, 5 classes" and not network.training
    own = classifiers.load(tmp_path / "resnet")
    for given in (images(1, 8), images(3, 16)):
        expected = generation_quality.read_images(own, in_format_of(given, 1, 8))
        for found, wanted in zip(generation_quality.read_images(network, given), expected):
            np.testing.assert_array_equal(found, wanted)
    with pytest.raises(FileNotFoundError, match="run the notebook that trains 'nowhere' first"):
        inception.choose("", tmp_path / "nowhere")


def test_safetensors_hold_the_same_network(file, tmp_path):
    weights = torch.load(file, weights_only=True)
    checkpoint.save_tensors(tmp_path / "inception.safetensors", weights)
    one, other = inception.load(file).state_dict(), inception.load(tmp_path / "inception.safetensors").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_missing_damaged_and_other_files_are_refused(tmp_path):
    path = tmp_path / "checkpoints" / NAME
    with pytest.raises(FileNotFoundError, match=f"checkpoints/{NAME}: no such file; download {NAME} of "
                                                "github.com/mseitzer/pytorch-fid/releases.* into .*checkpoints"):
        inception.choose(str(path), tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=f"{NAME}: not a file of weights that can be read; download {NAME} again"):
        inception.load(path)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ValueError, match=f"{NAME}: weights of another network \\(Conv2d_1a_3x3.conv.weight is absent"):
        inception.load(path)


def test_torchvisions_inception_pooled_as_published_answers_the_same(tmp_path, monkeypatch):
    """pytorch-fid's network is torchvision's with other poolings."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed, nor needed by anything "
                                 "else")
    theirs = models.inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    poolings = SimpleNamespace(relu=F.relu, max_pool2d=F.max_pool2d,
                               avg_pool2d=partial(F.avg_pool2d, count_include_pad=False))
    monkeypatch.setattr(models.inception, "F", poolings)
    theirs.Mixed_7c.register_forward_pre_hook(
        lambda *given: setattr(poolings, "avg_pool2d", F.max_pool2d))
    torch.save(theirs.state_dict() | published(2), tmp_path / NAME)
    theirs.load_state_dict(theirs.state_dict() | published(2))
    ours, x = inception.load(tmp_path / NAME), images(side=299, count=2)
    theirs.fc.bias.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
