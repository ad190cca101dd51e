"""The one checkpoint format: a folder with weights.safetensors and config.json, written atomically."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dive_lib import paths
from dive_lib.files import atomic_path, read_json, write_json


def save_model(directory: Path | str, model: torch.nn.Module, config: dict,
               state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes model.state_dict(), or another `state` of it, and its JSON-serialisable constructor arguments."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / "weights.safetensors", model.state_dict() if state is None else state)
    write_json(directory / "config.json", config)


def save_early(directory: Path | str, model: torch.nn.Module, config: dict, early: dict[str, torch.Tensor]) -> None:
    """Writes the weights that `train(early=...)` kept as a model of their own; an empty folder where it kept none."""
    shutil.rmtree(directory, ignore_errors=True)
    Path(directory).mkdir(parents=True)
    if early:
        save_model(directory, model, config, early)


def load_config(directory: Path | str) -> dict:
    """Raises FileNotFoundError that says which stage makes the missing folder."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"no model at {directory.name}/config.json; run the notebook that trains '{directory.name}' first "
            "(or `make repro`)")
    return read_json(directory / "config.json")


def load_weights(directory: Path | str, model: torch.nn.Module) -> torch.nn.Module:
    """Loads the weights into a model built from load_config; every name must match. Returns it in eval mode."""
    tensors, _ = load_tensors(Path(directory) / "weights.safetensors")
    model.load_state_dict(tensors)
    return model.eval()


def weights_fingerprint(directory: Path | str) -> str:
    """What identifies the weights of a saved model in the description of a run; `directory` from the checkout on."""
    return fingerprint(paths.ROOT / directory / "weights.safetensors")


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """No gradients with respect to weights, evaluation mode: what every inverted or probed model goes through."""
    return model.requires_grad_(False).eval()


def save_tensors(path: Path | str, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> None:
    """Tensors and a JSON-serialisable dictionary as one safetensors file, in one atomic step."""
    header = {"json": json.dumps(metadata)} if metadata is not None else None
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, os.fspath(temporary), metadata=header)


def load_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and dictionary written by save_tensors."""
    with safe_open(os.fspath(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = json.loads((file.metadata() or {}).get("json", "{}"))
    return tensors, metadata


def fingerprint(*parts) -> str:
    """A short hash of files (Path), tensors and JSON-serialisable values: identifies a run's inputs."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            digest.update(part.read_bytes())
        elif isinstance(part, torch.Tensor):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def architecture(network: torch.nn.Module) -> list:
    """Of every module its name, kind and plain settings, for `fingerprint`: weights do not tell heads or groups."""
    def plain(value) -> bool:
        return isinstance(value, (bool, int, float, str)) or isinstance(value, tuple) and all(map(plain, value))

    return [[name, type(module).__name__, {key: value for key, value in vars(module).items()
                                           if key[0] != "_" and key != "training" and plain(value)}]
            for name, module in network.named_modules()]
