"""What a frozen denoiser knows: the outputs of its blocks at a time step, with one interface for every backbone.

    backbone = DenoiserFeatures(LayoutDenoiser(ldm, first_stage), Noise("ddpm"))
    backbone.stages                                          # ("down0", "down1", "mid", "up0", "up1")
    backbone.features(images, t=200, stages=("mid", "up1"))  # {"mid": (B, 96, 4, 4), "up1": (B, 48, 8, 8)}

One forward pass per time step serves all stages, without gradient; it ends after the deepest stage asked for. A
stage is the output of a block after its down- or upsampler, as in Vermouth (published code: src/model/unet.py).
"cross_up1" and the like are the cross-attention maps of that up block, averaged over heads and over its layers: one
channel for each token of the condition.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dive_lib.checkpoint import fingerprint, freeze
from dive_lib.feature_backbone import FeatureBackbone
from dive_lib.feature_noise import Noise, noisy_latents, time_steps
from dive_lib.position_attention import PositionAttention

LATENTS_KEPT = 2**28  # bytes of clean latents that a backbone remembers
CROSS = "cross_"  # prefix of the stages that are cross-attention maps


class _Enough(Exception):
    """Raised inside the network when the deepest stage has been computed."""


class Denoiser(nn.Module):
    """What a frozen latent diffusion model must offer; subclasses in `denoisers` and `stable_diffusion`.

    name: of the backbone. channels: {stage: channels} in the order in which the blocks run. blocks: {stage: module}.
    schedule: NoiseSchedule. attentions: {stage: its cross-attention modules} of the up blocks that have any.
    tokens: length of the condition, 0 where there is no cross-attention.
    """

    name = "denoiser"
    channels: dict[str, int]
    blocks: dict[str, nn.Module]
    attentions: dict[str, list[nn.Module]] = {}
    tokens = 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> clean latents (B, C, h, w)."""
        raise NotImplementedError

    def context(self, condition, batch: int) -> torch.Tensor:
        """The network's condition (B, ...) from tokens, labels or texts of the images; None is the empty one."""
        raise NotImplementedError

    def predict_noise(self, z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """eps_theta: z (B, C, h, w), t (B,), context -> (B, C, h, w)."""
        raise NotImplementedError

    def as_map(self, output, latents: torch.Tensor) -> torch.Tensor:
        """A block's output as a map (B, C, h, w); `latents`: the network's input."""
        return output[0] if isinstance(output, tuple) else output


class DenoiserFeatures(FeatureBackbone):
    """The features of a denoiser under one noise mode. bf16: the passes run in bfloat16; features are float32.

    Clean latents of the latest batches stay in memory (LATENTS_KEPT), since probes ask for the same images at many t.
    """

    def __init__(self, denoiser: Denoiser, noise: Noise | None = None, *, bf16: bool = False):
        self.denoiser = self.network = freeze(denoiser)
        self.noise, self.bf16 = noise or Noise(), bf16
        self._clean: dict[str, torch.Tensor] = {}
        self.name = denoiser.name
        self.stages = tuple(denoiser.channels)
        self.cross_stages = tuple(CROSS + stage for stage in denoiser.attentions)
        self.channels = dict(denoiser.channels) | {stage: denoiser.tokens for stage in self.cross_stages}

    def with_noise(self, noise: Noise) -> "DenoiserFeatures":
        """The same network under another noise mode."""
        return DenoiserFeatures(self.denoiser, noise, bf16=self.bf16)

    @property
    def identity(self) -> dict:
        return super().identity | {"noise": self.noise.to_dict(), "bf16": self.bf16,
                                   "schedule": self.denoiser.schedule.config}

    @torch.no_grad()
    def features(self, images: torch.Tensor, t: int | Sequence[int], stages: Sequence[str] | None = None,
                 condition=None) -> dict[str, torch.Tensor]:
        """{stage: (B, C, h, w) float32} for images (B, 3, H, W) in [-1, 1].

        t: a time step, or several: then the features are those of the last (`feature_noise`). stages: block outputs
        and cross-attention maps, by default all block outputs. condition: what the denoiser's `context` takes; None
        is the empty one. Raises ValueError for an unknown stage and for bad time steps.
        """
        stages = self.asked(stages)
        times = time_steps(t, self.noise, self.denoiser.schedule.steps)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            context = self.denoiser.context(condition, len(images))

            def predict(z: torch.Tensor, at: int) -> torch.Tensor:
                return self.denoiser.predict_noise(z, torch.full((len(z),), at, device=z.device), context)

            z = noisy_latents(self._encode(images), images, times, self.noise, self.denoiser.schedule, predict)
            kept = _record(self.denoiser, stages, z, lambda: predict(z, times[-1]))
        return {stage: kept[stage].float() for stage in stages}

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        key = fingerprint(list(images.shape), images)
        if key not in self._clean:
            latents = self.denoiser.encode(images)
            while self._clean and (len(self._clean) + 1) * latents.nbytes > LATENTS_KEPT:
                self._clean.pop(next(iter(self._clean)))
            self._clean[key] = latents
        return self._clean[key]


def _record(denoiser: Denoiser, stages: Sequence[str], z: torch.Tensor, run: Callable[[], object]) -> dict:
    """Runs the network as far as needed and keeps the stages' maps."""
    order = list(denoiser.blocks)
    deepest = max(order.index(stage.removeprefix(CROSS)) for stage in stages)
    kept: dict[str, torch.Tensor] = {}
    maps: dict[str, list[torch.Tensor]] = {stage: [] for stage in stages if stage.startswith(CROSS)}
    hooks = []

    def at_block(stage: str):
        def hook(module, inputs, output):
            if stage in stages:
                kept[stage] = denoiser.as_map(output, z)
            if CROSS + stage in maps:
                kept[CROSS + stage] = torch.stack(maps[CROSS + stage]).mean(0)
            if order.index(stage) == deepest:
                raise _Enough
        return hook

    try:
        for stage in order[:deepest + 1]:
            hooks.append(denoiser.blocks[stage].register_forward_hook(at_block(stage)))
            for attention in denoiser.attentions.get(stage, ()) if CROSS + stage in maps else ():
                hooks.append(attention.register_forward_pre_hook(_keep_map(maps[CROSS + stage]), with_kwargs=True))
        run()
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _keep_map(into: list[torch.Tensor]):
    def hook(attention, inputs, keywords):
        states = inputs[0] if inputs else keywords["hidden_states"]
        into.append(attention_map(attention, states, keywords["encoder_hidden_states"]))
    return hook


def attention_map(attention: nn.Module, states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Cross-attention of a diffusers module, mean over heads: (B, L, side, side), summing to one over the L tokens.

    states (B, pixels, c) of a square map, context (B, L, d). Position attention's bias belongs to it.
    """
    query, key = (project(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()
                  for project, x in ((attention.to_q, states), (attention.to_k, context)))
    logits = query @ key.mT * attention.scale
    if isinstance(attention.processor, PositionAttention):
        vectors = attention.processor.grid_query  # (pixels, 4 d); the context ends with the boxes' embeddings
        logits = logits + (context[..., -vectors.shape[1]:] @ vectors.T.to(context.dtype)).mT[:, None]
    weights = logits.softmax(-1).mean(1)  # (B, pixels, L)
    side = round(weights.shape[1] ** 0.5)
    return weights.mT.unflatten(2, (side, side))
