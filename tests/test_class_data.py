"""Numbers of digits, image folders in ImageNet's layout, and what is diffused of them."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dive_lib import class_data, glyphs, image_encoder, number_images, paths
from dive_lib.class_images import ClassFolderError, centre_crop, read_split, readable
from dive_lib.files import read_json

PER_CLASS = {"train": 2, "val": 1, "test": 1}
NAMES = {"train": "train", "val": "val", "test": "test"}
AUTOENCODER = {"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4,
               "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4, "mid_block_add_attention": False}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return glyphs.export(tmp_path_factory.mktemp("digits"))


def folder(root, classes=("n01", "n02"), images=3, size=(20, 14), split="val"):
    """A small colour folder; image k of class c is of the grey level 20 c + k."""
    for c, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for k in range(images):
            Image.new("RGB", size, (20 * c + k,) * 3).save(root / split / name / f"ILSVRC_{k}.JPEG")
    return root


def test_numbers_repeat_and_differ(digits):
    data, labels = glyphs.load(digits, "train")
    draws = [number_images.draw(37, data, labels, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert draws[0].shape == (16, 16) and draws[0].dtype == np.uint8
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()
    assert draws[0].max() > 150 and np.median(draws[0]) < 80


def test_the_two_halves_show_the_two_digits(digits):
    """With one glyph for each digit, 37 and 32 agree on the left, 37 and 97 on the right."""
    data, labels = glyphs.load(digits, "train")
    first = [int(np.flatnonzero(labels == d)[0]) for d in range(10)]
    data, labels = data[first], labels[first]
    a, b, c = (number_images.draw(n, data, labels, np.random.default_rng(3)).astype(int) for n in (37, 32, 97))
    assert abs(a[:, :8] - b[:, :8]).max() < 40 < abs(a[:, 8:] - b[:, 8:]).max()
    assert abs(a[:, 8:] - c[:, 8:]).max() < 40 < abs(a[:, :8] - c[:, :8]).max()


def test_a_split_is_written_once_and_read_back(digits, tmp_path):
    data, labels = glyphs.load(digits, "val")
    root = number_images.write_split(tmp_path, "val", data, labels, 2, seed=0).parent
    files = sorted(root.rglob("*.png"))
    assert len(files) == 200 and files[0].parent.name == "00" and files[-1].parent.name == "99"
    kept = files[5].read_bytes()
    files[5].unlink()
    stamp = files[6].stat().st_mtime_ns
    number_images.write_split(tmp_path, "val", data, labels, 2, seed=0)
    assert files[5].read_bytes() == kept and files[6].stat().st_mtime_ns == stamp
    images = read_split(root, "val", image_size=16, channels=1)
    assert images.classes == number_images.CLASSES and len(images) == 200
    pixels = np.asarray(Image.open(files[5]))
    assert torch.equal(((images.load_image(5)[0] + 1) * 127.5).round().byte(), torch.from_numpy(pixels.copy()))
    assert images.image_id(5) == "02-00001" and images.index_of("02-00001") == 5 and images.labels[5] == 2


def test_imagenets_folder_is_read_in_sorted_order_and_cropped(tmp_path):
    images = read_split(folder(tmp_path), "val", image_size=8, per_class=2)
    assert images.names == ["n01/ILSVRC_0.JPEG", "n01/ILSVRC_1.JPEG", "n02/ILSVRC_0.JPEG", "n02/ILSVRC_1.JPEG"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    batch = images.load_images([0, 3])
    assert batch.shape == (2, 3, 8, 8) and batch.min() >= -1 and batch.max() <= 1
    assert batch[1].mean().item() == pytest.approx(21 / 127.5 - 1, abs=0.02)
    later = read_split(tmp_path, "val", image_size=8, per_class=1, skip=2)
    assert later.names == ["n01/ILSVRC_2.JPEG", "n02/ILSVRC_2.JPEG"]


def test_the_crop_is_that_of_guided_diffusion():
    """A gradient of 70 x 40 at size 16: halved once, resized to a height of 16, its middle 16 columns kept."""
    ramp = Image.fromarray(np.tile(np.arange(70, dtype=np.uint8) * 3, (40, 1)))
    expected = ramp.resize((35, 20), Image.BOX).resize((28, 16), Image.BICUBIC)
    assert (centre_crop(ramp, 16) == np.asarray(expected)[:, 6:22]).all()
    assert (centre_crop(ramp.crop((0, 0, 40, 40)).resize((16, 16)), 16).shape) == (16, 16)


def test_wrong_folders_are_named_with_the_remedy(tmp_path):
    with pytest.raises(ClassFolderError, match="val: no such folder.*image-net.org"):
        read_split(tmp_path, "val", image_size=8)
    (tmp_path / "val").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / "a.png")
    with pytest.raises(ClassFolderError, match="1 images lie in it directly"):
        read_split(tmp_path, "val", image_size=8)
    folder(tmp_path, split="train")
    with pytest.raises(ClassFolderError, match="n01: 3 images, but 4 are needed"):
        read_split(tmp_path, "train", image_size=8, per_class=4)
    with pytest.raises(ClassFolderError, match="differ in n03"):
        read_split(tmp_path, "train", image_size=8, classes=("n01", "n02", "n03"))
    (tmp_path / "train" / "n02" / "ILSVRC_1.JPEG").write_bytes(b"no image")
    with pytest.raises(ClassFolderError, match="n02/ILSVRC_1.JPEG: cannot be decoded"):
        read_split(tmp_path, "train", image_size=8).check("train")


def test_profile_data_are_described_and_loaded(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(paths, "data", lambda: digits)
    root = class_data.make_numbers(tmp_path / "numbers", PER_CLASS, seed=0)
    made = class_data.describe("smoke", root, NAMES, image_size=16, channels=1, per_class=PER_CLASS, encoder="")
    loaded = class_data.load("smoke")
    assert loaded.classes == number_images.CLASSES and len(loaded.train) == 200 and loaded.digests == made.digests
    assert loaded.ids("test") == [f"{c:02d}-00000" for c in range(100)]
    latents = class_data.encode(loaded.load_encoder(), loaded.test, [3, 5], batch=1)
    assert torch.equal(latents, loaded.test.load_images([3, 5]))
    with pytest.raises(FileNotFoundError, match="09_class_data"):
        class_data.load("mini")


def test_classes_have_names_for_people_where_a_file_has_them(tmp_path):
    folder(tmp_path)
    settings = {"image_size": 14, "channels": 3, "per_class": {"train": 1, "val": 1, "test": 1}, "encoder": ""}
    splits = {"train": "val", "val": "val", "test": "val"}
    assert class_data.describe("smoke", tmp_path, splits, **settings).classes == ("n01", "n02")
    (tmp_path / "classnames.txt").write_text("\ufeffn02\twok\nn01 beer bottle/glass\nn03 tench\n n04 \n\n")
    assert class_data.load("smoke").classes == ("n01", "n02"), "as described, whatever came later"
    class_data.describe("smoke", tmp_path, splits, **settings)
    assert class_data.load("smoke").classes == ("n01 beer bottle or glass", "n02 wok")
    (tmp_path / "classnames.txt").write_text("n02 wok\n")
    with pytest.raises(ClassFolderError, match='classnames.txt: 1 of 2 classes have no line, such as n01; add'):
        class_data.describe("smoke", tmp_path, splits, **settings)
    assert readable(("a", "b"), tmp_path / "none.txt") == ("a", "b")


def test_where_one_split_serves_twice_tuning_never_sees_test_images(tmp_path):
    folder(tmp_path, split="train", images=2), folder(tmp_path, images=4)
    data = class_data.describe("paper", tmp_path, NAMES | {"test": "val"}, image_size=8, channels=3,
                               per_class={"train": 0, "val": 2, "test": 2}, encoder="")
    assert data.test.names[:2] == ["n01/ILSVRC_0.JPEG", "n01/ILSVRC_1.JPEG"], "DIVE's subset: the first two"
    assert not set(data.test.names) & set(data.val.names) and len(data.val) == 4 and len(data.train) == 4


def test_the_papers_encoder_is_the_scaled_posterior_mean(tmp_path):
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(**AUTOENCODER).eval()
    autoencoder.save_pretrained(tmp_path / "vae")
    encoder = image_encoder.load(tmp_path / "vae")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, deviation = autoencoder.quant_conv(autoencoder.encoder(images)).chunk(2, dim=1)
    assert deviation.shape == mean.shape
    torch.testing.assert_close(encoder.encode(images), mean * 0.18215)
    torch.testing.assert_close(encoder.decode(mean * 0.18215), autoencoder.decode(mean).sample)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert image_encoder.fingerprint(tmp_path / "vae") != image_encoder.fingerprint("") == "pixels"


def test_a_missing_or_damaged_encoder_says_what_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: no such file; download .*sd-vae-ft-ema"):
        image_encoder.load(tmp_path / "vae")
    AutoencoderKL(**AUTOENCODER).save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="vae: not an AutoencoderKL or VQModel that can be read"):
        image_encoder.load(tmp_path / "vae")
    assert "_class_name" in read_json(tmp_path / "vae" / "config.json")
