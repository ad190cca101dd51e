"""Where class names lie in a text space: the targets of Vermouth's heads.

Two encoders with one interface, `encode(names, templates) -> (K, width)` unit vectors:

AttributeWords  for the mini profile: no download and no learning. A word is a fixed random direction; a name is the
                normalised sum of its words. So "red three" lies between "red" and "three", and a combination never
                seen in training has a target that the head has met in parts. Synonyms and grammar mean nothing to it.
ClipText        CLIP's text tower (ViT-L/14 in the paper), from a local folder in Hugging Face's format.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from dive_lib import checkpoint, paths
from dive_lib.first_stage import device

CLIP_SOURCE = "huggingface.co/openai/clip-vit-large-patch14"
CLIP_FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json")
PHOTO = ("a photo of {}",)  # retrieval's template
# The fourteen phrasings of the published segmentation code: photo and scene, plain and in three sizes.
SEGMENTATION = ("a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene",
                "There is the {} in the scene", "a photo of a {} in the scene", "a photo of a small {}.",
                "a photo of a medium {}.", "a photo of a large {}.", "This is a photo of a small {}.",
                "This is a photo of a medium {}.", "This is a photo of a large {}.",
                "There is a small {} in the scene.", "There is a medium {} in the scene.",
                "There is a large {} in the scene.")
POOLINGS = ("projected", "last_state")


class AttributeWords:
    """width: of the space. The direction of a word depends on the word and the seed alone, so any name can be asked."""

    def __init__(self, width: int = 64, seed: int = 0):
        self.width, self.seed = width, seed

    @property
    def identity(self) -> dict:
        return {"text": "attribute words", "width": self.width, "seed": self.seed}

    def word(self, word: str) -> torch.Tensor:
        """(width,) the unit vector of one word; case does not matter."""
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {word.lower()}".encode()).digest()[:7])
        return F.normalize(torch.randn(self.width, generator=torch.Generator().manual_seed(seed)), dim=0)

    def encode(self, names: Sequence[str], templates: Sequence[str] = ()) -> torch.Tensor:
        """Unit vectors (K, width) of the names, whatever the templates. Raises ValueError for one without a word."""
        empty = [name for name in names if not name.split()]
        if empty:
            raise ValueError(f"class name {empty[0]!r} has no word to encode; give every class a name")
        return torch.stack([F.normalize(sum(self.word(word) for word in name.split()), dim=0) for name in names])


class ClipText:
    """CLIP's text tower. folder: absolute, or relative to the repository root. templates: with one {} for the name;
    a class is the mean over them. pooling: "projected" (`text_embeds`; published for retrieval) or "last_state" (last
    hidden state at the end of the text; few-shot classification and segmentation).

    Raises FileNotFoundError and ValueError that name the file and what to download.
    """

    def __init__(self, folder: Path | str, templates: Sequence[str] = PHOTO, *, pooling: str = "projected"):
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
        self.directory, self.templates, self.pooling = paths.ROOT / folder, tuple(templates), pooling
        need_files(self.directory, CLIP_FILES, CLIP_SOURCE)
        self.tokenizer = read_pretrained(CLIPTokenizer, self.directory, CLIP_SOURCE)
        self.model = checkpoint.freeze(read_pretrained(CLIPTextModelWithProjection, self.directory, CLIP_SOURCE,
                                                       use_safetensors=True)).to(device())
        config = self.model.config
        self.width = config.projection_dim if pooling == "projected" else config.hidden_size

    @property
    def identity(self) -> dict:
        return {"text": "CLIP", "weights": checkpoint.fingerprint(self.directory / "model.safetensors"),
                "templates": list(self.templates), "pooling": self.pooling}

    @torch.no_grad()
    def encode(self, names: Sequence[str], templates: Sequence[str] = ()) -> torch.Tensor:
        """Unit vectors (K, width) of the names: the mean over the templates (or those of this call), as published of
        vectors as they are."""
        encoded = []
        for name in names:
            texts = [template.format(name) for template in templates or self.templates]
            tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(
                self.model.device)
            output = self.model(**tokens)
            if self.pooling == "projected":
                vectors = output.text_embeds
            else:
                ends = (tokens["input_ids"] == self.tokenizer.eos_token_id).int().argmax(1)
                vectors = output.last_hidden_state[torch.arange(len(texts)), ends]
            encoded.append(F.normalize(vectors.float().mean(0), dim=0))
        return torch.stack(encoded).cpu()


def need_files(directory: Path, names: Sequence[str], source: str) -> None:
    """Raises FileNotFoundError for the first file that a downloaded folder lacks."""
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{paths.shorten(directory / name)}: no such file; download {', '.join(names)} of "
                                    f"{source} into {paths.shorten(directory)}")


def read_pretrained(kind, directory: Path, source: str, **options):
    """A Hugging Face object from a local folder; a damaged file is a ValueError that names the folder."""
    from transformers.utils import logging
    logging.disable_progress_bar()  # it shows tensors per second, which an executed notebook would keep
    try:
        return kind.from_pretrained(directory, local_files_only=True, **options)
    except Exception as error:  # transformers, diffusers and safetensors raise errors of many types for damaged files
        raise ValueError(f"{paths.shorten(directory)}: not a {kind.__name__} that can be read ({error}); download it "
                         f"again from {source}") from error
