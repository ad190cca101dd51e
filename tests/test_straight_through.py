"""The nearest vocabulary entry, and half objects."""

import pytest
import torch

from dive_lib.straight_through import legal_objects, nearest_rows, nearest_tokens, open_illegal_pairs
from tests.tiny import GRID, layout_ldm, layouts


def test_vocabulary_entries_are_their_own_nearest_neighbours():
    vocabulary = layout_ldm().vocabulary
    tokens = layouts()
    for metric in ("cosine", "l2"):
        assert torch.equal(nearest_tokens(vocabulary(tokens), vocabulary, metric), tokens)


def test_metrics_differ_where_lengths_do():
    table = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    v = torch.tensor([[1.0, 0.9]])
    assert nearest_rows(v, table, "cosine").item() == 1 and nearest_rows(v, table, "l2").item() == 0
    with pytest.raises(ValueError, match="dot"):
        nearest_rows(v, table, "dot")


def test_none_can_be_excluded():
    vocabulary = layout_ldm().vocabulary
    empty = vocabulary(GRID.empty(2))
    assert (nearest_tokens(empty, vocabulary, exclude_none=True) != GRID.none_tokens).all()


def test_half_objects_are_completed_or_emptied_and_illegal_ones_emptied():
    vocabulary = layout_ldm().vocabulary
    tokens = layouts()[:1].clone()
    tokens[0, 0, 0] = GRID.none_tokens[0]
    tokens[0, 1, 1:4] = GRID.none_tokens[1]
    tokens[0, 2] = torch.tensor([0, 3, 0, 3, 2])
    legal = legal_objects(tokens, vocabulary(tokens), vocabulary)
    assert torch.equal(legal[0, 0, 1:], tokens[0, 0, 1:]) and legal[0, 0, 0] != GRID.none_tokens[0]
    assert torch.equal(legal[0, 1], GRID.none_tokens) and torch.equal(legal[0, 2], GRID.none_tokens)


def test_illegal_boxes_are_opened_along_their_axis():
    none = GRID.none_tokens
    tokens = torch.tensor([[[0, 3, 0, 3, 2], [1, 0, 4, 2, 1], [0, 1, 1, 2, 2], [0, 3, 1, none[3], 2]]])
    opened = open_illegal_pairs(tokens, none)
    assert opened[0, 0].tolist() == [0, none[1], 0, none[3], 2]
    assert opened[0, 1].tolist() == [1, 0, none[2], 2, none[4]]
    assert torch.equal(opened[0, 2:], tokens[0, 2:]), "legal and half boxes stay"
