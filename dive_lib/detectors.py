"""Detectors that are trained for the task: what DIVE's detections are compared with (Table II).

One network of one stage and without anchors, small or large by its settings, is all rows of it: trained on real
images, on images that the layout LDM drew for real layouts (`layout_generation`), or as a head on the frozen layout
LDM's maps (`DenoiserMaps`). A residual backbone with a top-down path ends in one map; each of its cells has a score
for every class and the distances to the four sides of a box. Targets are nearly those of TTFNet (Liu et al., 2020,
arXiv 1909.00700), a CenterNet that is trained in little time: Gaussians about the centres, in whose reach the cells
learn the box. Here every box counts the same.

Why not torchvision's Faster R-CNN, the paper's choice: its wheels are compiled against the default (CUDA) build of
PyTorch, and beside the processor's build its operators (NMS, RoI pooling) are missing. Normalisation is by groups of
channels, not over the batch, so that a step can be computed in parts (`batch_parts`).

Throughout: a box is x1, y1, x2, y2 in pixels of the model's square input of S pixels; K classes; N objects, of which
those of class -1 are none; G x G cells of S / G pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import checkpoint, paths
from dive_lib.batch_parts import DrawnLoss
from dive_lib.coco import CocoLayouts, to_original
from dive_lib.feature_backbone import FeatureBackbone
from dive_lib.first_stage import device
from dive_lib.layout import LayoutGrid, illegal_boxes
from dive_lib.train import TrainingConfig, train

SPREAD = 0.54  # six standard deviations of a centre's Gaussian: in sides of its box, and a cell (TTFNet's alpha)
REACH = 0.1  # least height of the Gaussian where cells learn the box
BOX_WEIGHT = 5.0  # of the boxes' loss beside the classes' (TTFNet)
LARGEST_SIDE = 6.0  # logarithm of the largest distance to a side, in cells


class Objects(NamedTuple):
    """What stands in n images: boxes_xyxy (n, N, 4) and class_ids (n, N), padded with class -1."""

    boxes_xyxy: torch.Tensor
    class_ids: torch.Tensor

    def take(self, index: torch.Tensor) -> "Objects":
        """Of the images index (B,)."""
        return Objects(self.boxes_xyxy[index], self.class_ids[index])


def annotated(layouts: CocoLayouts) -> Objects:
    """The objects of a split as annotated, not rounded to tokens."""
    most = max([1, *(len(layouts.class_ids(i)) for i in range(len(layouts)))])
    boxes, classes = torch.zeros(len(layouts), most, 4), torch.full((len(layouts), most), -1)
    for i in range(len(layouts)):
        own = layouts.class_ids(i)
        boxes[i, :len(own)], classes[i, :len(own)] = layouts.boxes_xyxy(i), own
    return Objects(boxes, classes)


def of_tokens(tokens: torch.Tensor, grid: LayoutGrid) -> Objects:
    """The objects of layouts (n, N, 5); those with a [none] or an illegal box are none."""
    known = (tokens != grid.none_tokens).all(-1) & ~illegal_boxes(tokens[..., 1:])
    return Objects(tokens[..., 1:].float() * grid.pixels_per_bin, tokens[..., 0].masked_fill(~known, -1))


class DenoiserMaps:
    """Maps of a frozen denoiser (`denoiser_features`) at one time step: images (B, 3, S, S) -> (B, channels, h, h).

    stages: whose maps stand beside each other, brought to the size of the largest one.
    """

    def __init__(self, backbone: FeatureBackbone, t: int, stages: Sequence[str]):
        self.backbone, self.t, self.stages = backbone, t, backbone.asked(stages)
        self.channels = sum(backbone.channels[stage] for stage in self.stages)
        self.identity = [backbone.identity, t, self.stages]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        maps = list(self.backbone.features(images, self.t, self.stages).values())
        side = max(m.shape[-1] for m in maps)
        return torch.cat([m if m.shape[-1] == side else F.interpolate(m, (side, side)) for m in maps], 1)


def _convolution(before: int, width: int, side: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, width, side, stride, side // 2, bias=False),
                         nn.GroupNorm(math.gcd(8, width), width))


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut: (B, before, h, w) -> (B, width, h / stride, w / stride)."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(_convolution(before, width, 3, stride), nn.ReLU(), _convolution(width, width))
        self.shortcut = nn.Identity() if stride == 1 and before == width else _convolution(before, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


class Detector(nn.Module):
    """Images or maps (B, channels, h, h) -> class logits (B, K, G, G) and sides (B, 4, G, G) in pixels.

    Sides are the distances from a cell's centre to the box's left, upper, right and lower side. enlarge: by which
    given maps are enlarged first. stem: stride of the first convolution. widths: of the stages, each half as large as
    the one before. blocks: of each stage. level: the stage whose size the cells have; those from it on are added up,
    from the last one down, in `neck` channels.
    """

    def __init__(self, channels: int, classes: int, image_size: int, *, widths: Sequence[int] = (64, 128, 256, 512),
                 blocks: Sequence[int] = (2, 2, 2, 2), stem: int = 2, level: int = 1, neck: int = 128,
                 enlarge: int = 1):
        super().__init__()
        if len(blocks) != len(widths) or not 0 <= level < len(widths):
            raise ValueError(f"a detector needs as many numbers of blocks as widths and a level among them, got "
                             f"widths {list(widths)}, blocks {list(blocks)}, level {level}")
        self.config = {"channels": channels, "classes": classes, "image_size": image_size, "widths": list(widths),
                       "blocks": list(blocks), "stem": stem, "level": level, "neck": neck, "enlarge": enlarge}
        self.stem = nn.Sequential(_convolution(channels, widths[0], 3, stem), nn.ReLU())
        self.stages, before = nn.ModuleList(), widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks)):
            first = Block(before, width, 2 if stage else 1)
            self.stages.append(nn.Sequential(first, *(Block(width, width, 1) for _ in range(count - 1))))
            before = width
        self.laterals = nn.ModuleList(_convolution(width, neck, 1) for width in widths[level:])
        self.heads = nn.ModuleList(nn.Sequential(_convolution(neck, neck), nn.ReLU(), nn.Conv2d(neck, outputs, 1))
                                   for outputs in (classes, 4))
        nn.init.constant_(self.heads[0][-1].bias, -math.log(99))  # nearly all cells are background: p = 0.01

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config["enlarge"] > 1:
            x = F.interpolate(x, scale_factor=self.config["enlarge"], mode="bilinear")
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        merged = self.laterals[-1](maps[-1])
        for lateral, own in zip(self.laterals[-2::-1], maps[-2::-1]):
            merged = lateral(own) + F.interpolate(merged, own.shape[-2:])
        logits, sides = (head(F.relu(merged)) for head in self.heads)
        return logits, sides.clamp(max=LARGEST_SIDE).exp() * (self.config["image_size"] / sides.shape[-1])


def cell_centres(cells: int, image_size: int) -> torch.Tensor:
    """(2, G, G): x and y of the cells' centres in pixels."""
    places = (torch.arange(cells) + 0.5) * (image_size / cells)
    return torch.stack(torch.meshgrid(places, places, indexing="xy"))


