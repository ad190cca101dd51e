"""Texts as conditions of a text-to-image denoiser: BLIP's caption, a constant prompt, nothing, or the true class.

The true class is for a row marked "leaks the label" only: the published few-shot training feeds it to the network in
training and test (Classification/train_few-shot.py), so its features contain the answer.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from dive_lib import checkpoint, paths
from dive_lib.first_stage import device
from dive_lib.text_targets import need_files, read_pretrained

SOURCE = "huggingface.co/Salesforce/blip-image-captioning-base"
FILES = ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json")
PROMPT = "a picture of "
SHORTEST, LONGEST = 5, 10  # tokens, prompt included; hard-coded in the published src/model/captioner.py
SIDE = 256  # pixels of BLIP's input, as published
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONSTANT = "a photo of"
KINDS = ("empty", "constant", "blip", "true_class")
LEAKS = ("true_class",)


class Captioner:
    """BLIP in greedy decoding. folder: absolute, or relative to the repository root.

    Raises FileNotFoundError that says what to download, and ValueError for a damaged folder.
    """

    def __init__(self, folder: Path | str, side: int = SIDE):
        from transformers import BertTokenizer, BlipForConditionalGeneration
        self.directory, self.side = paths.ROOT / folder, side
        need_files(self.directory, FILES, SOURCE)
        self.tokenizer = read_pretrained(BertTokenizer, self.directory, SOURCE)
        self.model = checkpoint.freeze(read_pretrained(BlipForConditionalGeneration, self.directory, SOURCE,
                                                       use_safetensors=True)).to(device())

    @property
    def identity(self) -> dict:
        return {"captions": "BLIP", "weights": checkpoint.fingerprint(self.directory / "model.safetensors"),
                "prompt": PROMPT, "lengths": [SHORTEST, LONGEST], "side": self.side}

    @torch.no_grad()
    def captions(self, images: torch.Tensor, batch: int = 32) -> list[str]:
        """Captions, without the prompt, of images (n, 3, H, W) in [-1, 1]."""
        texts = []
        for part in images.split(batch):
            pixels = F.interpolate(part.to(self.model.device), (self.side, self.side), mode="bicubic",
                                   antialias=True).clamp(-1, 1)
            mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
            prompt = self.tokenizer([PROMPT] * len(part), return_tensors="pt").to(self.model.device)
            tokens = self.model.generate(
                ((pixels + 1) / 2 - mean) / std, input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"],
                interpolate_pos_encoding=True, num_beams=1, do_sample=False, min_length=SHORTEST, max_length=LONGEST)
            texts += [text.strip().removeprefix(PROMPT.strip()).strip()
                      for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        return texts


def prompts(kind: str, images: torch.Tensor, *, names: Sequence[str] = (),
            captioner: Captioner | None = None) -> list[str]:
    """A text for each of the images (n, 3, H, W) in [-1, 1].

    kind: one of KINDS. names: the images' true classes, for "true_class". captioner: for "blip".
    """
    if kind == "empty":
        return [""] * len(images)
    if kind == "constant":
        return [CONSTANT] * len(images)
    if kind == "blip" and captioner is not None:
        return captioner.captions(images)
    if kind == "true_class" and len(names) == len(images):
        return [f"a photo of a {name}" for name in names]
    if kind not in KINDS:
        raise ValueError(f"prompt kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    raise ValueError(f"prompt kind {kind!r} needs " + ("a captioner" if kind == "blip" else
                     f"the class of each of the {len(images)} images, got {len(names)}"))
