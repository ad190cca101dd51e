"""Layouts as tokens: what survives the grid, what is dropped, what is refused."""

import pytest
import torch

from dive_lib.layout import LayoutGrid, drop_fields, shuffle_slots
from tests.tiny import GRID


def test_boxes_survive_tokens():
    boxes, classes = torch.tensor([[4.0, 8, 28, 40], [32, 12, 60, 64]]), torch.tensor([2, 0])
    decoded = GRID.decode(GRID.encode(boxes, classes))
    assert torch.equal(decoded.boxes_xyxy, boxes) and torch.equal(decoded.class_ids, classes)
    assert decoded.dropped == []


def test_one_bin_per_pixel_at_paper_size():
    grid = LayoutGrid(("a",), image_size=256, bins=257, slots=100)
    tokens = grid.encode(torch.tensor([[0.2, 10.6, 255.9, 256.0]]), torch.tensor([0]))
    assert tokens[0].tolist() == [0, 0, 11, 256, 256]
    assert tokens.shape == (100, 5) and (tokens[1:] == grid.none_tokens).all()


def test_thin_boxes_stay_legal():
    tokens = GRID.encode(torch.tensor([[63.5, 0.1, 64.0, 0.4]]), torch.tensor([1]))
    assert len(GRID.decode(tokens)) == 1


def test_decode_drops_half_and_illegal_objects_and_says_why():
    none = GRID.none_tokens
    tokens = torch.stack([torch.tensor([1, 2, 3, 3, 9]), torch.tensor([1, 5, 3, 5, 9]),
                          torch.tensor([int(none[0]), 1, 1, 5, 5])])
    decoded = GRID.decode(tokens)
    assert decoded.slots.tolist() == [0]
    assert [(d["slot"], d["reason"]) for d in decoded.dropped] == [(1, "illegal"), (2, "none")]
    assert GRID.decode(GRID.empty(1)[0]).dropped == []


@pytest.mark.parametrize("boxes, message", [
    (torch.zeros(4, 4), "4 objects do not fit into 3 slots"),
    (torch.tensor([[0.0, 0, float("nan"), 4]]), "finite")])
def test_encode_refuses(boxes, message):
    with pytest.raises(ValueError, match=message):
        GRID.encode(boxes, torch.zeros(len(boxes), dtype=torch.long))


def test_shuffle_keeps_objects():
    tokens = torch.arange(2 * 6 * 5).view(2, 6, 5)
    shuffled = shuffle_slots(tokens, torch.Generator().manual_seed(0))
    assert not torch.equal(shuffled, tokens)
    assert torch.equal(shuffled.sort(1).values, tokens)


def test_field_dropout_rates():
    tokens = torch.zeros(4000, 3, 5, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(drop_fields(tokens, GRID, generator), tokens)
    none = drop_fields(tokens, GRID, generator, objects=0.2) == GRID.none_tokens
    assert abs(none.all(-1).float().mean() - 0.2) < 0.02 and torch.equal(none.all(-1), none.any(-1))
    none = drop_fields(tokens, GRID, generator, partial=0.5) == GRID.none_tokens
    assert abs(none.float().mean() - 0.25) < 0.02
    none = drop_fields(tokens, GRID, generator, layouts=0.1) == GRID.none_tokens
    assert abs(none.flatten(1).all(1).float().mean() - 0.1) < 0.02
