"""Files of published weights: read without running code, and put into a network of ours."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from dive_lib import paths
from dive_lib.checkpoint import load_tensors
from dive_lib.text_targets import need_files

COUNTER = "num_batches_tracked"  # of batch normalisation: absent from old files, and of matter to training alone


def need(file: Path | str, source: str) -> Path:
    """The path of a file that is absolute, or relative to the repository root.

    source: where it is downloaded. Raises FileNotFoundError, which names both, where it is not there.
    """
    path = paths.ROOT / file
    need_files(path.parent, (path.name,), source)
    return path


def read(file: Path | str, source: str) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file that torch.save or safetensors wrote, without batch normalisation's counters.

    file, source: of `need`; .safetensors, else torch's format, of which only tensors are read. Raises FileNotFoundError
    for a missing file and ValueError for a damaged one, or one of other content; both name the file and the source.
    """
    path = need(file, source)
    try:
        given = load_tensors(path)[0] if path.suffix == ".safetensors" else \
            torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in given.values()):
            raise TypeError("not a mapping of names to tensors")
    except Exception as error:  # torch and safetensors raise errors of many types for damaged files
        raise ValueError(f"{paths.shorten(path)}: not a file of weights that can be read; "
                         f"{_remedy(path, source)}") from error
    return {name: tensor for name, tensor in given.items() if not _is_counter(name)}


def fill(network: nn.Module, weights: Mapping[str, torch.Tensor], file: Path | str, source: str) -> None:
    """Puts weights under the network's own names into it.

    file, source: of `read`, for messages. Raises ValueError for the first name that is missing, unknown or of another
    shape.
    """
    own = {name: tensor for name, tensor in network.state_dict().items() if not _is_counter(name)}
    for name in own | dict(weights):
        shapes = [tuple(tensors[name].shape) if name in tensors else "absent" for tensors in (weights, own)]
        if shapes[0] != shapes[1]:
            raise other_network(file, source, f"{name} is {shapes[0]}, not {shapes[1]}")
    network.load_state_dict(dict(weights), strict=False)  # the counters stay as they are


def other_network(file: Path | str, source: str, difference: str) -> ValueError:
    """What is raised for weights that do not fit."""
    path = paths.ROOT / file
    return ValueError(f"{paths.shorten(path)}: weights of another network ({difference}); {_remedy(path, source)}, or "
                      "correct the settings: the file, the network, the number of classes or channels")


def _remedy(path: Path, source: str) -> str:
    return f"download {path.name} again from {source}"


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER
