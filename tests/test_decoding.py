"""decoding: images in threads come in their order, and the first damaged one is named."""

import threading

import pytest
import torch

from dive_lib import decoding


@pytest.fixture(autouse=True)
def four(monkeypatch):
    monkeypatch.setattr(decoding, "cores", lambda: 4)
    monkeypatch.setattr(decoding, "WORTH", 0.0)


def test_many_images_come_in_order_from_several_threads():
    used, meeting = set(), threading.Barrier(2, timeout=30)

    def load(i):
        if i in (1, 2):
            meeting.wait()  # two are at work at once
        if i:
            used.add(threading.get_ident())
        return torch.full((2,), float(i))

    assert decoding.stacked(load, torch.arange(40))[:, 0].tolist() == list(range(40))
    assert 2 <= len(used) <= 4 and threading.get_ident() not in used


def test_small_images_and_one_core_start_no_threads(monkeypatch):
    def load(i):
        assert threading.current_thread() is threading.main_thread()
        return torch.tensor(i)

    monkeypatch.setattr(decoding, "WORTH", 60.0)
    assert decoding.stacked(load, [3, 1, 2]).tolist() == [3, 1, 2]
    monkeypatch.setattr(decoding, "WORTH", 0.0)
    monkeypatch.setattr(decoding, "cores", lambda: 1)
    assert decoding.stacked(load, range(100)).tolist() == list(range(100))


def test_the_first_damaged_image_is_reported():
    def load(i):
        if i >= 20:
            raise ValueError(f"image {i}")
        return torch.tensor(i)

    with pytest.raises(ValueError, match="image 20"):
        decoding.stacked(load, range(64))
