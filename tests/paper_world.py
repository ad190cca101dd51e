"""Tiny folders and weights in the published formats, for all that the profile `paper` expects: see the README.

Images are as small as the networks allow; those of segmentation are twice as large as the others, as in the profile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, VQModel
from PIL import Image

from dive_lib import (class_data, class_ldm, classifiers, compvis, dataset, detections, few_shot_data, paths,
                      segmentation_data, sketch_data)
from dive_lib.checkpoint import save_model
from dive_lib.class_ldm import ClassLDM
from dive_lib.dit import DiT
from dive_lib.files import write_json, write_text
from dive_lib.first_stage import FirstStage
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.parameters import load, named
from tests import stand_ins, torchvision_stand_ins
from tests.test_compvis import fake_checkpoint
from tests.test_inception import published as inception_weights
from tests.test_pretrained_classifiers import published_names

SIDE = 64  # of all images but those of segmentation
FEW_SHOT = ("Pets", "Aircraft", "ImageNet")  # one for each kind of list
SKETCHES = ("Sketchy", "QuickDraw")
SEGMENTATION = {"COCO-Stuff": ("train", 8, 0), "ADE-150": ("val", 8, 1), "PC-459": ("val", 2, 1)}  # images, first value
CLASSES, SYNSETS = ("tabby cat", "sea lion", "wok"), ("n01", "n02", "n03")
TRANSFORMER = {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2, "num_attention_heads": 2,
               "attention_head_dim": 8}
SLOTS = 4
VQ_F8 = {"ddconfig": {"z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
                      "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [8]},
         "embed_dim": 4, "n_embed": 16}
VQ_F4 = {"ddconfig": {"z_channels": 3, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1],
                      "num_res_blocks": 1, "attn_resolutions": []}, "embed_dim": 3, "n_embed": 19}
VQ_CONVOLUTIONS = ("q", "k", "v", "proj_out")
SIZES = {  # of the named settings, by family; AlexNet has one size, so a residual network stands in its place
    "first_stage": {"block_out_channels": [32, 32, 32, 64], "layers_per_block": 1, "num_vq_embeddings": 16},
    "layout_ldm": {"width": 16, "layers": 1, "heads": 2, "head_width": 8, "sample_size": 8,
                   "block_out_channels": [32, 32, 64], "layers_per_block": 1, "attention_head_dim": [1, 2, 4],
                   "transformer_layers_per_block": 1},
    "layout_prior": {"width": 16, "layers": 1, "heads": 2, "head_width": 8},
    "dit": {}, "class_models": {"sample_size": 16, "block_out_channels": [32, 32, 32, 64], "layers_per_block": 1,
                                "width": 12},
    "classifiers": {"widths": [4, 8], "groups": 2, "inner": 2},
    "detectors": {"widths": [4, 8], "blocks": [1, 2], "neck": 8},
    "straight_through": {"batch": 2, "t_interval": 100, "monitor_pairs": 2, "monitor_every": 2},
    "local": {"rounds": 1, "proposals": 4, "proposal_pairs": 1, "refine_pairs": 2, "class_pairs": 2,
              "monitor_pairs": 2},
    "methods": {"t_interval": 100, "steps": 10, "batch": 2, "monitor_every": 5, "monitor_pairs": 2, "images": 4,
                "rank_pairs": 2, "size": 2, "keep": [2, 1], "pairs": [2, 10], "patience": 4}}
CLASSIFIERS = {"resnet_bottleneck": {"blocks": [1, 2]}, "resnext": {"blocks": [1, 2]},
               "synthetic_data": {"blocks": [1, 2]}, "diffusion_feature": {"widths": [8, 8]},
               "vit_large": {"patch": 56, "width": 16, "layers": 2, "heads": 2},
               "vit": {"patch": 56, "width": 16, "layers": 1, "heads": 2},
               "swin": {"patch": 8, "width": 8, "depths": [2, 3], "heads": [1, 2]}}


@contextmanager
def folder(tmp_path_factory) -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
    """The folder of everything, to which the variables of `paths` point in this block, and what it may patch."""
    root = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("runs", "reports", "scratch"):
            patch.setenv(f"DIVE_{name.upper()}", str(root / name))
        yield root, patch


def picture(path, seed: int, size=(20, 14)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(path)


def label_map(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def few_shot(root, count=None):
    """The sets of FEW_SHOT. count: images of a class in the splits; ImageNet has no validation images."""
    count = count or {"train": 4, "val": 2, "test": 3}
    for name in FEW_SHOT:
        folder, images, listed = few_shot_data.SETS[name]
        entries = {split: [(f"{word.replace(' ', '_')}_{split}_{k}.jpg", c, word) for c, word in enumerate(CLASSES)
                           for k in range(count[split])] for split in count}
        if name == "ImageNet":
            for split, where in (("train", "train"), ("test", "val")):
                for file, c, _ in entries[split]:
                    picture(root / folder / images / where / SYNSETS[c] / f"{file[:-4]}.JPEG", c)
            write_text(root / folder / "classnames.txt", "".join(f"{a} {b}\n" for a, b in zip(SYNSETS, CLASSES)))
            continue
        for split, own in entries.items():
            for k, (file, c, _) in enumerate(own):
                picture(root / folder / images / file, 10 * k + c)
            if name == "Aircraft":
                write_text(root / folder / f"images_variant_{split}.txt",
                           "".join(f"{file[:-4]} {word}\n" for file, _, word in own))
        if name == "Aircraft":
            write_text(root / folder / "variants.txt", "".join(f"{word}\n" for word in CLASSES))
        else:
            write_json(root / folder / listed, {split: list(map(list, own)) for split, own in entries.items()})


def sketches(root):
    seen, unseen = ("airplane", "car_(sedan)", "cat"), ("door", "alarm clock")
    for name in SKETCHES:
        folder = root / sketch_data.SETS[name][0]
        for c, word in enumerate((*seen, *unseen)):
            for kind, count in (("sketch", 2), ("photo", 3)):
                for k in range(count):
                    picture(folder / kind / word / f"{k}.{'png' if kind == 'sketch' else 'jpg'}", 10 * k + c)
        write_text(folder / "seen.txt", "".join(f"{word}\n" for word in seen))
        write_text(folder / "unseen.txt", "".join(f"{word}\n" for word in unseen))


def segmentation(root):
    """The sets of SEGMENTATION, with the published numbers of names; 459 and 847 need label maps of 16 bit."""
    for name, (split, count, first) in SEGMENTATION.items():
        folder, classes, _ = segmentation_data.SETS[name]
        names = ["traffic light", "sky", *(f"thing-{k}" for k in range(2, classes))]
        write_json(root / folder / "classes.json", {"names": names, "first": first})
        for part in dict.fromkeys((split, "val")):
            for k in range(count):
                picture(root / folder / "images" / part / f"{k}.jpg", k)
                values = np.full((14, 20), (k + 3) % 5 + first, np.uint16 if classes > 255 else np.uint8)
                values[:7], values[-1] = first + k % 2, classes + first
                label_map(root / folder / "annotations" / part / f"{k}.png", values)
    return root


def checkpoints(root):
    """Folders in the formats of diffusers and transformers, named as in the README."""
    stand_ins.stable_diffusion(root / "stable-diffusion-v1-5")
    stand_ins.clip_text(root / "clip-vit-large-patch14")
    stand_ins.blip(root / "blip-image-captioning-base")
    stand_ins.resnet18(root / "resnet-18")
    stand_ins.vit(root / "dino-vitb16", "dino")
    stand_ins.vit(root / "dinov2-base", "dinov2")
    return root


def coco(root, images=6):
    """COCO 2017: 80 categories whose ids have gaps, polygons, a crowd, train2017 and val2017."""
    categories = [{"id": k + 1 + k // 8, "name": f"thing {k}", "supercategory": "thing"} for k in range(80)]
    for split in ("train2017", "val2017"):
        records, annotations = [], []
        for k in range(1, images + 1):
            picture(root / split / f"{k:012d}.jpg", k, (48, 40))
            records.append({"id": k, "file_name": f"{k:012d}.jpg", "width": 48, "height": 40})
            for j in range(1 + k % 3):
                x, y, w, h = 2.0 + 10 * j, 3.0 + k, 14.5, 20.0
                annotations.append({"id": len(annotations) + 1, "image_id": k, "iscrowd": 0, "bbox": [x, y, w, h],
                                    "category_id": categories[(7 * k + j) % 80]["id"], "area": w * h,
                                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        annotations.append({"id": len(annotations) + 1, "image_id": 1, "category_id": 1, "iscrowd": 1, "area": 40.0,
                            "bbox": [0.0, 0.0, 4.0, 10.0], "segmentation": {"size": [40, 48], "counts": [0, 40, 1880]}})
        write_json(root / "annotations" / f"instances_{split}.json",
                   {"images": records, "annotations": annotations, "categories": categories})
    return root


def imagenet(root):
    for split, count in (("train", 2), ("val", 3)):
        for c, synset in enumerate(SYNSETS):
            for k in range(count):
                picture(root / split / synset / f"{synset}_{k}.JPEG", 10 * k + c, (72, 66))
    return root


def earlier_stages(profile: str, root):
    """What 15_features reads of the stages before it: data, untrained models of both kinds, DIVE's layouts."""
    settings = load(profile)
    data = settings["data"]
    layouts = dataset.describe(profile, coco(root / "coco"), dict(zip(dataset.SPLITS, data["splits"])),
                               image_size=SIDE, bins=data["bins"], slots=SLOTS, strict=data["strict"], evaluation=4,
                               ablation=2, tuning=2, seed=data["seed"])
    runs = paths.runs(profile)
    first, ldm = (small(None, "architectures", name, settings[name]["architecture"])
                  for name in ("first_stage", "layout_ldm"))
    torch.manual_seed(0)
    stage = FirstStage(**first)
    save_model(runs / "first_stage", stage, stage.config)
    model = LayoutLDM(layouts.grid, **ldm)
    save_model(runs / "layout_ldm", model, model.config)
    spec = detections.make_spec(data=str(layouts.root), split=data["splits"][2], train_split=data["splits"][0],
                                image_ids=layouts.subsets["evaluation"], first_stage=str(runs / "first_stage"),
                                layout_ldm=str(runs / "layout_ldm"),
                                inversion={"steps": 2, "batch": 2, "monitor_pairs": 2})
    detections.prepare(runs / "detection" / "dive", spec)
    detections.run_shard(runs / "detection" / "dive")
    classes = settings["class_data"]
    class_data.describe(profile, imagenet(root / "imagenet"), dict(zip(class_data.SPLITS, classes["splits"])),
                        image_size=SIDE, channels=classes["channels"], per_class=classes["per_class"],
                        encoder=str(stand_ins.autoencoder(root / "checkpoints" / "sd-vae-ft-ema")))
    dit = DiT(SYNSETS, TRANSFORMER, std=0.5)
    save_model(runs / "dit", dit, dit.config)


