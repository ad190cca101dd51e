"""How intervals and backbones are worded."""

import matplotlib.pyplot as plt

from dive_lib.wording import alternative_text, brief, in_words, interval, spelt, standing


def test_backbones_are_named_in_words():
    assert in_words("backbone untrained_dit") == "backbone untrained DiT"
    assert in_words("with expert untrained_numbers_resnet") == "with expert untrained ResNet of numbers"
    assert in_words("conditions, raw: pixels of dinov2, dino") == \
        "conditions, raw: raw pixels of DINOv2, DINO"


def test_an_interval_has_as_many_digits_as_asked_for():
    assert interval([63.66, 68.34]) == "[63.7, 68.3]" and interval((-0.051, 0.449, 1), 2) == "[-0.05, 0.45, 1.00]"


def test_only_an_interval_without_zero_is_a_difference():
    assert [standing(ends) for ends in ([-2, -1], [-2, 0], [-1, 1], [0, 1], [0.1, 2])] == \
        ["below", "level with", "level with", "level with", "above"]
    assert standing([1, 2], ("less", "as much", "more")) == "more"


def test_keys_are_spelt_in_words():
    assert spelt("moved_16px") == "moved 16 px" and spelt("null_class") == "null class"


def test_a_figure_is_told_by_its_texts():
    figure, (left, right) = plt.subplots(1, 2)
    plt.close(figure)
    left.set(title="cost", xlabel="steps", ylabel="loss,\npercent")
    right.set(title="cost", xlabel="$x$")
    right.plot([1], label="DIVE")
    right.legend()
    assert alternative_text(figure) == "cost; steps; loss, percent; x; DIVE"
    assert alternative_text(figure, most=15) == "cost; steps ..."
    scheme, axis = plt.subplots()
    plt.close(scheme)
    axis.text(0, 0, "encoder\n$\\mathrm{NN}(v_\\theta)$")
    assert alternative_text(scheme) == "encoder NN(v_theta)"


def test_long_names_are_cut_and_lose_the_id_before_their_words():
    assert brief("n01440764 tench", 10) == "tench"
    assert brief("n02098105 soft-coated wheaten terrier", 12) == "soft-coated\u2026"
    assert brief("n01440764", 20) == "n01440764" and brief("step 35", 7) == "step 35"
