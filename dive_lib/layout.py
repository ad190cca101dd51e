"""Layouts as token sequences: five tokens per object, padded with [none].

An object is (class, x1, y1, x2, y2). The four coordinates are integers on a regular grid of `bins` values that
spans the square model input, so a vocabulary holds one entry per coordinate value (DIVE IV-A1: "object
coordinates are kept in integer precision"). Every vocabulary has one more entry, [none], as its last index; slots
without an object are [none] in all five tokens.
"""

from dataclasses import asdict, dataclass

import torch

FIELDS = ("class", "x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class LayoutGrid:
    """What the token indices mean.

    classes: class names, index = class token. image_size: side of the square model input in pixels.
    bins: number of coordinate values; value k stands for the pixel coordinate k * image_size / (bins - 1).
    slots: number of objects a sequence holds.
    """

    classes: tuple[str, ...]
    image_size: int
    bins: int
    slots: int

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.bins < 2 or self.slots < 1 or not self.classes:
            raise ValueError(f"a layout grid needs >= 2 bins, >= 1 slot and >= 1 class, got {self}")

    @property
    def vocabulary_sizes(self) -> tuple[int, ...]:
        """Entries per field without [none]; the index of [none] in that field is the same number."""
        return (len(self.classes),) + (self.bins,) * 4

    @property
    def none_tokens(self) -> torch.Tensor:
        """(5,) the all-[none] object."""
        return torch.tensor(self.vocabulary_sizes)

    @property
    def pixels_per_bin(self) -> float:
        return self.image_size / (self.bins - 1)

    def empty(self, batch: int) -> torch.Tensor:
        """(batch, slots, 5) layouts without objects: Algorithm 1's initial state."""
        return self.none_tokens.expand(batch, self.slots, 5).clone()

    def encode(self, boxes_xyxy: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """Boxes (n, 4) in pixels of the model input and classes (n,) to tokens (slots, 5).

        A box narrower than one bin is widened to one bin, so that no object of the data becomes illegal by
        rounding. Raises ValueError for more objects than slots and for non-finite coordinates.
        """
        n = len(class_ids)
        if n > self.slots:
            raise ValueError(f"{n} objects do not fit into {self.slots} slots; draw at most {self.slots}")
        tokens = self.empty(1)[0]
        if n == 0:
            return tokens
        if not torch.isfinite(boxes_xyxy).all():
            raise ValueError("box coordinates must be finite numbers")
        corners = (boxes_xyxy / self.pixels_per_bin).round().long().clamp(0, self.bins - 1)
        low = torch.minimum(corners[:, :2], torch.tensor(self.bins - 2))
        high = torch.maximum(corners[:, 2:], low + 1)
        tokens[:n] = torch.cat([class_ids.long()[:, None], low, high], dim=1)
        return tokens

    def decode(self, tokens: torch.Tensor) -> "DecodedLayout":
        """Tokens (slots, 5) to objects, Algorithm 1's last line.

        An object with any [none] is dropped ("none"), and so is one with x1 >= x2 or y1 >= y2 ("illegal").
        All-[none] slots are empty rather than dropped.
        """
        none = tokens == self.none_tokens
        corners = tokens[:, 1:]
        kept = ~none.any(1) & ~illegal_boxes(corners)
        reasons = [
            None if kept[i] or none[i].all() else ("none" if none[i].any() else "illegal")
            for i in range(len(tokens))
        ]
        slots = kept.nonzero()[:, 0]
        boxes = corners[slots].float() * self.pixels_per_bin
        dropped = [
            {"slot": i, "reason": reason, "tokens": tokens[i].tolist()}
            for i, reason in enumerate(reasons) if reason
        ]
        return DecodedLayout(slots, boxes, tokens[slots, 0], dropped)

    def to_dict(self) -> dict:
        return asdict(self) | {"classes": list(self.classes)}


@dataclass
class DecodedLayout:
    """slots (n,), boxes_xyxy (n, 4) in pixels of the model input, class_ids (n,), dropped: what was left out."""

    slots: torch.Tensor
    boxes_xyxy: torch.Tensor
    class_ids: torch.Tensor
    dropped: list[dict]

    def __len__(self) -> int:
        return len(self.slots)


def illegal_boxes(corners: torch.Tensor) -> torch.Tensor:
    """Whether x1 >= x2 or y1 >= y2, Algorithm 1's last line: coordinate tokens (..., 4) -> (...)."""
    return (corners[..., :2] >= corners[..., 2:]).any(-1)


def shuffle_slots(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Permutes the slots of every layout: (B, N, 5) -> (B, N, 5).

    Objects have no order (DIVE IV-A1), so each training draw sees them, and the empty slots, in another one.
    """
    order = torch.rand(tokens.shape[:2], generator=generator).argsort(1)
    return tokens.gather(1, order[..., None].expand_as(tokens))


def drop_fields(tokens: torch.Tensor, grid: LayoutGrid, generator: torch.Generator, *, partial: float = 0.0,
                objects: float = 0.0, layouts: float = 0.0) -> torch.Tensor:
    """Field dropout: makes the states that inversion passes through part of the training distribution.

    (B, N, 5) -> (B, N, 5). Of the objects, a share `objects` becomes all [none]; a share `partial` loses each of
    its tokens with probability one half; a share `layouts` of the layouts becomes empty. Without it, a layout on
    the way from [none] to an object is something that the model has never seen. Off (all zero) at paper size.
    """
    batch, slots, fields = tokens.shape
    draw = torch.rand(batch, slots, fields + 2, generator=generator)
    whole = torch.rand(batch, generator=generator) < layouts
    mask = (draw[..., :1] < partial) & (draw[..., 2:] < 0.5)
    mask = mask | (draw[..., 1:2] < objects) | whole[:, None, None]
    return torch.where(mask, grid.none_tokens.expand_as(tokens), tokens)
