"""How intervals and backbones are worded."""

from dive_lib.wording import in_words, interval


def test_backbones_are_named_in_words():
    assert in_words("backbone untrained_dit") == "backbone untrained DiT"
    assert in_words("with expert untrained_numbers_resnet") == "with expert untrained ResNet of numbers"
    assert in_words("conditions, raw: pixels of dinov2, dino") == \
        "conditions, raw: raw pixels of DINOv2, DINO"


def test_an_interval_has_as_many_digits_as_asked_for():
    assert interval([63.66, 68.34]) == "[63.7, 68.3]" and interval((-0.051, 0.449, 1), 2) == "[-0.05, 0.45, 1.00]"
