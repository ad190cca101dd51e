"""Open-vocabulary segmentation: a pyramid head over frozen features whose pixels are compared with class texts.

Published are a convolution, group norm and SiLU for every scale, a Semantic-FPN head with 768 output channels, and
cross entropy of cosine similarities at temperature 0.02; the head's own code is not. So this is the published design as
far as it is known, with `refine` doublings of the map at its end, which small images need.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import paths
from dive_lib.checkpoint import fingerprint
from dive_lib.first_stage import device
from dive_lib.progress import Progress, silent
from dive_lib.segmentation_data import IGNORED, SegmentationImages
from dive_lib.task_bench import Bench, training
from dive_lib.task_features import Scales
from dive_lib.task_metrics import evaluate_segmentation, overlaps
from dive_lib.train import train
from dive_lib.u_head import SEGMENTATION, Adapter, FuseBlock, similarity_logits, text_loss


class PyramidHead(nn.Module):
    """Scales [(B, C, h, w)], coarse to fine, and an expert's maps -> embeddings (B, d, H, W), H = 2^refine h_finest.

    channels, expert: of the scales and of the expert's maps, which join the finest scales. width: of every scale.
    kind: "pyramid", or "finest": the finest scale alone without 3 x 3 convolutions, the linear control.
    """

    def __init__(self, channels: Sequence[int], expert: Sequence[int], embedding: int, *, width: int = 256,
                 refine: int = 0, kind: str = "pyramid"):
        super().__init__()
        if kind not in ("pyramid", "finest"):
            raise ValueError(f"segmentation head {kind!r} is unknown; choose pyramid or finest")
        self.kind, skipped = kind, len(channels) - len(expert)
        self.adapters = nn.ModuleList(Adapter(c) for c in expert)
        joined = [c + (expert[k - skipped] if k >= skipped else 0) for k, c in enumerate(channels)]
        self.blocks = nn.ModuleList(FuseBlock(c, width) for c in joined)
        steps = len(channels) + refine if kind == "pyramid" else 0
        self.smooth = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False),
                                                  nn.GroupNorm(min(32, width), width), nn.SiLU()) for _ in range(steps))
        self.out = nn.Conv2d(width if kind == "pyramid" else joined[-1], embedding, 1)

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


class Segmentation:
    """Training and tests. head: {"kind", "width", "refine"} and settings of `task_bench.training`."""

    def __init__(self, bench: Bench, head: Mapping):
        self.bench, self.head = bench, dict(head)
        self.train_images = bench.data.segmentation_train
        self._labels: dict = {}

    @property
    def seen(self) -> list[int]:
        """Indices of the names that training shows."""
        return [k for k, name in enumerate(self.train_images.classes) if name not in self.train_images.unseen]

    def train(self, source: Mapping, seed: int, **changed) -> nn.Module:
        """A head trained against the texts of the seen names alone."""
        settings = self.head | changed
        scales = self.bench.scales(self.train_images, source)
        names = [self.train_images.classes[k] for k in self.seen]
        text = self.bench.text(names).to(device())
        places = torch.full((len(self.train_images.classes) + 1,), IGNORED)  # the last: ignored pixels
        places[self.seen] = torch.arange(len(names))
        torch.manual_seed(seed)
        head = PyramidHead(*scales.channels, text.shape[1], width=settings["width"], refine=settings["refine"],
                           kind=settings["kind"]).to(device())

        def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
            index = torch.randint(len(scales), (settings["batch_size"],), generator=generator)
            embeddings = model(*scales.take(index))
            labels = places[self.labels(self.train_images, index, embeddings.shape[-1])]
            valid = (labels != IGNORED).to(embeddings.device)
            return text_loss(embeddings.permute(0, 2, 3, 1)[valid], text, labels.to(embeddings.device)[valid],
                             **SEGMENTATION)

        with silent():
            train(head, loss_of, training(settings, len(scales), seed), scratch=paths.scratch() / "segmentation",
                  identity=fingerprint(scales.identity, names, text, settings, *head.state_dict().values()),
                  label="segmentation")
        return head

    def labels(self, images: SegmentationImages, indices: torch.Tensor, size: int) -> torch.Tensor:
        """(B, size, size) label maps, kept in memory where features are."""
        if self.bench.cache is None:
            return images.load_labels(indices, size)
        key = (id(images), size)
        if key not in self._labels:
            self._labels[key] = images.load_labels(range(len(images)), size)
        return self._labels[key][indices]

    @torch.no_grad()
    def answer(self, head: nn.Module, scales: Scales, indices: torch.Tensor, text: torch.Tensor,
               size: int) -> torch.Tensor:
        """(B, size, size) index of the nearest text for every pixel; similarities are enlarged, not answers."""
        embeddings = head.eval()(*scales.take(indices)).permute(0, 2, 3, 1)
        logits = similarity_logits(embeddings, text.to(embeddings.device)).permute(0, 3, 1, 2)
        return F.interpolate(logits, (size, size), mode="bilinear", align_corners=False).argmax(1).cpu()

    def counts(self, head: nn.Module, source: Mapping, images: SegmentationImages, names: Sequence[int] | None = None,
               batch: int = 32) -> torch.Tensor:
        """(n, 3, K) of `task_metrics.overlaps` for all images. names: indices of the classes that can be answered."""
        scales = self.bench.scales(images, source, self.train_images)
        names = torch.arange(len(images.classes)) if names is None else torch.as_tensor(names)
        text = self.bench.text([images.classes[k] for k in names])
        rows = []
        for part in torch.arange(len(images)).split(batch):
            answers = names[self.answer(head, scales, part, text, images.image_size)]
            rows.append(overlaps(answers, self.labels(images, part, images.image_size), len(images.classes)))
        return torch.cat(rows)


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
    rows, images = [], task.bench.data.segmentation_val
    with Progress(len(candidates), "heads on validation images", unit="trials") as progress:
        for candidate in candidates:
            counts = task.counts(task.train(candidate, seed), candidate, images, task.seen)
            row = evaluate_segmentation(counts, {"all": groups(images)["all"]}, resamples=1)
            rows.append({**candidate, "mIoU": row["mIoU_all"]})
            progress.update()
    return sorted(rows, key=lambda row: -row["mIoU"])  # stable: the first of equals wins
