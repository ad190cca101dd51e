"""The one training loop: first stage, layout LDM, priors and everything trained later use it.

It counts steps, draws all randomness of a step from (seed, step), and saves its whole state from time to time.
Run again with the same configuration, a stopped training continues and ends with bit-identical weights (CPU);
with another configuration it starts anew. A finished one of a stage that failed later is not repeated.
"""

import csv
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dive_lib import stage_scratch
from dive_lib.batch_parts import Parts
from dive_lib.checkpoint import fingerprint, load_tensors, save_tensors
from dive_lib.files import atomic_path
from dive_lib.progress import Progress


@dataclass(frozen=True)
class TrainingConfig:
    """steps: optimiser steps. lr: AdamW's peak rate. schedule: "cosine" (to zero) or "constant", after a linear
    `warmup` of so many steps, at most a tenth of all. ema: decay of the averaged weights, 0 for none; the average
    warms up as (1 + n) / (10 + n). clip: largest gradient norm. bf16: run forward passes under bfloat16 autocast.
    early: keep the average of so many steps (at most all), too, 0 for none. parts: of a batch, each computed on one
    core (`batch_parts`). seed: of all draws."""

    steps: int
    lr: float
    batch_size: int
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0
    bf16: bool = False
    early: int = 0
    parts: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant', got {self.schedule!r}")
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"training needs steps >= 1, batch_size >= 1 and 0 <= ema < 1, got {self}")
        if self.early < 0:
            raise ValueError(f"early weights are those of a number of steps, got {self.early}")
        if not 1 <= self.parts <= self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} has 1 to {self.batch_size} parts, got {self.parts}")

    def rate(self, step: int) -> float:
        """Learning rate of step 0 ... steps - 1."""
        warm = min(1.0, (step + 1) / (min(self.warmup, self.steps // 10) + 1))
        if self.schedule == "constant":
            return self.lr * warm
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def train(model: nn.Module, loss_of: Callable[[nn.Module, int, torch.Generator], torch.Tensor],
          config: TrainingConfig, *, scratch: Path, identity: str, label: str = "training",
          save_every: float = 60.0, stop_after: int | None = None, keep_after: float = 30.0,
          early: dict[str, torch.Tensor] | None = None) -> list[float]:
    """Trains `model` in place and leaves the averaged weights in it. Returns the loss of every step.

    loss_of: function (model, step, generator) -> scalar loss; draws its batch from the generator alone. A DrawnLoss
    where `config.parts` is above 1.
    scratch: folder for the resume state (outside version control). identity: fingerprint of everything else that
    determines the result (data, architecture); together with `config` it decides whether a saved state is
    continued. save_every: least seconds between saves; it has no influence on the result. stop_after: end this
    call after so many steps, as an interruption would. keep_after: seconds; a training of a running stage that
    took so long, or that was continued, leaves its finished state there until the stage has ended well
    (`stage_scratch`), and called again it returns the same weights and losses at once. Others remove their state.
    early: receives the model's state with the averaged weights of `config.early` steps; nothing for 0.
    Raises FloatingPointError at the first non-finite loss, naming the step.
    """
    key = fingerprint(asdict(config), identity, {k: list(v.shape) for k, v in model.state_dict().items()})
    state_file = Path(scratch) / f"{key}.safetensors"
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay,
                                  fused=True)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    if state_file.exists():
        stage_scratch.keep(state_file)
    kept: dict[str, torch.Tensor] = {}
    losses = _resume(state_file, model, optimizer, parameters, average, kept)
    resumed = len(losses)
    model.train()
    began = saved = time.monotonic()
    pause = save_every
    parts = Parts(config.parts, model, lambda: _autocast(model, config.bf16))
    with parts.at_once(), Progress(config.steps, label, start=resumed) as progress:
        for step in range(resumed, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            generator = step_generator(config.seed, step)
            loss = parts.step(loss_of, step, generator)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"{label}: the loss is {loss.item()} at step {step}; lower lr ({config.lr}) or check the data")
            nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            optimizer.step()
            decay = min(config.ema, (1 + step) / (10 + step)) if config.ema else 0.0
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
            losses.append(loss.item())
            if len(losses) == min(config.early, config.steps):
                kept |= {name: value.clone() for name, value in average.items()}
            progress.update(loss=losses[-1])
            ended = stop_after is not None and len(losses) >= stop_after
            if ended or time.monotonic() - saved > pause:
                began_saving = time.monotonic()
                _save(state_file, model, optimizer, parameters, average, kept, losses)
                saved = time.monotonic()
                pause = max(save_every, 50 * (saved - began_saving))  # of a large model: 2 % of the time at most
            if ended:
                return losses
    if stage_scratch.current() and (resumed or time.monotonic() - began >= keep_after):
        stage_scratch.keep(state_file)
        if resumed < config.steps:
            _save(state_file, model, optimizer, parameters, average, kept, losses)
    else:
        stage_scratch.discard(state_file)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    if early is not None and kept:
        early |= model.state_dict() | kept
    model.eval()
    return losses


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step. The global generator (dropout) is seeded alike."""
    torch.manual_seed(seed * 1_000_003 + step)
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def write_loss_curve(path: Path | str, losses: list[float], every: int = 1) -> None:
    """CSV (step, loss): the mean of each `every` steps."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        for start in range(0, len(losses), every):
            chunk = losses[start:start + every]
            writer.writerow([start + len(chunk), f"{sum(chunk) / len(chunk):.6g}"])


def _autocast(model: nn.Module, bf16: bool):
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()


def _save(path: Path, model, optimizer, parameters, average, kept, losses) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    tensors |= {f"early.{name}": value for name, value in kept.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    # A finished training must leave the global generator as it did: what follows may draw from it.
    tensors["generator"] = torch.get_rng_state()
    save_tensors(path, tensors)


def _resume(path: Path, model, optimizer, parameters, average, kept) -> list[float]:
    if not path.exists():
        return []
    tensors, _ = load_tensors(path)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in parameters.items():
        average[name].copy_(tensors[f"average.{name}"])
        if f"early.{name}" in tensors:
            kept[name] = tensors[f"early.{name}"].to(parameter.device)
        state = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if state["step"] is not None:  # what had no gradient yet, as a codebook before it is used, has no state
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    torch.set_rng_state(tensors["generator"])
    return tensors["losses"].tolist()
