"""The class-conditional models, DiT and LDM: which of them an architecture or a saved folder describes.

Both have one interface, that of `dit.DiT`, so that nothing else asks which of them is in use.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from dive_lib import checkpoint, class_ldm, dit, paths
from dive_lib.class_ldm import ClassLDM
from dive_lib.class_vocabulary import ClassGrid, ClassVocabulary
from dive_lib.dit import DiT

ClassModel = DiT | ClassLDM
KINDS = {"transformer": DiT, "unet": ClassLDM}
"""By the network that an architecture has."""


def kind_of(architecture: dict) -> type[ClassModel]:
    """The class whose keyword arguments these are. Raises ValueError unless they have exactly one of the networks."""
    found = [kind for network, kind in KINDS.items() if network in architecture]
    if len(found) != 1:
        raise ValueError(f"a class-conditional model has one of the networks {', '.join(KINDS)}, not "
                         f"{', '.join(architecture)}; choose from architectures.class_models in params.yaml, or run "
                         "the notebook that saves the model again")
    return found[0]


def make(classes: Sequence[str] | int, architecture: dict) -> ClassModel:
    """A model with freshly drawn weights. architecture: keyword arguments of its class without the classes."""
    return kind_of(architecture)(classes, **architecture)


def load(directory: Path | str) -> ClassModel:
    """Loads a model written by `checkpoint.save_model`, frozen: the one that its config.json describes."""
    config = checkpoint.load_config(directory)
    try:
        model = kind_of(config)(**config)
    except ValueError as error:
        raise ValueError(f"{paths.shorten(directory)}: {error}") from error
    return checkpoint.freeze(checkpoint.load_weights(directory, model))


def with_classes(model: ClassModel, classes: Sequence[int]) -> ClassModel:
    """The same frozen network with some of its classes only, in the given order, and the null class.

    Numbers beyond the model's own classes stand for strangers (`ClassVocabulary.strangers`), with which a vocabulary
    may be larger than the one that was learned.
    """
    known = len(model.grid.classes)
    part = copy.copy(model)
    part._modules = dict(model._modules)  # all but the vocabulary is shared
    part.grid = ClassGrid([model.grid.classes[c] if c < known else f"stranger {c - known}" for c in classes])
    part.vocabulary = ClassVocabulary(part.grid, model.vocabulary.width)
    table = model.vocabulary.class_table.detach()
    rows = torch.cat([table[:-1], model.vocabulary.strangers(max([*classes, known]) - known + 1), table[-1:]])
    part.vocabulary.class_table.data = rows[[*classes, -1]].clone()
    return checkpoint.freeze(part)


def load_published(path: Path | str, architecture: dict, classes: Sequence[str] | None = None) -> ClassModel:
    """Loads published weights, frozen: a DiT in diffusers' format, which brings its own configuration, or an LDM in
    CompVis's, for the given architecture. path: absolute, or relative to the repository root."""
    if kind_of(architecture) is DiT:
        return dit.load_published(paths.ROOT / path, classes)
    return class_ldm.load_published(paths.ROOT / path, architecture, classes)
