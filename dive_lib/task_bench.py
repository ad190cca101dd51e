"""What the notebooks of Vermouth's tasks share: backbones, features and texts of a profile, each made once.

No condition ever holds a label: denoisers run under the empty one, a constant text or a caption that a network gave to
the image itself, so nothing of the answer enters the features.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch

from dive_lib import backbones, paths, vermouth_data
from dive_lib.backbones import require
from dive_lib.captions import Captioner, prompts
from dive_lib.checkpoint import architecture, fingerprint
from dive_lib.feature_cache import FeatureCache
from dive_lib.progress import silent
from dive_lib.side_by_side import side_by_side
from dive_lib.task_features import Scales
from dive_lib.text_targets import PHOTO, AttributeWords, ClipText
from dive_lib.train import TrainingConfig, train


PROMPTS = ("", "constant", "blip")  # of `captions.KINDS` those that hold no label; "": the empty condition


class Bench:
    """model: {"noise": mode, "folder": of a downloaded denoiser, "expert", "prompt", "attention": see `given`,
    "expert_folders": by name, "captioner": folder of BLIP, "text": folder of CLIP or "" for attribute words,
    "text_width": of these, "pooling": of CLIP, "cached": whether features are kept on disk and in memory,
    "standardise": see `task_features`, "bf16": whether denoisers run in bfloat16, "batch": images per pass, "workers":
    heads that are trained side by side, each on one core; 1 on a GPU}.

    backbones: names of those that will be asked for. Raises FileNotFoundError that lists every missing file of theirs
    and of CLIP, before anything is read.
    """

    def __init__(self, profile: str, model: Mapping, templates: Sequence[str] = PHOTO, *,
                 backbones: Sequence[str] = ()):
        self.profile, self.model = profile, dict(model)
        if model["prompt"] not in PROMPTS:
            raise ValueError(f"prompt {model['prompt']!r} is not for tasks, whose conditions hold no label; choose one "
                             f"of {', '.join(map(repr, PROMPTS))}")
        backbones = [*backbones, *filter(None, [model["expert"]])]
        text = {"clip": model["text"]} if model["text"] else {}
        text |= {"blip": model["captioner"]} if model["prompt"] == "blip" else {}
        require([*backbones, *text], {name: self._folder(name) for name in backbones} | text)
        self.data = vermouth_data.load(profile)
        self.cache = FeatureCache(paths.runs(profile) / "task_features", model["batch"]) if model["cached"] else None
        self.encoder = ClipText(model["text"], templates, pooling=model["pooling"]) if model["text"] else \
            AttributeWords(model["text_width"])
        self._backbones: dict = {}
        self._scales: dict = {}
        self._pixels: dict = {}
        self._heads: dict = {}
        self._texts: dict = {}
        self._named: dict = {}

    @property
    def given(self) -> dict:
        """What every source of the notebook has beside backbone, t and group, as far as it is set: "expert": a backbone
        whose adapted maps join, "prompt": of PROMPTS, "attention": whether cross-attention maps join."""
        return {key: self.model[key] for key in ("expert", "prompt", "attention") if self.model[key]}

    def backbone(self, name: str):
        if name not in self._backbones:
            self._backbones[name] = backbones.load(self.profile, name, noise=self.model["noise"],
                                                   folder=self._folder(name), bf16=self.model["bf16"])
        return self._backbones[name]

    def _folder(self, name: str) -> str:
        return self.model["expert_folders"].get(name, "") if name in backbones.EXPERTS else self.model["folder"]

    def scales(self, images, source: Mapping, like=None) -> Scales:
        """Features of images. source: {"backbone": name, "t": step, "group": of stages} and what `given` may have.

        like: the training images by whose statistics features are standardised, by default the images themselves.
        """
        key = (id(images), *(source.get(name) for name in ("backbone", "t", "group", "expert", "prompt", "attention")))
        if key not in self._scales:
            expert = self.backbone(source["expert"]) if source.get("expert") else None
            prompt = functools.partial(self.prompts, images, source["prompt"]) if source.get("prompt") else None
            self._scales[key] = Scales(
                self.backbone(source["backbone"]), images, t=source["t"], group=source["group"],
                identity=vermouth_data.identity(self.data, images), cache=self.cache, expert=expert,
                pixels=self.pixels(images) if self.cache else None, standardise=self.model["standardise"],
                attention=source.get("attention", False), batch=self.model["batch"], prompt=prompt,
                prompted=self._prompted(source.get("prompt")),
                like=self.scales(like, source) if like is not None and self.model["standardise"] else None)
        return self._scales[key]

    def pixels(self, images) -> torch.Tensor:
        """(n, 3, S, S) all images of a split, decoded once and kept: for splits that fit in memory (with a cache)."""
        if id(images) not in self._pixels:
            self._pixels[id(images)] = images.load_images(range(len(images)))
        return self._pixels[id(images)]

    def reader(self, images) -> Callable[[torch.Tensor], torch.Tensor]:
        """Indices (B,) -> images (B, 3, S, S): of `pixels` with a cache; without one they are decoded each time."""
        return self.pixels(images).__getitem__ if self.cache else images.load_images

    def prompts(self, images, kind: str, indices: Sequence[int], pixels: torch.Tensor) -> list[str]:
        """A text for each of the images `indices` (their pixels (B, 3, S, S)); each image is captioned once."""
        known = self._texts.setdefault((id(images), kind), {})
        indices = [int(k) for k in indices]
        new = [k for k, index in enumerate(indices) if index not in known]
        if new:
            texts = prompts(kind, pixels[new], captioner=self.captioner if kind == "blip" else None)
            known |= {indices[k]: text for k, text in zip(new, texts)}
        return [known[index] for index in indices]

    @functools.cached_property
    def captioner(self) -> Captioner:
        return Captioner(self.model["captioner"])

    def _prompted(self, kind: str | None) -> str:
        return fingerprint(kind, self.captioner.identity) if kind == "blip" else kind or ""

    def text(self, names: Sequence[str], templates: Sequence[str] = ()) -> torch.Tensor:
        """(K, d) unit vectors of class names, encoded once: hundreds of names in fourteen phrasings take a while.
        templates: in place of the bench's."""
        key = tuple(names), tuple(templates)
        if key not in self._named:
            self._named[key] = self.encoder.encode(names, templates)
        return self._named[key]

    def train_head(self, head: torch.nn.Module, loss_of: Callable, config: TrainingConfig, *, task: str,
                   identity: str) -> torch.nn.Module:
        """Trains a head in place; where one was trained alike before, this takes over its weights, the same bytes.

        loss_of: see `train`. task: names the folder of interrupted trainings. identity: of everything but the head's
        first weights and `config` that determines the result. A table's reference row and the best of the settings
        that were compared are such heads.
        """
        key = fingerprint(asdict(config), identity, architecture(head), *head.state_dict().values())
        if key not in self._heads:
            with silent():
                train(head, loss_of, config, scratch=paths.scratch() / task, identity=key, label=task)
            self._heads[key] = copy.deepcopy(head.state_dict())
        head.load_state_dict(self._heads[key])
        return head.eval()

    def train_ahead(self, trainings: Sequence[Callable[[], object]], label: str = "heads") -> None:
        """Calls what trains heads, several side by side; called again afterwards, each finds its head trained."""
        def trained(call: Callable[[], object]) -> dict:
            known = set(self._heads)
            call()
            return {key: state for key, state in self._heads.items() if key not in known}

        for heads in side_by_side([functools.partial(trained, call) for call in trainings], self.workers, label):
            self._heads |= heads

    @property
    def workers(self) -> int:
        return self.model["workers"]


def differing(changes: Mapping[str, tuple[dict, dict]], chosen: dict, head: Mapping) -> dict[str, tuple[dict, dict]]:
    """An ablation's rows {title: (source, changed settings of the head)}: "as chosen" first, and what is not equal to
    it. chosen: its source; head: its settings."""
    return {"as chosen": (chosen, {})} | {
        title: (source, changed) for title, (source, changed) in changes.items()
        if source != chosen or any(head.get(key) != value for key, value in changed.items())}


def training(settings: Mapping, images: int, seed: int) -> TrainingConfig:
    """settings: {"steps": or 0 for "epochs" of all images, "epochs", "batch_size", "lr", "weight_decay", "schedule",
    "clip"}, the latter two as in TrainingConfig."""
    steps = settings["steps"] or settings["epochs"] * -(-images // settings["batch_size"])
    return TrainingConfig(steps=steps, lr=settings["lr"], batch_size=settings["batch_size"], ema=0.0,
                          schedule=settings["schedule"], clip=settings["clip"],
                          weight_decay=settings["weight_decay"], seed=seed)