def boxes_of(sides: torch.Tensor, image_size: int) -> torch.Tensor:
    """Sides (B, 4, G, G) in pixels, see `Detector` -> boxes_xyxy (B, 4, G, G)."""
    centres = cell_centres(sides.shape[-1], image_size).to(sides.device)
    return torch.cat([centres - sides[:, :2], centres + sides[:, 2:]], 1)


def targets(objects: Objects, classes: int, cells: int, image_size: int) -> tuple[torch.Tensor, ...]:
    """heat (B, K, G, G), 1 at the cells of the centres; boxes_xyxy (B, 4, G, G) and their weights (B, G, G).

    A cell learns the box whose Gaussian is highest there; the weights of each box's cells add up to one.
    """
    boxes, class_ids = objects.boxes_xyxy * (cells / image_size), objects.class_ids
    present = class_ids >= 0
    peak = ((boxes[..., :2] + boxes[..., 2:]) / 2).floor().clamp(0, cells - 1)
    spread = (SPREAD * (boxes[..., 2:] - boxes[..., :2]) + 1) / 6
    places = torch.arange(cells, device=boxes.device)
    x, y = (torch.exp(-((places - peak[..., k, None]) / spread[..., k, None]).square() / 2) for k in (0, 1))
    gaussians = y[..., :, None] * x[..., None, :] * present[..., None, None]  # (B, N, G, G)
    heat = torch.zeros(len(boxes), classes, cells, cells, device=boxes.device)
    heat.scatter_reduce_(1, class_ids.clamp(min=0)[..., None, None].expand_as(gaussians), gaussians, "amax")
    height, owner = gaussians.max(1, keepdim=True)
    owned = gaussians * (owner == torch.arange(gaussians.shape[1], device=owner.device)[:, None, None])
    owned = owned * (height >= REACH)
    weights = (owned / owned.sum((2, 3), keepdim=True).clamp(min=1e-6)).sum(1)
    index = owner.flatten(2).mT.expand(-1, -1, 4)  # (B, G G, 4)
    return heat, objects.boxes_xyxy.gather(1, index).mT.unflatten(2, (cells, cells)), weights


