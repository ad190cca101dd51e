"""Prompts, and BLIP from a folder with tiny weights."""

import pytest
import torch

from dive_lib import captions
from dive_lib.captions import Captioner, prompts
from tests import stand_ins


def images(count=3):
    return torch.rand(count, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return Captioner(stand_ins.blip(tmp_path_factory.mktemp("blip") / "blip"), side=48)


def test_captions_are_texts_without_the_prompt(captioner):
    texts = captioner.captions(images())
    assert len(texts) == 3 and all(isinstance(text, str) and not text.startswith("a picture of") for text in texts)
    assert texts == captioner.captions(images()) and texts[1:2] == captioner.captions(images()[1:2])


def test_lengths_and_greedy_decoding_are_the_published_ones(captioner, monkeypatch):
    asked, original = {}, captioner.model.generate
    monkeypatch.setattr(captioner.model, "generate", lambda *a, **k: asked.update(k) or original(*a, **k))
    captioner.captions(images(1))
    assert (asked["num_beams"], asked["do_sample"], asked["min_length"], asked["max_length"]) == (1, False, 5, 10)
    assert captioner.tokenizer.decode(asked["input_ids"][0], skip_special_tokens=True) == captions.PROMPT.strip()
    assert Captioner(captioner.directory).side == 256


def test_prompts_of_every_kind(captioner):
    assert prompts("empty", images(2)) == ["", ""] and prompts("constant", images(1)) == ["a photo of"]
    assert prompts("blip", images(), captioner=captioner) == captioner.captions(images())
    assert prompts("true_class", images(2), names=["cat", "dog"]) == ["a photo of a cat", "a photo of a dog"]
    assert captions.LEAKS == ("true_class",)


@pytest.mark.parametrize("kind, message", [
    ("random", "prompt kind 'random' is unknown; choose one of empty"), ("blip", "needs a captioner"),
    ("true_class", "class of each of the 3 images, got 0")])
def test_what_a_prompt_lacks_is_named(kind, message):
    with pytest.raises(ValueError, match=message):
        prompts(kind, images())


@pytest.mark.parametrize("name", captions.FILES)
def test_a_missing_file_says_what_to_download_and_where(name, tmp_path):
    folder = stand_ins.blip(tmp_path / "blip")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"blip/{name}: no such file; download .*{captions.SOURCE} into"):
        Captioner(folder)


def test_damage_is_refused(tmp_path):
    folder = stand_ins.blip(tmp_path / "blip")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a BlipForConditionalGeneration.*download it again"):
        Captioner(folder)