def published_models(root):
    """The files that the notebooks 02, 10, 12 and 13 read, of the networks that `small` describes."""
    config = compvis.vq_first_stage_config(**VQ_F8)
    stage = fake_checkpoint(VQModel(**config), compvis.vq_first_stage_table(config), convolutions=VQ_CONVOLUTIONS)
    torch.save({"state_dict": detached(stage)}, root / "vq-f8.ckpt")
    stand_ins.autoencoder(root / "sd-vae-ft-ema")
    dit = DiTTransformer2DModel(**TRANSFORMER, num_embeds_ada_norm=len(SYNSETS))
    for block in dit.transformer_blocks:  # a trained one has the same embedders in all
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    dit.save_pretrained(root / "DiT-XL-2-256" / "transformer")
    (root / "ldm-4").mkdir()
    torch.save({"state_dict": detached(ldm_4())}, root / "ldm-4" / "model.ckpt")
    for own in small(root, "architectures", "classifiers", "paper").values():
        if "file" in own:
            torch.save(torchvision_state(dict(own["network"])), own["file"])
    torch.save(inception_weights(), root / "pt_inception-2015-12-05-6726825d.pth")
    return root


def ldm_4() -> dict:
    """CompVis's checkpoint of the class-conditional model, with its first stage."""
    model = ClassLDM(len(SYNSETS), **small(None, "architectures", "class_models", "LDM-4"))
    config = compvis.vq_first_stage_config(**VQ_F4)
    unet = class_ldm._arguments(model.config["unet"], model.vocabulary.width)
    return fake_checkpoint(model.unet, compvis.layout_unet_table(unet), "model.diffusion_model.") | fake_checkpoint(
        VQModel(**config), compvis.vq_first_stage_table(config), "first_stage_model.", VQ_CONVOLUTIONS) | {
            "cond_stage_model.embedding.weight": model.vocabulary.class_table}


