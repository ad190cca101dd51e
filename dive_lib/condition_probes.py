"""What the condition and the noise of a denoiser do to its features: the ablations around one cell.

Rows of one table are probed on the same images with the same split. "leaks": the condition holds the label.
"""

from collections.abc import Mapping, Sequence

import torch

from dive_lib import layout_conditions, probes, stage_groups
from dive_lib.classification_results import evaluate_correct
from dive_lib.dataset import Dataset, subset_ids
from dive_lib.feature_cache import FeatureCache
from dive_lib.feature_noise import Noise
from dive_lib.probe_data import ProbeData
from dive_lib.probe_grid import MAP_SIDE, PIXELS, paired
from dive_lib.task_metrics import evaluate_segmentation

TRAIN_SHARE = 0.6  # of DIVE's images; the others are split into validation and test


def classification_rows(features: Mapping[str, Mapping[str, torch.Tensor]], labels: Mapping[str, torch.Tensor],
                        classes: int, *, resamples: int, seed: int) -> dict[str, dict]:
    """Accuracy on test images of each way to make features, and its paired difference to the first way.

    features: name -> split -> (n, d) or maps. The ridge's strength is chosen on the validation images.
    """
    rows: dict[str, dict] = {}
    for name, own in features.items():
        _, strength = probes.classify(own["train"], labels["train"], own["val"], labels["val"], classes)
        correct, _ = probes.classify(own["train"], labels["train"], own["test"], labels["test"], classes, strength)
        rows[name] = evaluate_correct(correct, resamples=resamples, seed=seed) | {"correct": correct}
        rows[name] |= paired(rows[name], next(iter(rows.values())), resamples=resamples, seed=seed)
    return rows


def noise_features(backbone, t: int, stage: str, data: ProbeData, cache: FeatureCache, *, several: Sequence[int],
                   inversion_steps: int) -> dict[str, dict[str, torch.Tensor]]:
    """Pooled features of the photos under each noise mode at t, after a walk, and at several time steps joined.

    several: time steps whose features are joined; from the largest one the walk begins, if it is larger than t.
    """
    def take(own, at):
        return {split: probes.pooled(cache.features(own, part.images, at, (stage,), side=1, label=f"t = {at}")[stage])
                for split, part in data.photos.items()}

    settings = {"free noise": Noise("free"), "ddpm: fixed noise": Noise("ddpm"),
                "ddim_inv: no noise": Noise("ddim_inv"),
                "DDIM inversion": Noise("ddim_inversion", steps=inversion_steps)}
    made = {name: take(backbone.with_noise(noise), t) for name, noise in settings.items()}
    larger = sorted((value for value in several if value > t), reverse=True)[:1]
    if larger:
        made[f"walk {larger[0]} to {t}"] = take(backbone.with_noise(Noise("free")), (larger[0], t))
    joined = [take(backbone.with_noise(Noise("free")), value) for value in several]
    made[f"{len(several)} time steps joined"] = {split: torch.cat([part[split] for part in joined], 1)
                                                 for split in data.photos}
    return made


def group_features(backbone, t: int, data: ProbeData, cache: FeatureCache) -> dict[str, dict[str, torch.Tensor]]:
    """Pooled features of the photos for each of the paper's groups of stages (Figure 5): its scales, joined."""
    made: dict[str, dict[str, torch.Tensor]] = {group: {} for group in stage_groups.GROUPS}
    for split, part in data.photos.items():
        own = {stage: probes.pooled(maps) for stage, maps in cache.features(
            backbone, part.images, t, side=1, label=f"t = {t}").items()}
        for group in stage_groups.GROUPS:
            made[group][split] = torch.cat([own[stage] for stage in stage_groups.stages_of(group, backbone.stages)], 1)
    return made


def text_features(backbone, t: int, stage: str, texts: Mapping[str, Mapping[str, Sequence[str]]], data: ProbeData,
                  cache: FeatureCache) -> dict[str, dict[str, torch.Tensor]]:
    """Pooled features of the photos under each kind of prompt; texts: kind -> split -> a text for each photo."""
    return {kind: {split: probes.pooled(cache.features(backbone, part.images, t, (stage,), side=1, label=kind,
                                                       condition=list(texts[kind][split]))[stage])
                   for split, part in data.photos.items()} for kind in texts}


def label_features(backbone, t: int, stage: str, numbers: ProbeData,
                   cache: FeatureCache) -> dict[str, dict[str, torch.Tensor]]:
    """Features of a class-conditional DiT under no class, a constant one, and the true one, on images of its classes
    (`probe_data.of_classes`)."""
    made: dict[str, dict[str, torch.Tensor]] = {}
    for kind in ("none", "constant", "true class"):
        made[kind] = {}
        for split, part in numbers.photos.items():
            condition = {"none": None, "constant": torch.zeros_like(part.labels), "true class": part.labels}[kind]
            maps = cache.features(backbone, part.images, t, (stage,), condition=condition, side=numbers.side,
                                  label=kind)
            made[kind][split] = probes.pooled(maps[stage])
    return made


def layout_rows(backbone, t: int, stage: str, data: Dataset, image_ids: Sequence[int], found: torch.Tensor,
                cache: FeatureCache, *, resamples: int, seed: int) -> dict[str, dict]:
    """mIoU of the digits' pixels under each layout condition, without and with cross-attention maps.

    image_ids: test scenes with DIVE's layouts `found`; a seeded part of them trains the probe, another chooses the
    ridge's strength, the rest is reported. All their glyphs are those of the test split.
    """
    ids = list(image_ids)
    images = torch.stack([data.test.load_image(data.test.index_of(i)) for i in ids])
    truth = layout_conditions.label_maps(data, ids)
    train = subset_ids(range(len(ids)), max(1, int(TRAIN_SHARE * len(ids))), seed)
    rest = [k for k in range(len(ids)) if k not in set(train)]
    val, test = rest[::3] or rest, [k for place, k in enumerate(rest) if place % 3] or rest
    sample, classes = probes.sample_pixels(truth[train], PIXELS), 1 + len(data.grid.classes)
    digits = range(1, classes)  # 0 is background
    rows = {}
    for kind in layout_conditions.KINDS:
        condition = layout_conditions.layouts(kind, data, ids, found)
        maps = cache.features(backbone, images, t, (stage, *backbone.cross_stages), condition=condition, side=MAP_SIDE,
                              label=f"layout: {kind}")
        cross = [torch.nn.functional.interpolate(maps[name], maps[stage].shape[2:], mode="bilinear")
                 for name in backbone.cross_stages]
        for name, own in ((kind, maps[stage]), (f"{kind} + attention", torch.cat([maps[stage], *cross], 1))):
            _, strength = probes.segmentation_counts(own[train], sample, own[val], truth[val], classes, named=digits)
            counts, _ = probes.segmentation_counts(own[train], sample, own[test], truth[test], classes, strength)
            result = evaluate_segmentation(counts, {"all": digits}, resamples=resamples, seed=seed)
            rows[name] = {"mIoU": result["mIoU_all"], "mIoU_ci95": result["mIoU_all_ci95"], "n_images": len(test),
                          "leaks": kind in layout_conditions.LEAKS}
    return rows
