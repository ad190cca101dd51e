"""Text targets: attribute words that compose, and CLIP's text tower from a folder with tiny weights."""

import pytest
import torch

from dive_lib import text_targets
from dive_lib.text_targets import AttributeWords, ClipText
from tests import stand_ins


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stand_ins.clip_text(tmp_path_factory.mktemp("clip") / "clip")


def test_attribute_words_compose():
    words = AttributeWords(128)
    red_three, blue_three, red_four, blue_five = words.encode(["red three", "blue three", "red four", "blue five"])
    assert red_three @ blue_three > 0.3 and red_three @ red_four > 0.3 and abs(red_three @ blue_five) < 0.3
    torch.testing.assert_close(words.encode(["Three  red"])[0], red_three)
    assert words.encode(["anything at all"]).norm().item() == pytest.approx(1)


def test_attribute_words_do_not_depend_on_the_list():
    words = AttributeWords(32)
    assert torch.equal(words.encode(["one", "two"])[1], words.encode(["two"])[0])
    assert not torch.equal(words.encode(["two"]), AttributeWords(32, seed=1).encode(["two"]))
    with pytest.raises(ValueError, match="class name ' '"):
        words.encode(["one", " "])


@pytest.mark.parametrize("pooling, width", [("projected", 12), ("last_state", 16)])
def test_clip_gives_unit_vectors(folder, pooling, width):
    clip = ClipText(folder, pooling=pooling)
    vectors = clip.encode(["red three", "cat", "a much longer name than the others"])
    assert clip.width == width and vectors.shape == (3, width) and not vectors.requires_grad
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert torch.equal(clip.encode(["cat"])[0], vectors[1]) and not torch.allclose(vectors[0], vectors[1])


def test_clip_takes_the_end_of_the_text(folder):
    clip = ClipText(folder, ("{}",), pooling="last_state")
    tokens = clip.tokenizer(["cat"], padding="max_length", return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 77)
    with torch.no_grad():
        hidden = clip.model(**tokens).last_hidden_state[0]
    end = tokens["input_ids"][0].tolist().index(clip.tokenizer.eos_token_id)
    assert end == 4, "start, three letters, end"
    torch.testing.assert_close(clip.encode(["cat"])[0], torch.nn.functional.normalize(hidden[end], dim=0))


def test_clip_averages_its_templates(folder):
    clip = ClipText(folder, ("a {}", "the {}."))
    with torch.no_grad():  # the published program averages vectors before it brings them to unit length
        vectors = torch.stack([clip.model(**clip.tokenizer([text], padding="max_length", return_tensors="pt")
                                          ).text_embeds[0] for text in ("a cat", "the cat.")])
    assert (vectors.norm(dim=1).diff().abs() > 1e-3).all()
    torch.testing.assert_close(clip.encode(["cat"])[0], torch.nn.functional.normalize(vectors.mean(0), dim=0))
    assert torch.equal(clip.encode(["cat"], ["so {}"]), ClipText(folder, ("so {}",)).encode(["cat"]))
    assert len(text_targets.SEGMENTATION) == 14 and all("{}" in t for t in text_targets.SEGMENTATION)
    assert ClipText(folder, ("a {}",)).identity != ClipText(folder, ("the {}",)).identity


@pytest.mark.parametrize("name", text_targets.CLIP_FILES)
def test_a_missing_file_says_what_to_download_and_where(name, tmp_path):
    folder = stand_ins.clip_text(tmp_path / "clip")
    (folder / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=f"clip/{name}: no such file; download .*{text_targets.CLIP_SOURCE}"):
        ClipText(folder)


def test_damage_and_unknown_poolings_are_refused(tmp_path):
    folder = stand_ins.clip_text(tmp_path / "clip")
    with pytest.raises(ValueError, match="pooling 'pooler_output' is unknown; choose one of projected, last_state"):
        ClipText(folder, pooling="pooler_output")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a CLIPTextModelWithProjection.*download it again"):
        ClipText(folder)