def detached(state: dict) -> dict:
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def torchvision_state(network: dict) -> dict:
    kind = network["kind"]
    theirs = {"vit_class_token": torchvision_stand_ins.Vit, "swin": torchvision_stand_ins.Swin}
    if kind in theirs:
        own = {key: value for key, value in network.items() if key != "kind"}
        return detached(theirs[kind](len(SYNSETS), **own).state_dict())
    return published_names(classifiers.make(network, channels=3, classes=len(SYNSETS), image_size=SIDE))


def small(root, kind: str, family: str, name: str) -> dict:
    """`parameters.named` with networks and searches of a few channels, layers, steps and pairs; what the profile says
    beside sizes stays. root: of the published classifiers' files."""
    own = named(kind, family, name)
    if family != "classifiers":
        return resized(own, SIZES[family])
    own = {row: resized(settings, SIZES["classifiers"] | CLASSIFIERS.get(row, {})) for row, settings in own.items()}
    own["convnet"]["network"] = {"kind": "resnet", "widths": [4, 8], "blocks": 1, "stem": "imagenet"}
    return {row: settings | ({"file": str(root / settings["file"].rpartition("/")[2])} if "file" in settings else {})
            for row, settings in own.items()}


def resized(settings, sizes: dict):
    """Settings with `sizes` in the place of numbers and lists of the same names, at any depth; zeros stay."""
    if not isinstance(settings, dict):
        return settings
    return {key: sizes[key] if key in sizes and value and not isinstance(value, dict) else resized(value, sizes)
            for key, value in settings.items()}
