"""Open-vocabulary segmentation: a pyramid head over frozen features whose pixels are compared with class texts.

Published are a convolution, group norm and SiLU for every scale, a Semantic-FPN head with 768 output channels
(TextFPNHead), and cross entropy of cosine similarities at temperature 0.02, with similarities enlarged to the labels'
size as mmseg does; of the head that the last configuration names (LightTextFPNHead) there is no code. Kind "fpn" with
`full_size` is that design. "pyramid" smooths each scale once and compares on the head's map, with `refine` doublings at
its end: for small images.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dive_lib.checkpoint import fingerprint
from dive_lib.first_stage import device
from dive_lib.segmentation_data import IGNORED, SegmentationImages
from dive_lib.side_by_side import side_by_side
from dive_lib.task_bench import Bench, training
from dive_lib.task_features import Scales
from dive_lib.task_metrics import evaluate_segmentation, overlaps
from dive_lib.text_heads import AdapterHead
from dive_lib.u_head import SEGMENTATION, Adapter, FuseBlock, similarity_logits, text_loss


class PyramidHead(nn.Module):
    """Scales [(B, C, h, w)], coarse to fine, and an expert's maps -> embeddings (B, d, H, W), H = 2^refine h_finest.

    channels, expert: of the scales and of the expert's maps, which join the finest scales. width: of every scale.
    kind: "pyramid"; "fpn": a scale rises to the finest by convolutions with a doubling after each, one for each halving
    between them; or "finest": the finest scale alone without 3 x 3 convolutions, the linear control.
    """

    def __init__(self, channels: Sequence[int], expert: Sequence[int], embedding: int, *, width: int = 256,
                 refine: int = 0, kind: str = "pyramid"):
        super().__init__()
        if kind not in ("pyramid", "fpn", "finest"):
            raise ValueError(f"segmentation head {kind!r} is unknown; choose pyramid, fpn, finest or adapter")
        self.kind, skipped = kind, len(channels) - len(expert)
        self.adapters = nn.ModuleList(Adapter(c) for c in expert)
        joined = [c + (expert[k - skipped] if k >= skipped else 0) for k, c in enumerate(channels)]
        self.blocks = nn.ModuleList(FuseBlock(c, width) for c in joined)
        halvings = [len(channels) - 1 - k if kind == "fpn" else 0 for k in range(len(channels))] + [0] * refine
        self.smooth = nn.ModuleList(smoothing(width, count) for count in halvings if kind != "finest")
        self.out = nn.Conv2d(joined[-1] if kind == "finest" else width, embedding, 1)

    def forward(self, scales: Sequence[torch.Tensor], expert: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        maps, skipped = list(scales), len(scales) - len(expert)
        for k, (adapter, own) in enumerate(zip(self.adapters, expert), start=skipped):
            resized = F.interpolate(adapter(own), maps[k].shape[2:], mode="bilinear", align_corners=False)
            maps[k] = torch.cat([maps[k], resized], 1)
        if self.kind == "finest":
            return self.out(maps[-1])
        size = maps[-1].shape[2:]
        x = sum(F.interpolate(smooth(block(own)), size, mode="bilinear", align_corners=False)
                for smooth, block, own in zip(self.smooth, self.blocks, maps))
        for smooth in self.smooth[len(maps):]:
            x = smooth(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        return self.out(x)


def smoothing(width: int, doublings: int) -> nn.Sequential:
    """3 x 3 convolutions with group norm and SiLU: one, or as many as doublings of the map, each before its own."""
    parts: list[nn.Module] = []
    for _ in range(max(1, doublings)):
        parts += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(min(32, width), width), nn.SiLU()]
        parts += [nn.Upsample(scale_factor=2, mode="bilinear")] if doublings else []
    return nn.Sequential(*parts)


class PixelAdapter(AdapterHead):
    """The published baselines' head at every place of the finest scale, to whose size the others are enlarged."""

    def forward(self, scales: Sequence[torch.Tensor], expert: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        size = max(tuple(scale.shape[2:]) for scale in scales)
        maps = [F.interpolate(scale, size, mode="bilinear", align_corners=False) for scale in scales]
        return self.layers(self.norm(torch.cat(maps, 1).movedim(1, -1))).movedim(-1, 1)


class Segmentation:
    """Training and tests. head: {"kind": of PyramidHead or "adapter", "width", "refine", "full_size": whether the loss
    is on labels of the images' size, or of the head's map} and settings of `task_bench.training`."""

    def __init__(self, bench: Bench, head: Mapping):
        self.bench, self.head = bench, dict(head)
        self.train_images = bench.data.segmentation_train
        self._labels: dict = {}

    @property
    def seen(self) -> list[int]:
        """Indices of the names that training shows."""
        return [k for k, name in enumerate(self.train_images.classes) if name not in self.train_images.unseen]

    def train(self, source: Mapping, seed: int, without: Sequence[int] = (), **changed) -> nn.Module:
        """A head trained against the texts of the seen names alone; without: indices of more names to leave out."""
        settings = self.head | changed
        scales = self.bench.scales(self.train_images, source)
        seen = [k for k in self.seen if k not in without]
        names = [self.train_images.classes[k] for k in seen]
        text = self.bench.text(names).to(device())
        places = torch.full((len(self.train_images.classes) + 1,), IGNORED)  # the last: ignored pixels
        places[seen] = torch.arange(len(names))
        torch.manual_seed(seed)
        own, expert = scales.channels
        head = PixelAdapter(own, text.shape[1]) if settings["kind"] == "adapter" else \
            PyramidHead(own, expert, text.shape[1], width=settings["width"], refine=settings["refine"],
                        kind=settings["kind"])
        head = head.to(device())

        def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
            index = torch.randint(len(scales), (settings["batch_size"],), generator=generator)
            embeddings = model(*scales.take(index))
            if settings["full_size"]:
                labels = places[self.labels(self.train_images, index, self.train_images.image_size)]
                return enlarged_loss(embeddings, text, labels.to(embeddings.device))
            labels = places[self.labels(self.train_images, index, embeddings.shape[-1])]
            valid = (labels != IGNORED).to(embeddings.device)
            return text_loss(embeddings.permute(0, 2, 3, 1)[valid], text, labels.to(embeddings.device)[valid],
                             **SEGMENTATION)

        return self.bench.train_head(head, loss_of, training(settings, len(scales), seed), task="segmentation",
                                     identity=fingerprint(scales.identity, names, text, settings))

    def labels(self, images: SegmentationImages, indices: torch.Tensor, size: int) -> torch.Tensor:
        """(B, size, size) label maps, kept in memory where features are."""
        if self.bench.cache is None:
            return images.load_labels(indices, size)
        key = (id(images), size)
        if key not in self._labels:
            self._labels[key] = images.load_labels(range(len(images)), size)
        return self._labels[key][indices]

    @torch.no_grad()
    def similarities(self, head: nn.Module, scales: Scales, indices: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(B, K, h, w) similarity of every pixel of the head's map to each text."""
        embeddings = head.eval()(*scales.take(indices)).permute(0, 2, 3, 1)
        return similarity_logits(embeddings, text.to(embeddings.device)).permute(0, 3, 1, 2)

    def counts(self, head: nn.Module, source: Mapping, images: SegmentationImages, names: Sequence[int] | None = None,
               handicap: float = 0.0) -> torch.Tensor:
        """(n, 3, K) of `task_metrics.overlaps` for all images. names: indices of the classes that can be answered.

        handicap: taken off the similarity to every name that training showed, but the background (`choose_handicap`).
        """
        return self.counts_by_handicap(head, source, images, [handicap], names)[0]

    def counts_by_handicap(self, head: nn.Module, source: Mapping, images: SegmentationImages,
                           handicaps: Sequence[float], names: Sequence[int] | None = None,
                           without: Sequence[int] = (), batch: int = 32) -> list[torch.Tensor]:
        """`counts` under each of the handicaps, with the network run once. without: as in `train`."""
        scales = self.bench.scales(images, source, self.train_images)
        names = torch.arange(len(images.classes)) if names is None else torch.as_tensor(names)
        text = self.bench.text([images.classes[k] for k in names])
        shown = {self.train_images.classes[k] for k in self.seen if k not in without} - set(images.background)
        less = torch.tensor([float(images.classes[k] in shown) for k in names], device=device())[:, None, None]
        size, rows = images.image_size, [[] for _ in handicaps]
        # Answers have the images' size and a layer for each name: 847 of them at 512 x 512 are a gigabyte an image.
        for part in torch.arange(len(images)).split(min(batch, self.bench.model["batch"])):
            logits, labels = self.similarities(head, scales, part, text), self.labels(images, part, size)
            for own, handicap in zip(rows, handicaps):
                answers = names[nearest_text(logits - handicap * less, size)]
                own.append(overlaps(answers, labels, len(images.classes)))
        return [torch.cat(own) for own in rows]


def enlarged_loss(embeddings: torch.Tensor, text: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`text_loss` of embeddings (B, d, h, w), whose similarities are enlarged to labels (B, S, S); a scalar."""
    logits = similarity_logits(embeddings.permute(0, 2, 3, 1), text, scale=SEGMENTATION["scale"]).permute(0, 3, 1, 2)
    logits = F.interpolate(logits / SEGMENTATION["temperature"], labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def nearest_text(similarities: torch.Tensor, size: int) -> torch.Tensor:
    """(B, size, size) index of the text nearest to every pixel: similarities (B, K, h, w) are enlarged, not answers."""
    return F.interpolate(similarities, (size, size), mode="bilinear", align_corners=False).argmax(1).cpu()


def groups(images: SegmentationImages) -> dict[str, list[int]]:
    """{"all": classes without the background, "seen", "unseen": of them, "background"}; empty groups left out."""
    own = {"all": [], "seen": [], "unseen": [], "background": []}
    for k, name in enumerate(images.classes):
        if name in images.background:
            own["background"].append(k)
            continue
        own["all"].append(k)
        if images.unseen:
            own["unseen" if name in images.unseen else "seen"].append(k)
    return {name: members for name, members in own.items() if members}


def compare(task: Segmentation, candidates: Sequence[Mapping], seed: int = 0) -> list[dict]:
    """Candidates with their mIoU on validation images, in percent, among the seen names; best first."""
    images = task.bench.data.segmentation_val

    def value(candidate: Mapping) -> float:
        counts = task.counts(task.train(candidate, seed), candidate, images, task.seen)
        return evaluate_segmentation(counts, {"all": groups(images)["all"]}, resamples=1)["mIoU_all"]

    values = side_by_side([partial(value, candidate) for candidate in candidates], task.bench.workers,
                          "heads on validation images", unit="settings")
    rows = [{**candidate, "mIoU": own} for candidate, own in zip(candidates, values)]
    return sorted(rows, key=lambda row: -row["mIoU"])  # stable: the first of equals wins


def ablate(task: Segmentation, changes: Mapping[str, tuple[Mapping, Mapping]], images: SegmentationImages,
           seed: int = 0) -> dict[str, dict]:
    """{title: row of numbers on `images`} of changes {title: (source, changes of the head)}."""
    def row(source: Mapping, changed: Mapping) -> dict:
        counts = task.counts(task.train(source, seed, **changed), source, images)
        return evaluate_segmentation(counts, groups(images), seed=seed)

    rows = side_by_side([partial(row, *change) for change in changes.values()], task.bench.workers,
                        "heads of the ablation")
    return {title: {key: value for key, value in own.items() if key != "by_class"} for title, own in zip(changes, rows)}


def play_unseen(task: Segmentation, count: int, seed: int = 0) -> list[int]:
    """Indices of `count` seen names, drawn from the seed, that play the unseen ones on validation images."""
    images = task.bench.data.segmentation_val
    names = [k for k in task.seen if images.classes[k] not in images.background]
    if not 0 < count < len(names):
        raise ValueError(f"{count} of {len(names)} seen names cannot be held out; choose between 1 and one less")
    return sorted(np.random.RandomState(seed).permutation(names)[:count].tolist())


def choose_handicap(task: Segmentation, source: Mapping, values: Sequence[float], held_out: int,
                    seed: int = 0) -> list[dict]:
    """Handicaps of the names that training showed, best first: {"handicap", "mIoU_seen", "mIoU_unseen", "mean"}.

    A head answers too often with names that it was trained on; lowering their similarity by one number mends that
    (calibrated stacking, Chao et al. 2016; not in Vermouth). The number is chosen without the unseen names: a head is
    trained without `held_out` of the seen ones, which play the unseen ones on validation images (`play_unseen`).
    mean: harmonic, of both groups' mIoU.
    """
    images, kept_back = task.bench.data.segmentation_val, play_unseen(task, held_out, seed)
    names = [k for k in task.seen if images.classes[k] not in images.background]
    parts = {"seen": [k for k in names if k not in kept_back], "unseen": kept_back}
    head, rows = task.train(source, seed, without=kept_back), []
    for handicap, counts in zip(values, task.counts_by_handicap(head, source, images, values, task.seen, kept_back)):
        found = evaluate_segmentation(counts, parts, resamples=1)
        seen, unseen = (found.get(f"mIoU_{kind}", 0.0) for kind in parts)
        mean = 2 * seen * unseen / max(seen + unseen, 1e-9)
        rows.append({"handicap": handicap, "mIoU_seen": seen, "mIoU_unseen": unseen, "mean": round(mean, 4)})
    return sorted(rows, key=lambda row: -row["mean"])  # stable: the first of equals wins