def focal_losses(logits: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """CenterNet's focal loss with reduced penalty near a centre (Zhou et al., 2019, equation 1): (B,), summed."""
    p = logits.sigmoid()
    centre = -(1 - p).square() * F.logsigmoid(logits)
    elsewhere = -(1 - heat).pow(4) * p.square() * F.logsigmoid(-logits)
    return torch.where(heat == 1, centre, elsewhere).flatten(1).sum(1)


def generalised_iou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """GIoU (Rezatofighi et al., 2019) of boxes_xyxy (B, 4, ...): (B, ...) in [-1, 1]."""
    shared = (torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])).clamp(min=0).prod(1)
    hull = (torch.maximum(one[:, 2:], other[:, 2:]) - torch.minimum(one[:, :2], other[:, :2])).prod(1).clamp(min=1e-6)
    union = sum((boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (one, other)) - shared
    return shared / union.clamp(min=1e-6) - (hull - union) / hull


def moved(images: torch.Tensor, objects: Objects, down: int, right: int) -> tuple[torch.Tensor, Objects]:
    """Images (B, C, S, S) moved by so many pixels, their border repeated, with their objects cut off at the border.
    An object of which less than a pixel is left in either direction is none."""
    most, size = max(abs(down), abs(right)), images.shape[-1]
    padded = F.pad(images, (most,) * 4, mode="replicate")
    images = padded[..., most - down:most - down + size, most - right:most - right + size]
    boxes = (objects.boxes_xyxy + torch.tensor([right, down] * 2, device=images.device)).clamp(0, size)
    left = (boxes[..., 2:] - boxes[..., :2] >= 1).all(-1)
    return images, Objects(boxes, objects.class_ids.masked_fill(~left, -1))


def mirrored(images: torch.Tensor, objects: Objects, which: torch.Tensor) -> tuple[torch.Tensor, Objects]:
    """Images (B, C, S, S) and their objects, those of `which` (B,) mirrored from left to right."""
    x1, y1, x2, y2 = objects.boxes_xyxy.unbind(-1)
    boxes = torch.stack([images.shape[-1] - x2, y1, images.shape[-1] - x1, y2], -1)
    boxes = torch.where(which[:, None, None], boxes, objects.boxes_xyxy)
    return torch.where(which[:, None, None, None], images.flip(-1), images), Objects(boxes, objects.class_ids)


def detection_loss(take: Callable[[torch.Tensor], torch.Tensor], objects: Objects, batch: int, *, shift: int = 0,
                   flip: bool = False, maps: Callable[[torch.Tensor], torch.Tensor] | None = None) -> DrawnLoss:
    """The objective for train(). take: indices (B,) -> images (B, 3, S, S) on the computing device.

    shift: images are moved by up to so many pixels, the same for a batch. flip: half of them are mirrored, which makes
    other glyphs of digits. maps: what the detector reads in place of the images, such as `DenoiserMaps`.
    """
    if not (objects.class_ids >= 0).any():
        raise ValueError("none of the images has an object; a detector cannot learn from them")

    def draw(model: Detector, step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        index = torch.randint(len(objects.class_ids), (batch,), generator=generator)
        images = take(index)
        own = Objects(*(part.to(images.device) for part in objects.take(index)))
        if shift:
            images, own = moved(images, own, *torch.randint(-shift, shift + 1, (2,), generator=generator).tolist())
        if flip:
            images, own = mirrored(images, own, (torch.rand(batch, generator=generator) < 0.5).to(images.device))
        count = (own.class_ids >= 0).sum(1).float().mean().clamp(min=1)  # losses are per object of the whole batch
        return maps(images) if maps else images, *own, count.expand(batch)

    def losses(model: Detector, inputs: torch.Tensor, boxes: torch.Tensor, class_ids: torch.Tensor,
               count: torch.Tensor) -> torch.Tensor:
        logits, sides = (output.float() for output in model(inputs))
        heat, wanted, weights = targets(Objects(boxes, class_ids), *logits.shape[1:3], model.config["image_size"])
        unlike = 1 - generalised_iou(boxes_of(sides, model.config["image_size"]), wanted)
        return (focal_losses(logits, heat) + BOX_WEIGHT * (weights * unlike).flatten(1).sum(1)) / count

    return DrawnLoss(draw, losses)


def fit(settings: Mapping, shape: Mapping, take: Callable[[torch.Tensor], torch.Tensor], objects: Objects,
        config: TrainingConfig, *, directory: Path, identity, shift: int = 0, flip: bool = False,
        maps: DenoiserMaps | None = None) -> Detector:
    """A detector, trained and kept in `directory` (its name labels the progress).

    settings, shape: the arguments of `Detector`. take, objects, shift, flip, maps: see `detection_loss`. identity:
    JSON-serialisable, of what `take` gives. Raises what `Detector` and `train` raise.
    """
    torch.manual_seed(config.seed)
    model = Detector(**shape, **settings).to(device())
    described = [identity, model.config, shift, flip, maps.identity if maps else None]
    train(model, detection_loss(take, objects, config.batch_size, shift=shift, flip=flip, maps=maps), config,
          scratch=paths.scratch() / "detectors", label=Path(directory).name,
          identity=checkpoint.fingerprint(described, *objects))
    checkpoint.save_model(directory, model, model.config)
    return checkpoint.freeze(model)


def load(directory) -> Detector:
    """Loads a detector kept by `fit`, frozen."""
    return checkpoint.freeze(checkpoint.load_weights(directory, Detector(**checkpoint.load_config(directory))))


class Found(NamedTuple):
    """What was found in an image: boxes_xyxy (n, 4), class_ids (n,), scores (n,) in [0, 1], falling."""

    boxes_xyxy: torch.Tensor
    class_ids: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def decode(logits: torch.Tensor, sides: torch.Tensor, image_size: int, *, most: int = 100, least: float = 0.01,
           overlap: float = 0.6) -> list[Found]:
    """The detector's answers for a batch: cells with the highest score of a class among their neighbours.

    most: of an image. least: score that counts. overlap: IoU from which the lower of two boxes of a class is dropped.
    """
    scores = logits.float().sigmoid()
    scores = scores * (scores == F.max_pool2d(scores, 3, 1, 1))
    boxes = boxes_of(sides.float(), image_size).clamp(0, image_size)
    cells = logits.shape[-1] ** 2
    found = []
    for own_scores, own_boxes in zip(scores.flatten(1).cpu(), boxes.flatten(2).mT.cpu()):
        top, index = own_scores.topk(min(most, len(own_scores)))
        index = index[top >= least]
        kept = Found(own_boxes[index % cells], index // cells, top[top >= least])
        found.append(Found(*(part[suppressed(*kept[:2], overlap)] for part in kept)))
    return found


def suppressed(boxes_xyxy: torch.Tensor, class_ids: torch.Tensor, overlap: float) -> torch.Tensor:
    """Non-maximum suppression: indices of those of n boxes, in the order of falling scores, that no kept one of the
    same class before them overlaps by more than the IoU `overlap`."""
    low = torch.maximum(boxes_xyxy[:, None, :2], boxes_xyxy[:, :2])
    high = torch.minimum(boxes_xyxy[:, None, 2:], boxes_xyxy[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    close = (shared > overlap * (area[:, None] + area - shared)) & (class_ids[:, None] == class_ids)
    kept: list[int] = []
    for k in range(len(boxes_xyxy)):
        if not close[k, kept].any():
            kept.append(k)
    return torch.tensor(kept, dtype=torch.long)


@torch.no_grad()
def detect(model: Detector, inputs: Callable[[torch.Tensor], torch.Tensor], count: int, batch: int = 50) -> list[Found]:
    """The answers for indices 0 ... count - 1. inputs: indices (B,) -> what the detector reads."""
    found = []
    for part in torch.arange(count).split(batch):
        found += decode(*model(inputs(part)), model.config["image_size"])
    return found


def coco_results(layouts: CocoLayouts, image_ids: Sequence[int], found: Sequence[Found]) -> list[dict]:
    """Records in COCO's format, in pixels of the original images of a split."""
    return [{"image_id": image_id, "category_id": layouts.categories.ids[c], "bbox": box, "score": score}
            for image_id, own in zip(image_ids, found, strict=True)
            for box, c, score in zip(
                to_original(own.boxes_xyxy, layouts.original_size(layouts.index_of(image_id)),
                            layouts.image_size).tolist(), own.class_ids.tolist(), own.scores.tolist())]
