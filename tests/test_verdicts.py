"""Sentences about differences fall the way the numbers do."""

import pytest

from dive_lib import verdicts


def row(low, middle, high):
    return {"difference": middle, "difference_ci95": [low, high]}


@pytest.mark.parametrize("low, middle, high, word, back", [
    (1.2, 3.74, 6.5, "more", "less"), (-6.5, -3.0, -1.2, "less", "more"), (-0.6, 4.2, 10.6, "open", "open"),
    (0.0, 0.0, 0.0, "open", "open")])
def test_a_difference_is_told_by_its_interval(low, middle, high, word, back):
    own = row(low, middle, high)
    assert verdicts.told(own) == word and verdicts.told(verdicts.turned(own)) == back
    assert verdicts.turned(verdicts.turned(own)) == own


def test_differences_are_worded():
    assert verdicts.difference(row(1.24, 3.74, 6.52)) == "+3.7 points [1.2, 6.5], more"
    assert verdicts.difference(row(-6.5, -3.0, -1.2), less="worse") == "-3.0 points [-6.5, -1.2], worse"
    assert verdicts.difference(row(-0.56, 4.18, 10.58)) == "+4.2 points [-0.6, 10.6], cannot be told from zero"


@pytest.mark.parametrize("value, ends, word", [
    (2.2, (2.0, 2.4), "reached"), (1.75, (1.6, 1.9), "missed"), (1.75, (1.6, 2.0), "below it"),
    (2.1, (1.9, 2.3), "above it")])
def test_targets(value, ends, word):
    assert verdicts.target(value, ends, 2).startswith(word)
